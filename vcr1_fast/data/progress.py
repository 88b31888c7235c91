"""A progress line with the time left, for terminals and for logs."""

import sys
import time
from types import TracebackType
from typing import TextIO

BAR_WIDTH = 24
LOG_EVERY = 10.0  # seconds between lines where the output is a file or a pipe
DRAW_EVERY = 0.1


class Progress:
    """Counts steps up to `total`. On a terminal one line is redrawn; elsewhere, where that would
    garble a log, a new line is written every 10 seconds and at the end."""

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self._began = self._shown = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more, and show it when it is time to."""
        self.done += steps
        now = time.monotonic()
        if now - self._shown >= (DRAW_EVERY if self.live else LOG_EVERY):
            self._shown = now
            self._write(now)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._write(time.monotonic())
        if self.live:
            print(file=self.stream, flush=True)

    def _write(self, now: float) -> None:
        elapsed = now - self._began
        line = f"{self.label}: {self.done}/{self.total}"
        if self.done >= self.total:
            line += f" in {_clock(elapsed)}"
        elif self.done:
            line += f", {_clock(elapsed * (self.total - self.done) / self.done)} left"
        if self.live:
            filled = BAR_WIDTH * self.done // max(self.total, 1)
            bar = "#" * filled + "-" * (BAR_WIDTH - filled)
            print(f"\r\x1b[K[{bar}] {line}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
