"""Guesses of blind baselines: the best constant answers, made without the video.

Each is fitted on training records. A model that does not beat them has learned nothing from the
videos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np

from vcr1_fast.tasks.record import Record, duration_of

Spans = Sequence[Sequence[float]]


def most_common(answers: Iterable[Any]) -> Any:
    """The most frequent answer; of several, the one that sorts first."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], str(answer)))


def mean_box(boxes: Iterable[Sequence[float]]) -> tuple[float, float, float, float] | None:
    """Mean of each side; None without boxes."""
    sides = list(zip(*boxes, strict=True))
    if not sides:
        return None
    x0, y0, x1, y1 = (sum(side) / len(side) for side in sides)
    return x0, y0, x1, y1


def letters(
    train: Sequence[Record], test: Sequence[Record], letter_of: Callable[[Record], str]
) -> dict[str, list[str]]:
    """One letter for each test record, by strategy.

    "most frequent letter" in `train`, and "likeliest option": the one whose text was right most
    often among the times it was offered. A record that is in `train` too does not vote for its
    own option.
    """
    frequent = most_common(map(letter_of, train)) if train else "A"
    offered = Counter(option for record in train for option in record.options)
    right = Counter(
        record.options[ascii_uppercase.index(letter_of(record))]
        for record in train
        if ascii_uppercase.index(letter_of(record)) < len(record.options)
    )
    known = {record.id for record in train}

    def likeliest(record: Record) -> str:
        own = record.options[ascii_uppercase.index(letter_of(record))]
        votes = record.id in known
        rates = [
            (right[option] - (votes and option == own)) / max(offered[option] - votes, 1)
            for option in record.options
        ]
        return ascii_uppercase[rates.index(max(rates))] if rates else frequent

    return {
        "most frequent letter": [frequent] * len(test),
        "likeliest option": [likeliest(record) for record in test],
    }


def constant_spans(
    train: Sequence[Record],
    test: Sequence[Record],
    spans_of: Callable[[Record], Spans],
    steps: int = 40,
) -> dict[str, list[tuple[float, float]]]:
    """One span in seconds for each test record, by strategy.

    "whole video", and "constant span": the fractions [a, b] of the duration, multiples of 1/steps,
    with the best mean IoU on `train`. Where a duration is unknown, the latest second that any
    training answer reaches replaces it.
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
