"""Output of a run: a progress line, metrics.jsonl, rollouts.jsonl, experiment trackers."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from vcr1_fast.files import append_jsonl, read_lines, write_atomic
from vcr1_fast.progress import clock, fitting, open_bar
from vcr1_fast.train.trackers import TrackedSample, Trackers

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SHOWN = (
    "reward",
    "val/score",
    "finished",
    "loss",
    "kl",
    "length",
    "grad_norm",
    "tokens_per_second",
)
"""Metrics of the progress line; a narrow terminal shows the first ones."""
PLAIN_EVERY = 5.0
"""Seconds between lines where the output is a file or a pipe."""


class Stopwatch:
    """Seconds of each stage of a step; keyword arguments are stages timed elsewhere."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`; a GPU's queue is waited for, or its work would be
        counted where it is next waited for."""
        _wait_for_device()
        began = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_device()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


class RunLog:
    """The files and the progress line of a run of `steps` steps, `done` of them behind it.

    Rows of later steps, which a killed run has written since its last checkpoint, are cut off: the
    files end up as those of a run that was never interrupted. Use it in a `with` statement. With
    `active=False` (processes other than the first) nothing is written. `trackers` and `settings` as
    for `Trackers`.
    """

    def __init__(
        self,
        output: str | Path,
        steps: int,
        done: int = 0,
        *,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        active: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.active, self.steps, self.done = active, steps, done
        self.stream = sys.stderr if stream is None else stream
        self._began, self._first, self._shown = time.monotonic(), done, -PLAIN_EVERY
        self._trackers: Trackers | None = None
        self._bar: Bar | None = None
        if not active:
            return
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl"):
            # Before a tracker or a row: the files go on where the checkpoint ends.
            _cut_after(self.output / name, done)
        self._trackers = Trackers(trackers, self.output, done, settings or {}, self.message)

    def message(self, text: str, *, every_rank: bool = False) -> None:
        """A line for the person at the terminal, from the first process alone or from every one."""
        if not (self.active or every_rank):
            return
        if self._bar is not None:  # which moves down; a plain line would land on the bar's own
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Keep and show the metrics of a step; `metrics["step"]` counts the steps done."""
        self.done = metrics["step"]
        if not self.active:
            return
        # Each row is written at once: a run that is killed loses no finished step.
        append_jsonl(self.output / "metrics.jsonl", [_finite(metrics)])
        if self._trackers is not None:
            self._trackers.log(self.done, metrics)
        self._show(metrics)

    def rollouts(self, rows: Iterable[Mapping[str, Any]], *, skipped: bool = False) -> None:
        """Append completions, a row each, to rollouts.jsonl, or to skipped.jsonl those of a step
        whose update was skipped."""
        if self.active:
            # JSON has no nan, and a skipped step's advantages may be nan.
            finite = (_finite(row) for row in rows) if skipped else rows
            append_jsonl(self.output / ("skipped.jsonl" if skipped else "rollouts.jsonl"), finite)

    @property
    def has_trackers(self) -> bool:
        """Whether samples are shown anywhere."""
        return self._trackers is not None and self._trackers.are_open

    def samples(self, step: int, samples: Sequence[TrackedSample]) -> None:
        """Show completions with their clips in the trackers."""
        if self._trackers is not None:
            self._trackers.samples(step, samples)

    def _show(self, metrics: Mapping[str, Any]) -> None:
        shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
        text = "  ".join(shown)
        if self._bar is not None:
            width = self._bar.console.width
            taken = len(f"step {self.steps}/{self.steps} -:--:-- ") + width // 5 + 5
            text = fitting(shown, width - taken)
            self._bar.update(self._task, completed=self.done, text=text)
            return
        now = time.monotonic()
        # A line per step would flood a scheduler's log.
        if now - self._shown >= PLAIN_EVERY or self.done == self.steps:
            self._shown = now
            each = (now - self._began) / max(1, self.done - self._first)
            left = clock(each * (self.steps - self.done))
            self.message(f"step {self.done}/{self.steps}  {text}  {left} left")

    def __enter__(self) -> "RunLog":
        if self.active and self.stream.isatty():
            self._bar = open_bar(self.stream)
            self._task = self._bar.add_task("step", total=self.steps, completed=self.done, text="")
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
        if self._trackers is not None:
            self._trackers.close()


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON does not have."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in row.items()
    }


def _cut_after(path: Path, step: int) -> None:
    """Drop rows of steps after `step`, and half a row at the end."""
    if not path.exists():
        return
    whole = [line for _, line in read_lines(path) if line.endswith(b"\n")]
    write_atomic(path, b"".join(line for line in whole if json.loads(line)["step"] <= step))


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    # Kernels run after their launch returns: without a wait the next stage would be billed for
    # them. From sys.modules, since the log itself needs no torch.
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
