"""A progress display with the time left: rich's bar on a terminal, plain lines in a pipe."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LOG_EVERY = 10.0
"""Seconds between lines where the output is a file or a pipe."""


class Progress:
    """Counts steps up to `total`. Where the stream is not a terminal, a redrawn bar would garble a
    log: a line is written every 10 seconds and at the end."""

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self.stream = stream if stream is not None else sys.stderr
        self._began = self._shown = time.monotonic()
        self._bar = open_bar(self.stream) if self.stream.isatty() else None

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._shown >= LOG_EVERY:
            self._write()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._task = self._bar.add_task(self.label, total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._write()

    def _write(self) -> None:
        self._shown = time.monotonic()
        elapsed = self._shown - self._began
        line = f"{self.label}: {self.done}/{self.total}"
        if self.done >= self.total:
            line += f" in {clock(elapsed)}"
        elif self.done:
            line += f", {clock(elapsed * (self.total - self.done) / self.done)} left"
        print(line, file=self.stream, flush=True)


def open_bar(stream: TextIO) -> "Bar":
    """rich's bar on a terminal: label, count, time left, bar, and a task's `text` field.

    On a narrow terminal the text is cut first, then the bar; count and time left are never.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(file=stream)
    # rich shrinks all columns alike, the count and the time left too, until they are three dots:
    # the widths are fixed here, and the text takes what is left.
    bar_width = max(4, min(40, console.width // 5))
    return Bar(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        BarColumn(bar_width, table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[text]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        expand=True,
    )


def fitting(items: Sequence[str], width: int) -> str:
    """The first items that fit in `width` columns, two blanks between them; at least one."""
    text = items[0] if items else ""
    for item in items[1:]:
        if len(text) + 2 + len(item) > width:
            break
        text += f"  {item}"
    return text


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
