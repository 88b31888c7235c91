"""Rewards of a step's completions, computed while the next ones are sampled.

Judge calls are slow, so each chunk's are sent together from a background thread, and the step waits
for them when the advantages are due. Two kinds of work run in turn with the rollout instead: a
local judge shares the device with the rollout, which may be recording a graph on it; the released
rewards parse Python literals, which CPython 3.11 can fail at in two threads at once.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from vcr1_fast.background import Worker
from vcr1_fast.model.judge import open_judge
from vcr1_fast.model.rollout import Rollout
from vcr1_fast.rewards.caption import Judge
from vcr1_fast.rewards.judge import ModelJudge
from vcr1_fast.rewards.plugin import UserReward
from vcr1_fast.rewards.shaping import (
    length_bonuses,
    repetition,
    soft_overlong,
    temporal_bonuses,
)
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.base import rows
from vcr1_fast.tasks.score import score
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.reward_config import check_mode

Answer = tuple[Sample, str]
"""A sample and one completion of it."""


@dataclass(frozen=True)
class Scored:
    """A completion's rewards by name, its task, its length in tokens, and its task's metrics."""

    task: str
    rewards: dict[str, float]
    metrics: dict[str, float]
    length: int
    finished: bool
    weights: dict[str, float] = field(default_factory=dict)
    """Of the rewards; 1 where none is given."""

    @property
    def total(self) -> float:
        """Weighted sum of the rewards."""
        return math.fsum(self.weights.get(name, 1.0) * r for name, r in self.rewards.items())


class Scoring:
    """Scores chunks of a step in the background, in the order of their submission; a context
    manager.

    functions: the user's rewards. tasks: the tasks in the data. device: of a local judge.
    ValueError for a task without rewards in the configured mode.
    """

    def __init__(
        self,
        config: TrainConfig,
        functions: Sequence[UserReward] = (),
        tasks: Sequence[str] = (),
        device: Any = "cpu",
    ) -> None:
        check_mode(config.rewards, sorted(set(tasks)))
        self.config, self.functions = config, functions
        self.judge = open_judge(config.rewards.judge, device)
        # One thread, so that chunks are scored in order; a judge has its own concurrency.
        self._worker = Worker("rewards")
        self._parts: list[Future[list[Scored]]] = []

    def submit(
        self,
        samples: Sequence[Sample],
        sampled: Sequence[Rollout],
        shuffled: Sequence[Rollout | None],
    ) -> None:
        """Score the groups of a chunk's samples.

        sampled: their completions. shuffled: those sampled with shuffled frames, None for a sample
        without.
        """
        part = self._worker.submit(lambda: self.score(samples, sampled, shuffled))
        if self.config.rewards.judge.kind == "local" or self.config.rewards.mode == "legacy":
            wait([part])
        self._parts.append(part)

    def results(self) -> list[Scored]:
        """All completions submitted since the last call, groups in order."""
        # Emptied first: after an error the next step must not read this step's parts.
        parts, self._parts = self._parts, []
        return [one for part in parts for one in part.result()]

    def take_metrics(self) -> dict[str, float]:
        """Count of the judge's unreadable replies since the last call; {} without a model judge."""
        if not isinstance(self.judge, ModelJudge):
            return {}
        count, self.judge.unreadable = self.judge.unreadable, 0
        return {"judge_unreadable": float(count)}

    def score(
        self,
        samples: Sequence[Sample],
        sampled: Sequence[Rollout],
        shuffled: Sequence[Rollout | None],
    ) -> list[Scored]:
        """Rewards of all completions, groups in order."""
        answers = [
            (s, text) for s, one in zip(samples, sampled, strict=True) for text in one.texts[0]
        ]
        mixed = [
            (s, text)
            for s, one in zip(samples, shuffled, strict=True)
            for text in (one.texts[0] if one else ())
        ]
        # Both kinds together, so that the judge gets one batch of requests.
        own = own_rewards([*answers, *mixed], self.config, self.judge)
        # The shuffled completions follow, in the order of their samples.
        others = iter(own[len(answers) :])
        rewards = [named for named, _ in own[: len(answers)]]
        self._add_users(answers, rewards)
        scored, first = [], 0
        for sample, one, other in zip(samples, sampled, shuffled, strict=True):
            group = range(first, first + len(one.texts[0]))
            compared = [next(others)[0] for _ in (other.texts[0] if other else ())]
            self._shape(sample, one, [rewards[i] for i in group], compared)
            last = group.stop
            scored += self._scored(sample, one, rewards[first:last], own[first:last])
            first = last
        return scored

    def _add_users(self, answers: Sequence[Answer], rewards: list[dict[str, float]]) -> None:
        texts, records = [text for _, text in answers], [sample.record for sample, _ in answers]
        durations = [sample.duration for sample, _ in answers]
        for function in self.functions:
            for named, value in zip(rewards, function(texts, records, durations), strict=True):
                if value is not None:  # no column: 0 would be a score
                    named[function.name] = value

    def _shape(
        self,
        sample: Sample,
        one: Rollout,
        rewards: list[dict[str, float]],
        shuffled: list[dict[str, float]],
    ) -> None:
        """Add the configured shaping terms to the rewards of one group."""
        settings = self.config.rewards
        lengths = list(map(len, one.tokens[0]))
        for named, text, length in zip(rewards, one.texts[0], lengths, strict=True):
            if settings.overlong_buffer:
                named["overlong"] = soft_overlong(
                    length, self.config.overlong_limit, settings.overlong_buffer
                )
            if settings.repetition_ngram:
                named["repetition"] = repetition(text, settings.repetition_ngram)
        if not (settings.length_bonus or shuffled):
            return
        # Unweighted: bonuses are for right answers, whatever an answer's reward weighs.
        right = TASKS[sample.record.task].accuracy
        accuracies = [named.get(right, 0.0) for named in rewards]
        if settings.length_bonus:
            bonuses = length_bonuses(
                lengths,
                accuracies,
                bonus=settings.length_bonus,
                band=settings.length_band,
                threshold=settings.threshold,
            )
            for named, bonus in zip(rewards, bonuses, strict=True):
                named["length"] = bonus
        if shuffled:
            bonuses = temporal_bonuses(
                accuracies,
                [named.get(right, 0.0) for named in shuffled],
                bonus=settings.temporal.bonus,
                ratio=settings.temporal.ratio,
                threshold=settings.threshold,
            )
            for named, bonus in zip(rewards, bonuses, strict=True):
                named["temporal"] = bonus

    def _scored(
        self,
        sample: Sample,
        one: Rollout,
        rewards: Sequence[dict[str, float]],
        own: Sequence[tuple[dict[str, float], dict[str, float]]],
    ) -> list[Scored]:
        """The completions of one group."""
        task = sample.record.task
        # Once per group: the lookup by task and name is the same for all of its completions.
        known = dict.fromkeys(name for named in rewards for name in named)
        weights = {name: self.config.rewards.weight(task, name) for name in known}
        return [
            Scored(task, named, metrics, len(tokens), finished, {n: weights[n] for n in named})
            for named, (_, metrics), tokens, finished in zip(
                rewards, own, one.tokens[0], one.finished[0], strict=True
            )
        ]

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and isinstance(self.judge, ModelJudge):
            self.judge.close()  # or the exit would wait for its replies
        # After an error the queued parts are dropped. A part that runs ends with the process.
        for part in self._parts:
            part.cancel()


