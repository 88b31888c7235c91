"""A task: the question put to the model, how its answer is read, and how it is scored.

Prompt, parser, rewards, metrics and the check of annotations live in one object, so that they
cannot ask for four different things. A completion is parsed once; rewards and metrics then score
the predictions of a whole batch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from vcr1_fast.rewards.caption import Judge, Match, mentions
from vcr1_fast.rewards.format import THINK, scan
from vcr1_fast.tasks.prompt_template import (
    PromptTemplate,
    ask_for_times,
    check_prompt_template,
    example_tags,
)
from vcr1_fast.tasks.record import Record

Metrics = dict[str, float]
"""Metrics of one sample, or their means over a split, by name."""
Columns = dict[str, list[float]]
"""Rewards or metrics by name, one value for each sample of a batch."""

FORMAT = "format"
"""Name of the reward for the tags, which every task has."""
SHARED_TAGS = ("answer", "glue")
"""Tags of VideoChat-R1's prompts. In every task a stray one makes the format wrong."""


class Answer(NamedTuple):
    """A completion after its one parse.

    prediction: the answer as the task reads it, None if it cannot be read. plain: the text is
    exactly the task's blocks. reasoned: it is a `<think>` block and then exactly the task's blocks.
    """

    prediction: Any | None
    plain: bool
    reasoned: bool


