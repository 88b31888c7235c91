"""Temporal grounding: when does an event happen? Answer: `3.5 to 8.0`, in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from vcr1_fast.rewards import strict, temporal_iou
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics
from vcr1_fast.tasks.record import Record, check_prompt, check_span, check_video
from vcr1_fast.tasks.spans import constant_spans
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import span_texts

Span = tuple[float, float]


FIELDS = {"event": lambda record: record.prompt["event"].strip().rstrip(".")}


def check(record: Record) -> None:
    """A video; `prompt["event"]`, a sentence or a clause; `answer` [start, end] in seconds."""
    check_video(record)
    check_prompt(record, "event")
    check_span("answer", record.answer)


def target(record: Record) -> str:
    ((start, end),) = span_texts([record.answer])
    return f"<answer>{start} to {end}</answer>"


def parse(completion: str, record: Record | None = None) -> Span | None:
    return strict.read_span(completion)


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around one readable span, else 0."""
    return strict.span_format(completion, think)


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """IoU with the annotated span, both clipped to the clip."""
    return strict.span_iou(completion, record.answer, duration)


def metrics(prediction: Span | None, record: Record) -> Metrics:
    """mIoU and the recalls at IoU 0.3, 0.5 and 0.7 of one sample; nothing is clipped here, as in
    the published tables."""
    return rates(0.0 if prediction is None else temporal_iou(prediction, record.answer))


def rates(iou: float) -> Metrics:
    """The metrics of one sample whose overlap is `iou`."""
    return {"mIoU": iou} | {f"R@{level}": float(iou >= level) for level in (0.3, 0.5, 0.7)}


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    strategies = constant_spans(train, test, lambda record: [record.answer])
    return {name: mean_metrics(map(metrics, spans, test)) for name, spans in strategies.items()}


TASK = Task(
    name="temporal_grounding",
    check=check,
    wording=ask(
        "When in the video does this happen: {event}?",
        "with start and end in seconds, like <answer>3.5 to 8.0</answer>",
    ),
    fields=FIELDS,
    needs=(("event",),),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "iou": iou_reward},
    metrics=metrics,
    primary="mIoU",
    blind=blind,
    spans=lambda record: [record.answer],
)