def own_rewards(
    answers: Sequence[Answer], config: TrainConfig, judge: Judge
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(rewards, metrics) of each answer by its task alone.

    Each completion is parsed once, and the predictions of a task are scored together.
    """
    places: dict[str, list[int]] = {}
    for i, (sample, _) in enumerate(answers):
        places.setdefault(sample.record.task, []).append(i)
    # By place: scoring goes by task, results by sample.
    out: list[Any] = [None] * len(answers)
    for name, indices in places.items():
        part = _task_rewards(name, [answers[i] for i in indices], config, judge)
        for i, scored in zip(indices, part, strict=True):
            out[i] = scored
    return out


def _task_rewards(
    name: str, part: Sequence[Answer], config: TrainConfig, judge: Judge
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """(rewards, metrics) of the answers to one task."""
    task, texts = TASKS[name], [text for _, text in part]
    records = [sample.record for sample, _ in part]
    durations = [sample.duration for sample, _ in part]
    parsed = task.answers(texts, records)
    metrics = task.measure([answer.prediction for answer in parsed], records, judge)
    terms = task.judged.terms if task.judged else ()
    if config.rewards.mode == "legacy":
        targets = [record.answer for record in records]
        columns = score(name, texts, targets, mode="legacy")
    else:
        judged = {term: metrics[term] for term in terms}
        columns = task.score_batch(
            parsed, records, durations, think=config.data.think, judged=judged
        )
    for term in terms:
        if term in columns or config.rewards.weight(name, term):
            columns[term] = metrics[term]
    rewards = rows(columns, len(part))
    if config.rewards.mode == "legacy":
        # Released boxes at infinity score NaN: such a reward counts as not given.
        rewards = [{term: v for term, v in named.items() if v == v} for named in rewards]
    return zip(rewards, rows(metrics, len(part)), strict=True)
