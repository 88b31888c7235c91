"""Overlap of spans and boxes, in plain Python floats.

Every measure lies in [0, 1] and is 0 for anything that has no extent: an inverted or empty span, a
box with x1 <= x0, and every number that is not finite. Nothing raises on a prediction's values.
"""

import math
from collections.abc import Iterable, Sequence

Span = Sequence[float]
Box = Sequence[float]


def _merged(spans: Iterable[Span], duration: float | None) -> list[tuple[float, float]]:
    """Disjoint sorted spans with the same union, clipped to [0, duration]; empty ones dropped."""
    clipped = []
    for start, end in spans:
        if not (math.isfinite(start) and math.isfinite(end)):
            continue
        start = max(start, 0.0)
        end = end if duration is None else min(end, duration)
        if start < end:
            clipped.append((float(start), float(end)))
    merged: list[tuple[float, float]] = []
    for start, end in sorted(clipped):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(merged: Sequence[tuple[float, float]]) -> float:
    return math.fsum(end - start for start, end in merged)


def _intersection(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    total, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        total.append(max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0])))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return math.fsum(total)


def _ratio(part: float, whole: float) -> float:
    # Rounding of the sums can put the ratio an ulp above one.
    return min(1.0, part / whole) if whole > 0.0 and math.isfinite(whole) else 0.0


def interval_set_iou(
    prediction: Iterable[Span], target: Iterable[Span], duration: float | None = None
) -> float:
    """Intersection over union of two sets of spans in seconds, each taken as its spans' union.

    Both are clipped to [0, duration] first: annotations that run past the end of the video would
    otherwise cap the score of a right answer.
    """
    p, t = _merged(prediction, duration), _merged(target, duration)
    common = _intersection(p, t)
    return _ratio(common, _length(p) + _length(t) - common)


def interval_set_iop(
    prediction: Iterable[Span], target: Iterable[Span], duration: float | None = None
) -> float:
    """Intersection over prediction: how much of the evidence given is evidence (NExT-GQA's IoP)."""
    p, t = _merged(prediction, duration), _merged(target, duration)
    return _ratio(_intersection(p, t), _length(p))


def temporal_iou(prediction: Span, target: Span, duration: float | None = None) -> float:
    """Intersection over union of two (start, end) spans in seconds, clipped to [0, duration]."""
    return interval_set_iou([prediction], [target], duration)


def box_iou(prediction: Box, target: Box) -> float:
    """Area of intersection over area of union of two (x0, y0, x1, y1) boxes in 0..1.

    0 when either leaves the frame, is inverted or empty, or is not finite.
    """
    if not (_is_box(prediction) and _is_box(target)):
        return 0.0
    width = min(prediction[2], target[2]) - max(prediction[0], target[0])
    height = min(prediction[3], target[3]) - max(prediction[1], target[1])
    common = max(0.0, width) * max(0.0, height)
    return _ratio(common, _area(prediction) + _area(target) - common)


def track_iou(prediction: Sequence[Box], target: Sequence[Box]) -> float:
    """Mean of box_iou over the target's boxes, 0 unless there are as many predicted ones."""
    if len(prediction) != len(target) or not target:
        return 0.0
    return math.fsum(map(box_iou, prediction, target)) / len(target)


def _is_box(box: Box) -> bool:
    # Comparisons with NaN are false, so this refuses it along with infinities and inverted boxes.
    return 0.0 <= box[0] < box[2] <= 1.0 and 0.0 <= box[1] < box[3] <= 1.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
