"""Spatial grounding: the box of a thing, from 0 to 1, in an image or a still clip."""

from typing import Any

from vcr1_fast.rewards import box_iou
from vcr1_fast.rewards.spatiotemporal import parse_box
from vcr1_fast.tasks.record import FieldError, check_box
from vcr1_fast.tasks.single import Single
from vcr1_fast.tasks.written import box_text


def _is_box(answer: Any) -> bool:
    try:
        check_box("answer", answer)
    except FieldError:
        return False
    return True


TASK = Single(
    name="spatial_grounding",
    field="question",
    how="with the box [x0, y0, x1, y1] from 0 to 1, like <answer>[0.10, 0.20, 0.30, 0.40]</answer>",
    measure="IoU",
    read=parse_box,
    show=box_text,
    nearness=box_iou,
    typical=lambda boxes: [sum(sides) / len(boxes) for sides in zip(*boxes, strict=True)],
    fits=_is_box,
    expected="a box [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1, and y alike",
).task()
