"""Tracking: the box of an object at 8 times, the first one given. Answer: a list of boxes."""

from __future__ import annotations

from collections.abc import Sequence

from vcr1_fast.rewards import box_iou, strict
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics
from vcr1_fast.tasks.record import (
    FieldError,
    Record,
    check_boxes,
    check_prompt,
    check_video,
    describe,
    is_number,
)
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import box_text

Box = tuple[float, float, float, float]
Boxes = tuple[Box, ...]

BOXES = 8
"""Boxes of an answer, unless a record has another number of them."""


FIELDS = {
    "object": lambda record: record.prompt["object"].strip(),
    "box": lambda record: box_text(record.answer[0]),
    "box_list": lambda record: str(list(record.answer[0])),  # all decimals, as VideoChat-R1
    "count": lambda record: str(len(record.answer)),
}


def check(record: Record) -> None:
    """A video; `prompt["object"]`, what to follow; `answer` its boxes, the first being the one
    given; `metadata["times"]`, where given, one time in seconds for each."""
    check_video(record)
    check_prompt(record, "object")
    check_boxes("answer", record.answer)
    if len(record.answer) < 2:
        raise FieldError("answer", "expected at least 2 boxes, the first being the given one")
    times = record.metadata.get("times")
    if times is not None and not (
        isinstance(times, list | tuple)
        and len(times) == len(record.answer)
        and all(is_number(time) and time >= 0 for time in times)
    ):
        raise FieldError("metadata.times", f"expected one time a box, got {describe(times)}")


def target(record: Record) -> str:
    return f"<answer>[{', '.join(map(box_text, record.answer))}]</answer>"


def parse(completion: str, record: Record | None = None) -> Boxes | None:
    return strict.read_boxes(completion, len(record.answer) if record else BOXES)


def times(record: Record, duration: float) -> list[float]:
    """Seconds of the annotated boxes within the part to watch: `metadata["times"]`, else equal
    steps from its start to its end. One frame for each box: one without a frame cannot be seen."""
    if (given := record.metadata.get("times")) is not None:
        return [min(float(time), duration) for time in given]
    count = len(record.answer)
    return [duration * i / max(count - 1, 1) for i in range(count)]


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around as many boxes as asked for, else 0."""
    return strict.boxes_format(completion, len(record.answer), think)


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """Mean IoU over the boxes after the given first one; an impossible box scores 0."""
    return strict.boxes_iou(completion, record.answer)


def metrics(prediction: Boxes | None, record: Record) -> Metrics:
    """Average overlap (AO), whether it reaches 0.5 and 0.7 (R), success rates (SR: share of boxes
    with at least that IoU), over all boxes, as published, and over those that the prompt did not
    give ("unseen")."""
    truth = record.answer
    ious = [0.0] * len(truth) if prediction is None else list(map(box_iou, prediction, truth))
    out = {}
    for suffix, part in (("", ious), ("_unseen", ious[1:])):
        out[f"AO{suffix}"] = sum(part) / max(len(part), 1)
        for level in (0.5, 0.7):
            out[f"R@{level}{suffix}"] = float(out[f"AO{suffix}"] >= level)
            out[f"SR@{level}{suffix}"] = sum(iou >= level for iou in part) / max(len(part), 1)
    return out


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """Repeating the first box, and adding to it the mean motion of the training tracks."""
    still, drift = [], []
    steps = max((len(record.answer) for record in (*train, *test)), default=0)
    offsets = [[_mean_offset(train, step, axis) for axis in range(4)] for step in range(steps)]
    for record in test:
        truth = record.answer
        still.append(metrics((truth[0],) * len(truth), record))
        moved = tuple(
            tuple(min(1.0, max(0.0, v + o)) for v, o in zip(truth[0], offset, strict=True))
            for offset in offsets[: len(truth)]
        )
        drift.append(metrics(moved, record))
    return {"first box repeated": mean_metrics(still), "mean motion": mean_metrics(drift)}


def _mean_offset(records: Sequence[Record], step: int, axis: int) -> float:
    shifts = [
        record.answer[step][axis] - record.answer[0][axis]
        for record in records
        if step < len(record.answer)
    ]
    return sum(shifts) / len(shifts) if shifts else 0.0


TASK = Task(
    name="tracking",
    check=check,
    wording=ask(
        "Follow this object: {object}, at first in {box}.",
        "with its {count} boxes [x0, y0, x1, y1] from 0 to 1 at equal time steps, "
        "like <answer>[[0.10, 0.20, 0.30, 0.40], ...]</answer>",
    ),
    fields=FIELDS,
    needs=(("object",), ("box", "box_list")),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "iou": iou_reward},
    metrics=metrics,
    primary="AO_unseen",
    blind=blind,
    times=times,
    spans=lambda record: [[0.0, max(record.metadata.get("times") or [0.0])]],
)
