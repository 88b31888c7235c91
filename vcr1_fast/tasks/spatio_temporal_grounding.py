"""Spatio-temporal grounding: when something is seen, and its box at every whole second of that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vcr1_fast.rewards import last_block, temporal_iou
from vcr1_fast.rewards.spatiotemporal import MAX_SECONDS, Tube, parse_tube, tube_iou
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics, tagged
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
from vcr1_fast.tasks.spans import constant_spans
from vcr1_fast.tasks.temporal_grounding import FIELDS
from vcr1_fast.tasks.wording import ask
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


def parse(completion: str, record: Record | None = None) -> Tube | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_tube(answer)


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around a readable span with boxes, else 0."""
    return float(parse(completion) is not None and tagged(completion, think, "answer"))


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """IoU of the spans, both clipped to the clip."""
    tube = parse(completion)
    return 0.0 if tube is None else temporal_iou(tube.time, record.answer["time"], duration)


def tube_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """vIoU: box IoU over all seconds that either tube has; one without a partner counts as 0."""
    tube = parse(completion)
    return 0.0 if tube is None else tube_iou(tube.boxes, truth(record).boxes)


def metrics(prediction: Tube | None, record: Record) -> Metrics:
    """m_tIoU, m_vIoU, and the rates of vIoU at 0.3 and 0.5, as VidSTG and HC-STVG report them."""
    answer = truth(record)
    time = 0.0 if prediction is None else temporal_iou(prediction.time, answer.time)
    tube = 0.0 if prediction is None else tube_iou(prediction.boxes, answer.boxes)
    rates = {f"vIoU@{level}": float(tube >= level) for level in (0.3, 0.5)}
    return {"m_tIoU": time, "m_vIoU": tube, **rates}


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """Every blind span, with the mean box of the training answers at its whole seconds."""
    seen = [box for record in train for box in record.answer["boxes"].values()]
    mean = tuple(sum(side) / len(seen) for side in zip(*seen, strict=True)) or (0.0, 0.0, 1.0, 1.0)
    out = {}
    for name, spans in constant_spans(train, test, lambda r: [r.answer["time"]]).items():
        tubes = [
            Tube((s, e), dict.fromkeys(range(math.ceil(s), math.floor(e) + 1), mean))
            for s, e in spans
        ]
        out[f"{name}, mean box"] = mean_metrics(map(metrics, tubes, test))
    return out


TASK = Task(
    name="spatio_temporal_grounding",
    check=check,
    wording=ask(
        "When and where in the video is this: {event}?",
        "with its seconds and its box [x0, y0, x1, y1] from 0 to 1 at each whole second, like "
        '<answer>{{"time": [3.5, 4.8], "boxes": {{"4": [0.10, 0.20, 0.30, 0.40]}}}}</answer>',
    ),
    fields=FIELDS,
    needs=(("event",),),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "iou": iou_reward, "tube_iou": tube_reward},
    metrics=metrics,
    primary="m_vIoU",
    blind=blind,
    spans=lambda record: [record.answer["time"]],
)
