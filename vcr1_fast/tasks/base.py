"""What a task is: the question put to the model, how its answer is read, and how it is scored.

Prompt, format reward, parser and the check of what is annotated live in one object, so that they
cannot ask for four different things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vcr1_fast.rewards import well_formed
from vcr1_fast.tasks.record import Record
from vcr1_fast.tasks.wording import Wording

Metrics = dict[str, float]


class Reward(Protocol):
    """Score in [0, 1] of one completion. `duration`: of the clip in seconds, to clip spans to;
    `think`: whether the prompt asked for reasoning, which the format reward then demands."""

    def __call__(
        self, completion: str, record: Record, duration: float | None = None, *, think: bool = False
    ) -> float: ...


class Parser(Protocol):
    """The prediction a completion makes, None if there is none. The record supplies what was asked:
    the options, the number of boxes."""

    def __call__(self, completion: str, record: Record | None = None) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One task.

    check(record): raises FieldError for a record that is not fit for the task.
    wording: the prompts, with gaps for `fields`: name -> the text a record puts there.
    needs: groups of fields of which every prompt must hold one. tags: what the parser reads.
    target(record): the completion that answers it rightly, without reasoning, to fine-tune on.
    rewards: by name. metrics(prediction, record): scores of one sample; their means over a split
    are the split's. primary: the metric to watch.
    blind(train, test): per strategy that never looks at the video, its metrics on `test`.
    times(record, duration): seconds of the frames to show; None leaves them to the frame rule.
    spans(record): annotated seconds, which must lie inside the clip. label(record): the choice that
    is right, whose balance matters. Both None where there are none.
    """

    name: str
    check: Callable[[Record], None]
    wording: Wording
    fields: Mapping[str, Callable[[Record], str]]
    needs: tuple[tuple[str, ...], ...]
    target: Callable[[Record], str]
    parse: Parser
    rewards: Mapping[str, Reward]
    metrics: Callable[[Any, Record], Metrics]
    primary: str
    blind: Callable[[Sequence[Record], Sequence[Record]], dict[str, Metrics]]
    tags: tuple[str, ...] = ("answer",)
    times: Callable[[Record, float], list[float]] | None = None
    spans: Callable[[Record], Sequence[Sequence[float]]] | None = None
    label: Callable[[Record], str] | None = None

    def prompt(self, record: Record, think: bool) -> str:
        """The user's text."""
        return self.wording.fill(think, lambda name: self.fields[name](record))

    def score(
        self, completion: str, record: Record, duration: float | None = None, think: bool = False
    ) -> dict[str, float]:
        """Every reward of one completion, by name."""
        return {
            name: reward(completion, record, duration, think=think)
            for name, reward in self.rewards.items()
        }

    def floor(self, train: Sequence[Record], test: Sequence[Record]) -> tuple[str, Metrics]:
        """(name, metrics) of the blind strategy with the best primary metric on `test`."""
        return max(self.blind(train, test).items(), key=lambda item: item[1][self.primary])


def mean_metrics(samples: Iterable[Metrics]) -> Metrics:
    """Mean of each metric over samples that all have the same ones; {} without samples."""
    samples = list(samples)
    if not samples:
        return {}
    return {name: sum(s[name] for s in samples) / len(samples) for name in samples[0]}


def tagged(completion: str, think: bool, *tags: str) -> bool:
    """Whether the completion is these blocks and nothing else, reasoning before them if asked."""
    return well_formed(completion, ("think", *tags) if think else tags)
