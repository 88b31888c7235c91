"""Captioning: the share of the annotated events that a caption states, and of the caption's own
events that are annotated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from vcr1_fast.rewards.caption import Judge, Match, caption_scores, event_recall, mentions
from vcr1_fast.tasks.base import Columns, Judged
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.record import FieldError, Record, describe, is_text
from vcr1_fast.tasks.single_answer import SingleAnswer, each, stripped


def _are_events(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and bool(answer) and all(map(is_text, answer))


def _sentences(events: Sequence[str]) -> str:
    """One sentence an event, as word matching reads it: two neighbours hold all its words."""
    return " ".join(re.sub(r"[.!?;\n]+\s*", ", ", e).strip(" ,") + "." for e in events)


def check(record: Record) -> None:
    """FieldError unless there are an instruction and events, and the description, if any, is a
    text."""
    CAPTION.check(record)
    description = record.metadata.get("description")
    if description is not None and not is_text(description):
        raise FieldError("metadata.description", f"expected a text, got {describe(description)}")


def scores(
    predictions: Sequence[str | None], records: Sequence[Record], judge: Judge | Match = mentions
) -> Columns:
    """Recall, precision and F1 (DREAM-1k). A caption's own events are compared with the annotated
    `metadata["description"]` where there is one, else with the annotated events."""
    found = caption_scores(
        [prediction or "" for prediction in predictions],
        [record.answer for record in records],
        judge,
        references=[
            record.metadata.get("description") or ". ".join(record.answer) for record in records
        ],
    )
    return {
        "recall": [one.recall for one in found],
        "precision": [one.precision for one in found],
        "F1": [one.f1 for one in found],
    }


def metrics(predictions: Sequence[str | None], records: Sequence[Record]) -> Columns:
    """The scores by word matching, without a model."""
    return scores(predictions, records)


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[str | None]]:
    """The most frequent event of the training videos."""
    events = list(chain.from_iterable(record.answer for record in train))
    guess = most_common(events) if events else None
    return {"typical answer": [guess] * len(test)}


CAPTION = SingleAnswer(
    name="caption",
    field="instruction",
    answer_format="with one sentence for each event, like <answer>A dog runs. It jumps.</answer>",
    metric="recall",
    read=stripped,
    write=_sentences,
    similarity=each(event_recall),
    typical=most_common,
    example=("A dog runs.", "It jumps over a fence."),
    is_answer=_are_events,
    expected="a list of events",
)
TASK = replace(
    CAPTION.task(),
    check=check,
    batch_metrics=metrics,
    blind_guesses=blind_guesses,
    judged=Judged(("recall", "precision", "F1"), scores),
)
