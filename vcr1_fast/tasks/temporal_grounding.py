"""Temporal grounding: when does an event happen? Answer: `3.5 to 8.0`, in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.rewards import parse_span, span_ious
from vcr1_fast.tasks.base import Columns, Task, at_least
from vcr1_fast.tasks.blind import constant_spans
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import Record, check_prompt, check_span, check_video
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


def read(blocks: Mapping[str, str], record: Record) -> Span | None:
    answer = blocks.get("answer")
    return None if answer is None else parse_span(answer)


def iou_reward(
    predictions: Sequence[Span | None],
    records: Sequence[Record],
    durations: Sequence[float | None],
) -> list[float]:
    """IoU with the annotated span, both clipped to the clip."""
    return span_ious(predictions, [record.answer for record in records], durations)


def metrics(predictions: Sequence[Span | None], records: Sequence[Record]) -> Columns:
    """mIoU, and the recalls at IoU 0.3, 0.5 and 0.7."""
    return recalls(span_ious(predictions, [record.answer for record in records]))


def recalls(ious: list[float]) -> Columns:
    """The metrics of samples with these overlaps."""
    return {"mIoU": ious} | {f"R@{level}": at_least(ious, level) for level in (0.3, 0.5, 0.7)}


def blind_guesses(
    train: Sequence[Record], test: Sequence[Record]
) -> dict[str, list[tuple[float, float]]]:
    """Constant spans."""
    return constant_spans(train, test, lambda record: [record.answer])


TASK = Task(
    name="temporal_grounding",
    check=check,
    prompt_template=ask(
        "When in the video does this happen: {event}?",
        "with start and end in seconds, like <answer>3.5 to 8.0</answer>",
    ),
    fields=FIELDS,
    required_placeholders=(("event",),),
    target=target,
    read=read,
    rewards={"iou": iou_reward},
    batch_metrics=metrics,
    primary="mIoU",
    blind_guesses=blind_guesses,
    example=Record(
        "example", "temporal_grounding", "example.mp4", {"event": "a dog runs"}, [3.5, 8.0]
    ),
    spans=lambda record: [record.answer],
)
