"""What a task is: the question put to the model, how its answer is read, and how it is scored.

Prompt, format reward and parser of a task live in one object, so that they cannot ask for three
different things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vcr1_fast.rewards.caption import Judge, Match, mentions

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record


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
class Judged:
    """What a judge decides of a task's predictions.

    terms: names of its scores, which are metrics; one that is a reward's name is that reward too,
    the others become rewards where they are given a weight.
    scores(predictions, records, judge): the scores of a batch, None being a prediction that could
    not be read. All that is asked of the judge is asked at once.
    """

    terms: tuple[str, ...]
    scores: Callable[[Sequence[Any], Sequence[Record], Judge | Match], list[Metrics]]


@dataclass(frozen=True)
class Task:
    """One task.

    prompt(record, think): the user's text.
    target(record): the completion that answers it rightly, without reasoning, to fine-tune on.
    rewards: added up, with the weight 1 unless others are configured. The first that is not the
        format tells how right an answer is.
    metrics(prediction, record): scores of one sample; their means over a split are the split's.
    primary: the metric to watch.
    blind(train, test): per strategy that never looks at the video, its metrics on `test`.
    times(record, duration): seconds of the frames to show; None leaves them to the frame rule.
    judged: what a judge decides, None where none is needed.
    """

    name: str
    prompt: Callable[[Record, bool], str]
    target: Callable[[Record], str]
    parse: Parser
    rewards: Mapping[str, Reward]
    metrics: Callable[[Any, Record], Metrics]
    primary: str
    blind: Callable[[Sequence[Record], Sequence[Record]], dict[str, Metrics]]
    times: Callable[[Record, float], list[float]] | None = None
    judged: Judged | None = None

    @property
    def accuracy(self) -> str:
        """Name of the reward that tells how right an answer is."""
        return next(name for name in self.rewards if name != "format")

    def score(
        self, completion: str, record: Record, duration: float | None = None, think: bool = False
    ) -> dict[str, float]:
        """Every reward of one completion, by name."""
        return {
            name: reward(completion, record, duration, think=think)
            for name, reward in self.rewards.items()
        }

    def measure(
        self,
        predictions: Sequence[Any],
        records: Sequence[Record],
        judge: Judge | Match = mentions,
    ) -> list[Metrics]:
        """`metrics` of a batch; what is for a judge to decide, as `judge` sees it."""
        if self.judged is not None:
            return self.judged.scores(predictions, records, judge)
        return [self.metrics(p, record) for p, record in zip(predictions, records, strict=True)]

    def floor(self, train: Sequence[Record], test: Sequence[Record]) -> tuple[str, Metrics]:
        """(name, metrics) of the blind strategy with the best primary metric on `test`."""
        return max(self.blind(train, test).items(), key=lambda item: item[1][self.primary])


def mean_metrics(samples: Iterable[Metrics]) -> Metrics:
    """Mean of each metric over samples that all have the same ones; {} without samples."""
    samples = list(samples)
    if not samples:
        return {}
    return {name: sum(s[name] for s in samples) / len(samples) for name in samples[0]}


def ask(question: str, think: bool, answer: str) -> str:
    """The question, then how to answer it: `answer` names the content and shows the tags."""
    if not think:
        return f"{question} Reply {answer}."
    return (
        f"{question} First reason step by step inside <think> </think>, giving the times you rely "
        f"on as <timestep>2.0 to 3.5</timestep>. Then reply {answer}."
    )
