"""Temporal grounding of what may happen several times: all its spans, as VideoChat-R1.5 writes one.

Answer: `[(1.0, 4.5), (7.0, 9.5)]`, in seconds; overlap is that of the unions (QVHighlights, and
R1.5's grounding, whose list has one span).
"""

from __future__ import annotations

from collections.abc import Sequence

from vcr1_fast.rewards import interval_set_iou, last_block, parse_spans
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics, tagged
from vcr1_fast.tasks.record import Record, check_prompt, check_spans, check_video
from vcr1_fast.tasks.spans import Spans, constant_spans
from vcr1_fast.tasks.temporal_grounding import FIELDS, rates
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import spans_text


def check(record: Record) -> None:
    """A video; `prompt["event"]`, a sentence or a clause; `answer` [[start, end], ...], seconds."""
    check_video(record)
    check_prompt(record, "event")
    check_spans("answer", record.answer)


def target(record: Record) -> str:
    return f"<answer>{spans_text(record.answer)}</answer>"


def parse(completion: str, record: Record | None = None) -> Spans | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_spans(answer.strip())


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around readable spans, else 0."""
    return float(parse(completion) is not None and tagged(completion, think, "answer"))


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """IoU of the unions of the spans given and annotated, clipped to the clip."""
    return interval_set_iou(parse(completion) or (), record.answer, duration)


def metrics(prediction: Spans | None, record: Record) -> Metrics:
    """mIoU of the unions and the recalls at 0.3, 0.5 and 0.7 of it; nothing is clipped."""
    return rates(interval_set_iou(prediction or (), record.answer))


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    strategies = constant_spans(train, test, lambda record: record.answer)
    return {
        name: mean_metrics(metrics([span], one) for span, one in zip(spans, test, strict=True))
        for name, spans in strategies.items()
    }


TASK = Task(
    name="moment_retrieval",
    check=check,
    wording=ask(
        "When in the video does this happen, once or several times: {event}?",
        "with every span in seconds, like <answer>[(1.0, 4.5), (7.0, 9.5)]</answer>",
    ),
    fields=FIELDS,
    needs=(("event",),),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "iou": iou_reward},
    metrics=metrics,
    primary="mIoU",
    blind=blind,
    spans=lambda record: record.answer,
)