class Reward(Protocol):
    """Scores in [0, 1], one for each sample of a batch.

    predictions: None where a completion cannot be read. durations: of the clips in seconds, to clip
    spans to; None where unknown.
    """

    def __call__(
        self,
        predictions: Sequence[Any],
        records: Sequence[Record],
        durations: Sequence[float | None],
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Judged:
    """Scores of a task that a judge decides.

    terms: names of the scores, which are metrics. A term with the name of a reward replaces that
    reward's values; any other becomes a reward where it is given a weight.
    scores(predictions, records, judge): the scores of a batch. All questions go to the judge at
    once.
    """

    terms: tuple[str, ...]
    scores: Callable[[Sequence[Any], Sequence[Record], Judge | Match], Columns]


def every_prediction(prediction: Any) -> bool:
    """Every prediction is complete."""
    return True


@dataclass(frozen=True)
class Task:
    """One task. Functions of a batch take sequences of one length, `records` being the samples'.

    check(record): raises FieldError for a record that does not fit the task.
    prompt_template: the prompts, with placeholders for `fields`: name -> the record's text for it.
    required_placeholders: groups of fields; every prompt must hold one of each group.
    tags: blocks of an answer, in order. target(record): the completion that answers the record
        rightly, without reasoning, for fine-tuning.
    read(blocks, record): the prediction that an answer makes, None if it cannot be read. `blocks`
        maps tags to the text inside, without those that are not there; the record supplies what was
        asked: the options, the number of boxes.
    complete(prediction): whether the format reward counts a prediction as readable.
    rewards: name -> `Reward`, added up with the weight 1 unless others are configured, besides the
        reward "format", which every task has. The first is the measure of accuracy.
    batch_metrics(predictions, records): name -> one value a sample; the means over a split are the
        split's. Nothing is clipped to the clip here, as in the published tables.
    primary: the metric to watch; more is better.
    blind_guesses(train, test): strategy -> one prediction for each test record, made without the
        videos, from the training records alone.
    example: a synthetic record that the task can ask about, to check the task with.
    times(record, duration): seconds of the frames to show; None leaves them to the frame rule.
    spans(record): annotated seconds, which must lie inside the clip. label(record): the right
        choice, whose balance matters. None where a task has none.
    judged: scores that a judge decides, None where none is needed.
    """

    name: str
    check: Callable[[Record], None]
    prompt_template: PromptTemplate
    fields: Mapping[str, Callable[[Record], str]]
    required_placeholders: tuple[tuple[str, ...], ...]
    target: Callable[[Record], str]
    read: Callable[[Mapping[str, str], Record], Any | None]
    rewards: Mapping[str, Reward]
    batch_metrics: Callable[[Sequence[Any], Sequence[Record]], Columns]
    primary: str
    blind_guesses: Callable[[Sequence[Record], Sequence[Record]], Mapping[str, Sequence[Any]]]
    example: Record
    tags: tuple[str, ...] = ("answer",)
    complete: Callable[[Any], bool] = every_prediction
    times: Callable[[Record, float], list[float]] | None = None
    spans: Callable[[Record], Sequence[Sequence[float]]] | None = None
    label: Callable[[Record], str] | None = None
    judged: Judged | None = None

    @property
    def accuracy(self) -> str:
        """Name of the reward that measures how right an answer is."""
        return next(iter(self.rewards))

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of all rewards, the format first."""
        return (FORMAT, *self.rewards)

    @property
    def placeholders(self) -> dict[str, Callable[[Record], str]]:
        """The fields, and the placeholders that every task has."""
        return {**self.fields, "times": ask_for_times}

    def prompt(self, record: Record, think: bool) -> str:
        """The user's text."""
        return self.prompt_template.fill(think, lambda name: self.placeholders[name](record))

    def answer(self, text: str, record: Record) -> Answer:
        """Parse a completion: one scan of its tags, one reading of its blocks."""
        blocks, sequence = scan(text, SHARED_TAGS + self.tags)
        prediction = self.read(blocks, record)
        return Answer(prediction, sequence == self.tags, sequence == (THINK, *self.tags))

    def parse(self, text: str, record: Record) -> Any | None:
        """The prediction of a completion, None if it makes none."""
        return self.answer(text, record).prediction

    def answers(self, texts: Sequence[str], records: Sequence[Record]) -> list[Answer]:
        """Parse a batch of completions."""
        return [self.answer(text, record) for text, record in zip(texts, records, strict=True)]

    def score_batch(
        self,
        answers: Sequence[Answer],
        records: Sequence[Record],
        durations: Sequence[float | None],
        *,
        think: bool | None,
        judged: Mapping[str, list[float]] | None = None,
    ) -> Columns:
        """Every reward of a batch, by name.

        think: whether the format demands reasoning (True), forbids it (False) or allows it (None).
        judged: columns that a judge has decided already; rewards of their names are taken from it.
        """
        given = judged or {}
        predictions = [answer.prediction for answer in answers]
        columns = {FORMAT: [self.format_reward(answer, think) for answer in answers]}
        for name, reward in self.rewards.items():
            values = given[name] if name in given else reward(predictions, records, durations)
            columns[name] = list(map(float, values))
        return columns

    def format_reward(self, answer: Answer, think: bool | None) -> float:
        """1 for exactly the tags asked for around a readable answer; `think`: see `score_batch`."""
        plain, reasoned = think is not True and answer.plain, think is not False and answer.reasoned
        readable = answer.prediction is not None and self.complete(answer.prediction)
        return 1.0 if readable and (plain or reasoned) else 0.0

    def score(
        self,
        text: str,
        record: Record,
        duration: float | None = None,
        think: bool | None = False,
    ) -> dict[str, float]:
        """Every reward of one completion, by name."""
        columns = self.score_batch([self.answer(text, record)], [record], [duration], think=think)
        return {name: values[0] for name, values in columns.items()}

    def metrics(self, prediction: Any, record: Record) -> Metrics:
        """Every metric of one prediction, without a judge."""
        columns = self.batch_metrics([prediction], [record])
        return {name: values[0] for name, values in columns.items()}

    def measure(
        self,
        predictions: Sequence[Any],
        records: Sequence[Record],
        judge: Judge | Match = mentions,
    ) -> Columns:
        """Every metric of a batch; those of a judged task as `judge` decides."""
        if self.judged is not None:
            return self.judged.scores(predictions, records, judge)
        return self.batch_metrics(predictions, records)

    def blind_baselines(
        self, train: Sequence[Record], test: Sequence[Record]
    ) -> dict[str, Metrics]:
        """Mean metrics on `test` of every strategy that ignores the video, fitted on `train`."""
        return {
            strategy: mean_metrics(self.batch_metrics(guesses, test))
            for strategy, guesses in self.blind_guesses(train, test).items()
        }

    def blind_baseline(
        self, train: Sequence[Record], test: Sequence[Record]
    ) -> tuple[str, Metrics]:
        """(strategy, metrics) of the blind baseline with the best primary metric on `test`."""
        return max(
            self.blind_baselines(train, test).items(), key=lambda item: item[1][self.primary]
        )


def mean_metrics(columns: Columns) -> Metrics:
    """Mean of each metric; {} for a batch without samples."""
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def rows(columns: Mapping[str, Sequence[float]], count: int) -> list[dict[str, float]]:
    """The columns of a batch of `count` samples as one dict a sample."""
    if not columns:
        return [{} for _ in range(count)]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def at_least(values: Iterable[float], level: float) -> list[float]:
    """1 for each value that reaches the level, else 0."""
    return [1.0 if value >= level else 0.0 for value in values]


def equal(predictions: Sequence[Any], answers: Sequence[Any]) -> list[float]:
    """1 for each prediction that is the answer, else 0."""
    return [float(p == answer) for p, answer in zip(predictions, answers, strict=True)]


_TAG = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


def check_task(task: Task) -> None:
    """ValueError, naming the task and the fault, for a task that cannot work.

    Checks the round trip: the task asks for the tags that it reads, and its own target of the
    example record parses and earns 1 in the format and in accuracy, with reasoning and without.
    """
    try:
        _check_declaration(task)
        check_prompt_template(task)
        _check_rewards(task)
        for think in (False, True):
            _check_round_trip(task, think)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error


def _check_declaration(task: Task) -> None:
    if not task.tags or len(set(task.tags)) < len(task.tags):
        raise ValueError(f"tags must be at least one name, each once, got {task.tags}")
    for tag in task.tags:
        if tag == THINK or not _TAG.fullmatch(tag):
            raise ValueError(f"tag {tag!r} must be a plain name other than {THINK!r}")
    if not task.rewards or FORMAT in task.rewards:
        raise ValueError(
            f"rewards must hold at least one reward and none named {FORMAT!r}, which every task "
            f"has already; got {list(task.rewards)}"
        )
    unknown = sorted(example_tags(task.prompt_template) - {*task.tags, THINK, "timestep"})
    if unknown:
        raise ValueError(
            f"the prompt asks for <{unknown[0]}>, which the parser does not read: tags are "
            f"{task.tags}"
        )


def _check_rewards(task: Task) -> None:
    """Rewards once took one completion each: (completion, record, duration, think=...)."""
    for name, reward in task.rewards.items():
        names = list(inspect.signature(reward).parameters)
        if "think" in names or names[:1] == ["completion"]:
            raise ValueError(
                f"reward {name!r} takes ({', '.join(names)}): rewards take (predictions, records, "
                "durations), sequences of a batch, and return one number each; the format reward "
                "is the task's own"
            )


def _check_round_trip(task: Task, think: bool) -> None:
    record = task.example
    task.check(record)
    text = task.target(record)
    if think:
        text = f"<{THINK}>so</{THINK}>{text}"
    answer = task.answer(text, record)
    if answer.prediction is None:
        raise ValueError(f"its own target {text!r:.200} cannot be read, with the tags {task.tags}")
    scores = task.score_batch(
        [answer, Answer(None, False, False)], [record] * 2, [None] * 2, think=think
    )
    measured = task.measure([answer.prediction, None], [record] * 2)
    for kind, columns in (("reward", scores), ("metric", measured)):
        for name, values in columns.items():
            if len(values) != 2 or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{kind} {name!r} must be 2 finite numbers for 2 samples, got {values!r:.80}"
                )
    for name in (FORMAT, task.accuracy):
        if scores[name][0] != 1.0:
            raise ValueError(
                f"its own target {text!r:.200} earns {scores[name][0]:g} in {name}, expected 1"
            )
    if task.primary not in measured:
        raise ValueError(f"primary {task.primary!r} is no metric: {', '.join(measured)}")
