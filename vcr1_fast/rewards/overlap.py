"""Overlap of the spans, boxes and tracks of a batch, by the IoU ops in float64 on the CPU.

Every measure lies in [0, 1] and is 0 for anything that has no extent: a prediction that is None, an
inverted or empty span, a box with x1 <= x0, and every number that is not finite. The ops' own rules
differ in two points, so spans and boxes are prepared for them: spans are clipped to the clip, and a
box that leaves the frame [0, 1] counts as empty.

torch is imported where the ops are called: data workers and `vcr1 --help` import the tasks, but
score nothing, and torch costs them seconds and memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Span = Sequence[float]
Box = Sequence[float]
Durations = Sequence[float | None]

_NO_SPAN: Span = (0.0, 0.0)
_NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)


def span_ious(
    predictions: Sequence[Span | None], targets: Sequence[Span], durations: Durations | None = None
) -> list[float]:
    """IoU of each predicted (start, end) with its target, in seconds, clipped to [0, duration].

    durations: of the clips in seconds, None where unknown: only the start is clipped then.
    """
    if not predictions:
        return []
    from vcr1_fast import ops

    ends = _ends(durations, [1] * len(predictions))
    p = _clipped(_rows([span or _NO_SPAN for span in predictions], 2), ends)
    values: list[float] = ops.temporal_iou(p, _clipped(_rows(targets, 2), ends)).tolist()
    return values


def span_set_ious(
    predictions: Sequence[Sequence[Span] | None],
    targets: Sequence[Sequence[Span]],
    durations: Durations | None = None,
) -> list[float]:
    """IoU of two sets of spans in seconds, each taken as its spans' union.

    Both are clipped to [0, duration] first: annotations that run past the end of the video would
    otherwise cap the score of a right answer.
    """
    if not predictions:
        return []
    import torch

    from vcr1_fast import ops

    sides: list[Tensor] = []
    for sets in ([spans or () for spans in predictions], targets):
        counts = list(map(len, sets))
        spans = _rows(list(chain.from_iterable(sets)), 2)
        sides += [
            _clipped(spans, _ends(durations, counts)),
            torch.tensor([0, *accumulate(counts)], dtype=torch.int64),
        ]
    values: list[float] = ops.interval_set_iou(*sides).tolist()
    return values


def box_ious(predictions: Sequence[Box | None], targets: Sequence[Box]) -> list[float]:
    """IoU of each predicted box (x0, y0, x1, y1) with its target, corners from 0 to 1.

    0 when either leaves the frame, is inverted or empty, or is not finite.
    """
    if not predictions:
        return []
    from vcr1_fast import ops

    p = _possible(_rows([box or _NO_BOX for box in predictions], 4))
    values: list[float] = ops.box_iou(p, _possible(_rows(targets, 4))).tolist()
    return values


def track_ious(
    predictions: Sequence[Sequence[Box] | None], targets: Sequence[Sequence[Box]]
) -> list[float]:
    """Mean box IoU along each track, 0 unless there are as many predicted boxes as annotated."""
    if not predictions:
        return []
    import torch

    from vcr1_fast import ops

    steps = max(map(len, targets))
    if steps == 0:
        return [0.0] * len(targets)
    lengths, sides = [], [list[Box](), list[Box]()]
    for prediction, target in zip(predictions, targets, strict=True):
        counts = prediction is not None and len(prediction) == len(target)
        lengths.append(len(target) if counts else 0)
        for side, boxes in zip(sides, (prediction if counts else (), target), strict=True):
            side.extend(boxes or ())
            side.extend([_NO_BOX] * (steps - len(boxes or ())))
    p, t = (_possible(_rows(side, 4)).view(-1, steps, 4) for side in sides)
    values: list[float] = ops.track_iou(p, t, torch.tensor(lengths, dtype=torch.int64)).tolist()
    return values


def span_set_iops(
    predictions: Sequence[Sequence[Span] | None], targets: Sequence[Sequence[Span]]
) -> list[float]:
    """Intersection over prediction: how much of the evidence given is evidence (NExT-GQA's IoP).

    A metric of one benchmark, which nothing trains on: there is no op for it.
    """
    return [_iop(_merged(p or ()), _merged(t)) for p, t in zip(predictions, targets, strict=True)]


def _rows(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """(N, width) float64."""
    import torch

    if not set(map(len, rows)) <= {width}:
        wrong = next(row for row in rows if len(row) != width)
        raise ValueError(f"expected {width} numbers, got {list(wrong)!r:.80}")
    if not rows or not width:
        return torch.empty((len(rows), width), dtype=torch.float64)
    # A flat buffer: torch.tensor on nested lists takes several times as long.
    numbers = array("d", chain.from_iterable(rows))
    return torch.frombuffer(numbers, dtype=torch.float64).view(-1, width)


def _ends(durations: Durations | None, counts: Sequence[int]) -> Tensor | None:
    """End of the clip for each of `counts[i]` spans of sample i; None where no end is known."""
    import torch

    if durations is None or all(one is None for one in durations):
        return None
    known = [math.inf if one is None else one for one in durations]
    return torch.tensor(known, dtype=torch.float64).repeat_interleave(torch.tensor(counts))


def _clipped(spans: Tensor, ends: Tensor | None) -> Tensor:
    """(N, 2) spans within [0, end]; one with a number that is not finite becomes empty."""
    import torch

    finite = spans.isfinite().all(1, keepdim=True)
    start, end = spans.unbind(1)
    end = end if ends is None else torch.minimum(end, ends)
    return torch.where(finite, torch.stack((start.clamp(min=0.0), end), 1), 0.0)


def _possible(boxes: Tensor) -> Tensor:
    """(N, 4) boxes; those that leave the frame, are inverted or are not finite become empty."""
    import torch

    low, high = boxes[:, :2], boxes[:, 2:]
    # Comparisons with NaN are false, so this refuses it along with infinities.
    good = ((low >= 0.0) & (low < high) & (high <= 1.0)).all(1, keepdim=True)
    return torch.where(good, boxes, 0.0)


def _merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Disjoint sorted spans with the same union, from 0 on; empty ones dropped."""
    finite = [span for span in spans if math.isfinite(span[0]) and math.isfinite(span[1])]
    merged: list[tuple[float, float]] = []
    for start, end in sorted((max(start, 0.0), end) for start, end in finite):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _iop(prediction: Sequence[Span], target: Sequence[Span]) -> float:
    length = math.fsum(end - start for start, end in prediction)
    common = math.fsum(
        max(0.0, min(end, e) - max(start, s)) for start, end in prediction for s, e in target
    )
    # Rounding of the sums can put the ratio an ulp above one.
    return min(1.0, common / length) if 0.0 < length < math.inf else 0.0
