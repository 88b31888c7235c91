"""Constant spans: the best that can be said about time without looking at the video."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vcr1_fast.tasks.record import Record

Spans = Sequence[Sequence[float]]


def duration_of(record: Record) -> float | None:
    """Seconds of the part to watch, from start/end or `metadata["duration"]`, the length of the
    file; None if unknown."""
    if record.end is not None:
        return record.end - (record.start or 0.0)
    duration = record.metadata.get("duration")
    return None if duration is None else float(duration) - (record.start or 0.0)


def constant_spans(
    train: Sequence[Record],
    test: Sequence[Record],
    spans_of: Callable[[Record], Spans],
    steps: int = 40,
) -> dict[str, list[tuple[float, float]]]:
    """Per strategy, one span in seconds for each test record.

    "whole video", and "constant span": the fractions [a, b] of the duration, multiples of 1/steps,
    with the best mean IoU on `train`. Where a duration is unknown, the latest second any training
    answer reaches stands for it.
    """
    latest = max((end for record in train for _, end in spans_of(record)), default=1.0)

    def length(record: Record) -> float:
        return duration_of(record) or latest

    grid = np.arange(steps + 1) / steps
    first, last = (grid[axis] for axis in np.triu_indices(steps + 1, k=1))
    total = np.zeros_like(first)
    for record in train:
        scale = length(record)
        common, extent = np.zeros_like(first), 0.0
        for start, end in _disjoint(spans_of(record), scale):
            common += np.clip(np.minimum(last, end) - np.maximum(first, start), 0.0, None)
            extent += end - start
        total += common / (last - first + extent - common)
    best = int(total.argmax())
    a, b = float(first[best]), float(last[best])
    return {
        "whole video": [(0.0, length(record)) for record in test],
        "constant span": [(a * length(record), b * length(record)) for record in test],
    }


def _disjoint(spans: Spans, scale: float) -> list[tuple[float, float]]:
    """The spans as fractions of `scale`, clipped to 0..1, sorted, overlaps cut away."""
    out: list[tuple[float, float]] = []
    for start, end in sorted((s / scale, e / scale) for s, e in spans):
        start, end = max(start, out[-1][1] if out else 0.0), min(end, 1.0)
        if start < end:
            out.append((start, end))
    return out
