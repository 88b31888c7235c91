"""Spatio-temporal grounding: when an object is seen, and its box at every whole second of that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vcr1_fast.rewards import span_ious
from vcr1_fast.rewards.spatiotemporal import MAX_SECONDS, Tube, parse_tube, tube_ious
from vcr1_fast.tasks.base import Columns, Task, at_least
from vcr1_fast.tasks.blind import constant_spans, mean_box
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import (
    FieldError,
    Record,
    check_box,
    check_keys,
    check_prompt,
    check_span,
    check_video,
    describe,
)
from vcr1_fast.tasks.temporal_grounding import FIELDS
from vcr1_fast.tasks.written import box_text, span_texts


def check(record: Record) -> None:
    """A video; `prompt["event"]`; `answer` {"time": [start, end], "boxes": {"4": [x0, y0, x1, y1],
    ...}}: seconds, and boxes from 0 to 1 by whole seconds within a second of that span."""
    check_video(record)
    check_prompt(record, "event")
    answer = record.answer
    check_keys("answer", answer, {"time": "[start, end]", "boxes": "{second: box}"})
    check_span("answer.time", answer["time"])
    start, end = answer["time"]
    if not isinstance(answer["boxes"], dict) or not answer["boxes"]:
        reason = f"expected boxes by second, got {describe(answer['boxes'])}"
        raise FieldError("answer.boxes", reason)
    if len(answer["boxes"]) > MAX_SECONDS:
        reason = f"expected at most {MAX_SECONDS} boxes, got {len(answer['boxes'])}"
        raise FieldError("answer.boxes", reason)
    for second, box in answer["boxes"].items():
        where = f"answer.boxes.{second}"
        # More than six digits are no second of a video, and thousands of them no integer.
        whole = isinstance(second, str) and second.isascii() and second.isdecimal()
        whole = whole and len(second) <= 6
        if not whole or not start - 1 < int(second) < end + 1:
            raise FieldError(where, f"expected a whole second of {start:g} to {end:g}")
        check_box(where, box)


def truth(record: Record) -> Tube:
    """The annotated tube."""
    boxes = {int(second): tuple(box) for second, box in record.answer["boxes"].items()}
    return Tube(tuple(record.answer["time"]), boxes)


def target(record: Record) -> str:
    tube = truth(record)
    boxes = ", ".join(
        f'"{second}": {box_text(tube.boxes[second])}' for second in sorted(tube.boxes)
    )
    ((start, end),) = span_texts([tube.time])
    return f'<answer>{{"time": [{start}, {end}], "boxes": {{{boxes}}}}}</answer>'


def read(blocks: Mapping[str, str], record: Record) -> Tube | None:
    answer = blocks.get("answer")
    return None if answer is None else parse_tube(answer)


def iou_reward(
    predictions: Sequence[Tube | None],
    records: Sequence[Record],
    durations: Sequence[float | None] | None = None,
) -> list[float]:
    """IoU of the spans, both clipped to the clip."""
    spans = [tube.time if tube else None for tube in predictions]
    return span_ious(spans, [record.answer["time"] for record in records], durations)


def tube_reward(
    predictions: Sequence[Tube | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """vIoU: box IoU over all seconds that either tube has; one without a partner counts as 0."""
    boxes = [tube.boxes if tube else None for tube in predictions]
    return tube_ious(boxes, [truth(record).boxes for record in records])


def metrics(predictions: Sequence[Tube | None], records: Sequence[Record]) -> Columns:
    """m_tIoU, m_vIoU, and the rates of vIoU at 0.3 and 0.5, as VidSTG and HC-STVG report them."""
    tubes = tube_reward(predictions, records)
    rates = {f"vIoU@{level}": at_least(tubes, level) for level in (0.3, 0.5)}
    return {"m_tIoU": iou_reward(predictions, records), "m_vIoU": tubes, **rates}


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[Tube]]:
    """Every constant span, with the mean box of the training answers at its whole seconds."""
    seen = [box for record in train for box in record.answer["boxes"].values()]
    mean = mean_box(seen) or (0.0, 0.0, 1.0, 1.0)
    spans = constant_spans(train, test, lambda record: [record.answer["time"]])
    return {
        f"{strategy}, mean box": [
            Tube((s, e), dict.fromkeys(range(math.ceil(s), math.floor(e) + 1), mean))
            for s, e in guesses
        ]
        for strategy, guesses in spans.items()
    }


TASK = Task(
    name="spatio_temporal_grounding",
    check=check,
    prompt_template=ask(
        "When and where in the video is this: {event}?",
        "with its seconds and its box [x0, y0, x1, y1] from 0 to 1 at each whole second, like "
        '<answer>{{"time": [3.5, 4.8], "boxes": {{"4": [0.10, 0.20, 0.30, 0.40]}}}}</answer>',
    ),
    fields=FIELDS,
    required_placeholders=(("event",),),
    target=target,
    read=read,
    rewards={"iou": iou_reward, "tube_iou": tube_reward},
    batch_metrics=metrics,
    primary="m_vIoU",
    blind_guesses=blind_guesses,
    example=Record(
        "example",
        "spatio_temporal_grounding",
        "example.mp4",
        {"event": "a dog runs"},
        {"time": [3.5, 4.8], "boxes": {"4": [0.1, 0.2, 0.5, 0.6]}},
    ),
    spans=lambda record: [record.answer["time"]],
)
