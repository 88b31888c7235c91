"""Temporal grounding of an event that may happen several times: all its spans.

Answer: `[(1.0, 4.5), (7.0, 9.5)]`, in seconds, in the form in which VideoChat-R1.5 writes a single
span; the overlap is that of the unions (QVHighlights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.rewards import parse_spans, span_set_ious
from vcr1_fast.tasks.base import Columns, Task
from vcr1_fast.tasks.blind import Spans, constant_spans
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import Record, check_prompt, check_spans, check_video
from vcr1_fast.tasks.temporal_grounding import FIELDS, recalls
from vcr1_fast.tasks.written import spans_text


def check(record: Record) -> None:
    """A video; `prompt["event"]`, a sentence or a clause; `answer` [[start, end], ...], seconds."""
    check_video(record)
    check_prompt(record, "event")
    check_spans("answer", record.answer)


def target(record: Record) -> str:
    return f"<answer>{spans_text(record.answer)}</answer>"


def read(blocks: Mapping[str, str], record: Record) -> Spans | None:
    answer = blocks.get("answer")
    return None if answer is None else parse_spans(answer.strip())


def iou_reward(
    predictions: Sequence[Spans | None],
    records: Sequence[Record],
    durations: Sequence[float | None],
) -> list[float]:
    """IoU of the unions of the predicted and annotated spans, clipped to the clip."""
    return span_set_ious(predictions, [record.answer for record in records], durations)


def metrics(predictions: Sequence[Spans | None], records: Sequence[Record]) -> Columns:
    """mIoU of the unions, and the recalls at 0.3, 0.5 and 0.7 of it."""
    return recalls(span_set_ious(predictions, [record.answer for record in records]))


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[Spans]]:
    """Constant spans, one for each record."""
    spans = constant_spans(train, test, lambda record: record.answer)
    return {strategy: [[span] for span in guesses] for strategy, guesses in spans.items()}


TASK = Task(
    name="moment_retrieval",
    check=check,
    prompt_template=ask(
        "When in the video does this happen, once or several times: {event}?",
        "with every span in seconds, like <answer>[(1.0, 4.5), (7.0, 9.5)]</answer>",
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
        "example",
        "moment_retrieval",
        "example.mp4",
        {"event": "a dog runs"},
        [[1.0, 4.5], [7.0, 9.5]],
    ),
    spans=lambda record: record.answer,
)
