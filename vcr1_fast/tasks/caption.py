"""Captioning: the share of the annotated events that the description tells, and of its own that are
annotated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from vcr1_fast.rewards.caption import Judge, Match, caption_scores, event_recall, mentions
from vcr1_fast.tasks.base import Judged, Metrics, mean_metrics
from vcr1_fast.tasks.record import FieldError, Record, describe, is_text
from vcr1_fast.tasks.single import Single, most_common


def _are_events(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and bool(answer) and all(map(is_text, answer))


def _sentences(events: Sequence[str]) -> str:
    """One sentence an event, as word matching reads it: two neighbours hold all its words."""
    return " ".join(re.sub(r"[.!?;\n]+\s*", ", ", e).strip(" ,") + "." for e in events)


def check(record: Record) -> None:
    """FieldError unless there is an instruction, events, and, if any, a description in words."""
    SINGLE.check(record)
    description = record.metadata.get("description")
    if description is not None and not is_text(description):
        raise FieldError("metadata.description", f"expected a text, got {describe(description)}")


def scores(
    predictions: Sequence[str | None], records: Sequence[Record], judge: Judge | Match = mentions
) -> list[Metrics]:
    """Recall, precision and F1 (DREAM-1k). A caption's own events are held against the annotated
    `metadata["description"]` where there is one, else against the annotated events."""
    found = caption_scores(
        [prediction or "" for prediction in predictions],
        [record.answer for record in records],
        judge,
        references=[
            record.metadata.get("description") or ". ".join(record.answer) for record in records
        ],
    )
    return [{"recall": one.recall, "precision": one.precision, "F1": one.f1} for one in found]


def metrics(prediction: str | None, record: Record) -> Metrics:
    """The scores by word matching, without a model."""
    return scores([prediction], [record])[0]


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """The event that other videos have most often."""
    events = list(chain.from_iterable(record.answer for record in train))
    guess = most_common(events) if events else None
    return {"typical answer": mean_metrics(metrics(guess, record) for record in test)}


SINGLE = Single(
    name="caption",
    field="instruction",
    how="with one sentence for each event, like <answer>A dog runs. It jumps.</answer>",
    measure="recall",
    read=lambda text: text.strip() or None,
    show=_sentences,
    nearness=event_recall,
    typical=most_common,
    fits=_are_events,
    expected="a list of events",
)
TASK = replace(
    SINGLE.task(),
    check=check,
    metrics=metrics,
    blind=blind,
    judged=Judged(("recall", "precision", "F1"), scores),
)
