"""A thing's span of seconds and its box at every whole second of it, and single boxes.

A tube is written as JSON, as EasyVideoR1 asks for it:

    {"time": [3.5, 8.0], "boxes": {"4": [0.1, 0.2, 0.5, 0.6], "5": [...], ...}}

Its overlap is vIoU (VidSTG, arXiv 2001.06891): the box IoUs of the seconds that both tubes have,
over the seconds that either has. A second that is missing counts as 0, and so does one too many;
the mean over common seconds, which one easy second fills, does not price them.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcr1_fast.rewards.answer import Box, Span, parse_boxes
from vcr1_fast.rewards.overlap import box_iou

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
    """The tube that a text is; None for anything else, numbers that are not finite, an end before
    the start, or a second that is named twice. Linear time; nothing is evaluated."""
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
    rows = {int(second): _row(box, 4) for second, box in boxes.items()}
    if None in rows.values() or len(rows) < len(boxes):  # "4" and "04"
        return None
    return Tube(time, rows)


def tube_iou(prediction: Mapping[int, Box], target: Mapping[int, Box]) -> float:
    """vIoU of boxes by second; 0 where there are none at all. An impossible box scores 0."""
    seconds = prediction.keys() | target.keys()
    common = prediction.keys() & target.keys()
    if not seconds:
        return 0.0
    return math.fsum(box_iou(prediction[s], target[s]) for s in common) / len(seconds)


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
