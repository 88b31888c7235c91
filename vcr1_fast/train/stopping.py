"""Signals that end a run early, and the lock that keeps two runs out of one folder.

SIGTERM, SIGHUP (schedulers, spot instances, a closed terminal) and the first SIGINT let the step
finish; then the run saves a checkpoint and ends. A step longer than `grace` seconds is given up at
its next micro-batch instead, where nothing of it has reached the weights.
"""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class RunStopped(Exception):
    """A run that ended early on a signal, with a checkpoint to resume from.

    `code`: exit status by the shell's convention, 128 + the signal's number.
    """

    def __init__(self, number: int, step: int, output: Path) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the same command resumes "
            f"from {output / 'checkpoints'}"
        )


class StopRequest:
    """Whether a signal has asked the run to end. Use it in a `with` statement; handlers are
    installed in the main thread only, and the former ones come back afterwards."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.number: int | None = None
        self._deadline = 0.0

    @property
    def is_overdue(self) -> bool:
        """Whether the step has had its `grace` seconds since the signal."""
        return self.number is not None and time.monotonic() > self._deadline

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C comes from a person who does not want to wait.
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._deadline = time.monotonic() + self.grace

    def __enter__(self) -> "StopRequest":
        self._former = {}
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. ValueError where another live process holds it; the lock of
    a killed process is released by the system."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise ValueError(
                f"{output}: another run (process {owner or 'unknown'}) writes here; "
                "wait for it, or use another run.output"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
