"""Spatial grounding: the box of an object, corners from 0 to 1, in an image or a still clip."""

from typing import Any

from vcr1_fast.rewards import box_ious
from vcr1_fast.rewards.spatiotemporal import parse_box
from vcr1_fast.tasks.blind import mean_box
from vcr1_fast.tasks.record import FieldError, check_box
from vcr1_fast.tasks.single_answer import SingleAnswer
from vcr1_fast.tasks.written import box_text


def _is_box(answer: Any) -> bool:
    try:
        check_box("answer", answer)
    except FieldError:
        return False
    return True


TASK = SingleAnswer(
    name="spatial_grounding",
    field="question",
    answer_format="with the box [x0, y0, x1, y1] from 0 to 1, "
    "like <answer>[0.10, 0.20, 0.30, 0.40]</answer>",
    metric="IoU",
    read=parse_box,
    write=box_text,
    similarity=box_ious,
    typical=mean_box,
    example=(0.1, 0.2, 0.5, 0.6),
    is_answer=_is_box,
    expected="a box [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1, and y alike",
).task()
