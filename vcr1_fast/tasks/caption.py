"""Captioning: the share of the annotated events that the description tells."""

from itertools import chain
from typing import Any

from vcr1_fast.rewards import event_recall
from vcr1_fast.tasks.record import is_text
from vcr1_fast.tasks.single import Single, most_common


def _are_events(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and bool(answer) and all(map(is_text, answer))


TASK = Single(
    name="caption",
    field="instruction",
    how="with one sentence for each event, like <answer>A dog runs. It jumps.</answer>",
    measure="recall",
    read=lambda text: text.strip() or None,
    show=" ".join,
    nearness=event_recall,
    # Events of other videos, the most frequent one.
    typical=lambda answers: most_common(list(chain.from_iterable(answers))),
    fits=_are_events,
    expected="a list of events",
).task()
