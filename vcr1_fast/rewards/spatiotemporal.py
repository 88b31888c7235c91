"""Tubes, an object's span of seconds with its box at every whole second of it, and single boxes.

A tube is written as JSON, in EasyVideoR1's form:

    {"time": [3.5, 8.0], "boxes": {"4": [0.1, 0.2, 0.5, 0.6], "5": [...], ...}}

Its overlap is vIoU (VidSTG, arXiv 2001.06891): the sum of the box IoUs at the seconds that both
tubes have, divided by the number of seconds that either has. A missing second counts as 0, and so
does a superfluous one; a mean over the common seconds would let one easy second fill the score.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vcr1_fast.rewards.answer import Box, Span, parse_boxes
from vcr1_fast.rewards.overlap import box_ious

MAX_SECONDS = 4096
"""Most boxes of a tube: above an hour."""

_SECOND = re.compile(r"[0-9]{1,6}", re.ASCII)


@dataclass(frozen=True)
class Tube:
    """`time` (start, end) in seconds; `boxes` [x0, y0, x1, y1] from 0 to 1, by whole second."""

    time: Span
    boxes: Mapping[int, Box]


def parse_box(text: str) -> Box | None:
    """One box [x0, y0, x1, y1], with or without the brackets of a list of boxes around it."""
    boxes = parse_boxes(f"[{text}]", 1) or parse_boxes(text, 1)
    return boxes[0] if boxes else None


def parse_tube(text: str) -> Tube | None:
    """Parse a tube; None for any other text, numbers that are not finite, an end before the start,
    or a second that is named twice. Linear time; nothing is evaluated."""
    try:
        content = json.loads(text, parse_int=float, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or set(content) != {"time", "boxes"}:
        return None
    time, boxes = _row(content["time"], 2), content["boxes"]
    if time is None or time[0] > time[1] or not isinstance(boxes, dict) or not boxes:
        return None
    if len(boxes) > MAX_SECONDS or not all(map(_SECOND.fullmatch, boxes)):
        return None
    rows: dict[int, Box] = {}
    for second, box in boxes.items():
        row = _row(box, 4)
        if row is None:
            return None
        rows[int(second)] = (row[0], row[1], row[2], row[3])
    if len(rows) < len(boxes):  # "4" and "04"
        return None
    return Tube((time[0], time[1]), rows)


def tube_ious(
    predictions: Sequence[Mapping[int, Box] | None], targets: Sequence[Mapping[int, Box]]
) -> list[float]:
    """vIoU of each pair of boxes by second; 0 without a prediction, and where there are no boxes at
    all. An impossible box scores 0."""
    pairs = [(one or {}, other) for one, other in zip(predictions, targets, strict=True)]
    common = [sorted(one.keys() & other.keys()) for one, other in pairs]
    overlaps = iter(
        box_ious(
            [one[s] for (one, _), seconds in zip(pairs, common, strict=True) for s in seconds],
            [other[s] for (_, other), seconds in zip(pairs, common, strict=True) for s in seconds],
        )
    )
    # fsum: the mean does not depend on the order of the seconds.
    return [
        math.fsum(islice(overlaps, len(seconds))) / max(len(one.keys() | other.keys()), 1)
        for (one, other), seconds in zip(pairs, common, strict=True)
    ]


def _row(value: Any, length: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != length:
        return None
    good = all(isinstance(v, float) and math.isfinite(v) for v in value)
    return tuple(value) if good else None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")
