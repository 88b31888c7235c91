"""Tracking: the box of an object at 8 times, the first one given. Answer: a list of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from vcr1_fast.rewards import box_ious, parse_boxes, track_ious
from vcr1_fast.tasks.base import Columns, Task, at_least
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import (
    FieldError,
    Record,
    check_boxes,
    check_prompt,
    check_video,
    describe,
    is_number,
)
from vcr1_fast.tasks.written import box_text

Boxes = tuple[tuple[float, float, float, float], ...]

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


def read(blocks: Mapping[str, str], record: Record) -> Boxes | None:
    """As many boxes as the record has."""
    answer = blocks.get("answer")
    return None if answer is None else parse_boxes(answer, len(record.answer))


def times(record: Record, duration: float) -> list[float]:
    """Seconds of the annotated boxes within the part to watch: `metadata["times"]`, else equal
    steps from its start to its end. One frame for each box: one without a frame cannot be seen."""
    if (given := record.metadata.get("times")) is not None:
        return [min(float(time), duration) for time in given]
    count = len(record.answer)
    return [duration * i / max(count - 1, 1) for i in range(count)]


def iou_reward(
    predictions: Sequence[Boxes | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """Mean IoU over the boxes after the given first one; an impossible box scores 0."""
    unseen = [None if boxes is None else boxes[1:] for boxes in predictions]
    return track_ious(unseen, [record.answer[1:] for record in records])


def metrics(predictions: Sequence[Boxes | None], records: Sequence[Record]) -> Columns:
    """Average overlap (AO), whether it reaches 0.5 and 0.7 (R), success rates (SR: share of boxes
    with at least that IoU), over all boxes, as published, and over those that the prompt did not
    give ("unseen")."""
    truths = [record.answer for record in records]
    pairs = [
        pair
        for boxes, truth in zip(predictions, truths, strict=True)
        for pair in zip(boxes or [None] * len(truth), truth, strict=True)
    ]
    overlaps = iter(box_ious([box for box, _ in pairs], [box for _, box in pairs]))
    tracks = [list(islice(overlaps, len(truth))) for truth in truths]
    columns: Columns = {}
    for suffix, parts in (("", tracks), ("_unseen", [ious[1:] for ious in tracks])):
        means = [sum(ious) / max(len(ious), 1) for ious in parts]
        columns[f"AO{suffix}"] = means
        for level in (0.5, 0.7):
            columns[f"R@{level}{suffix}"] = at_least(means, level)
            columns[f"SR@{level}{suffix}"] = [
                sum(iou >= level for iou in ious) / max(len(ious), 1) for ious in parts
            ]
    return columns


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[Boxes]]:
    """The first box repeated, and moved by the mean motion of the training tracks."""
    steps = max((len(record.answer) for record in (*train, *test)), default=0)
    offsets = [[_mean_offset(train, step, axis) for axis in range(4)] for step in range(steps)]
    moved = [
        tuple(
            tuple(min(1.0, max(0.0, v + o)) for v, o in zip(record.answer[0], offset, strict=True))
            for offset in offsets[: len(record.answer)]
        )
        for record in test
    ]
    still = [(record.answer[0],) * len(record.answer) for record in test]
    return {"first box repeated": still, "mean motion": moved}


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
    prompt_template=ask(
        "Follow this object: {object}, at first in {box}.",
        "with its {count} boxes [x0, y0, x1, y1] from 0 to 1 at equal time steps, "
        "like <answer>[[0.10, 0.20, 0.30, 0.40], ...]</answer>",
    ),
    fields=FIELDS,
    required_placeholders=(("object",), ("box", "box_list")),
    target=target,
    read=read,
    rewards={"iou": iou_reward},
    batch_metrics=metrics,
    primary="AO_unseen",
    blind_guesses=blind_guesses,
    example=Record(
        "example",
        "tracking",
        "example.mp4",
        {"object": "the dog"},
        [[0.1, 0.2, 0.5, 0.6], [0.2, 0.2, 0.6, 0.6]],
    ),
    times=times,
    spans=lambda record: [[0.0, max(record.metadata.get("times") or [0.0])]],
)
