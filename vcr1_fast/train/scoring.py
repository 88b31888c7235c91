"""The rewards of a step's completions, worked out while the next ones are drawn.

A judge may take its time: what is sent to it is sent at once for a whole part of the batch, from a
thread of its own, and waited for when the advantages are due. Two kinds of work take their turn
instead: a local model shares the device with the rollout, which may be recording a graph on it; the
released rewards read Python literals, at which CPython 3.11 can fail in two threads at once.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from vcr1_fast.model.judge import open_judge
from vcr1_fast.model.rollout import Rollout
from vcr1_fast.rewards import Judge, score
from vcr1_fast.rewards.judge import ModelJudge
from vcr1_fast.rewards.plugin import UserReward
from vcr1_fast.rewards.shaping import (
    length_bonuses,
    repetition,
    soft_overlong,
    temporal_bonuses,
)
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.reward_config import check_mode

Answer = tuple[Sample, str]


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
    """Scores parts of a step in the background, in the order they came. Use it in a `with`
    statement. `functions`: the user's own; `tasks`: those in the data; `device`: of a local judge.
    ValueError for a task without rewards in the mode asked for."""

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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._parts: list[Future[list[Scored]]] = []

    def submit(
        self,
        samples: Sequence[Sample],
        drawn: Sequence[Rollout],
        shuffled: Sequence[Rollout | None],
    ) -> None:
        """Score the groups of some samples; `shuffled`: their completions on shuffled frames."""
        part = self._thread.submit(self.score, samples, drawn, shuffled)
        if self.config.rewards.judge.kind == "local" or self.config.rewards.mode == "legacy":
            wait([part])
        self._parts.append(part)

    def results(self) -> list[Scored]:
        """All completions submitted since the last call, groups in order."""
        parts, self._parts = self._parts, []
        return [one for part in parts for one in part.result()]

    def take_metrics(self) -> dict[str, float]:
        """Replies of a judge that could not be read since the last call; {} without one."""
        if not isinstance(self.judge, ModelJudge):
            return {}
        count, self.judge.unreadable = self.judge.unreadable, 0
        return {"judge_unreadable": float(count)}

    def score(
        self,
        samples: Sequence[Sample],
        drawn: Sequence[Rollout],
        shuffled: Sequence[Rollout | None],
    ) -> list[Scored]:
        """Rewards of all completions, groups in order."""
        answers = [
            (s, text) for s, one in zip(samples, drawn, strict=True) for text in one.texts[0]
        ]
        mixed = [
            (s, text)
            for s, one in zip(samples, shuffled, strict=True)
            for text in (one.texts[0] if one else ())
        ]
        # Both kinds together, for a judge to be asked once.
        own = own_rewards([*answers, *mixed], self.config, self.judge)
        others = iter(own[len(answers) :])
        rewards = [named for named, _ in own[: len(answers)]]
        self._add_users(answers, rewards)
        scored, first = [], 0
        for sample, one, other in zip(samples, drawn, shuffled, strict=True):
            group = range(first, first + len(one.texts[0]))
            compared = [next(others)[0] for _ in (other.texts[0] if other else ())]
            self._shape(sample, one, [rewards[i] for i in group], compared)
            scored += [self._scored(sample, one, i - first, rewards[i], own[i][1]) for i in group]
            first = group.stop
        return scored

    def _add_users(self, answers: Sequence[Answer], rewards: list[dict[str, float]]) -> None:
        texts, records = [text for _, text in answers], [sample.record for sample, _ in answers]
        durations = [sample.duration for sample, _ in answers]
        for function in self.functions:
            for named, value in zip(rewards, function(texts, records, durations), strict=True):
                if value is not None:
                    named[function.name] = value

    def _shape(
        self,
        sample: Sample,
        one: Rollout,
        rewards: list[dict[str, float]],
        shuffled: list[dict[str, float]],
    ) -> None:
        """Add the terms that are switched on to the rewards of one group."""
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
        i: int,
        rewards: dict[str, float],
        metrics: dict[str, float],
    ) -> Scored:
        task = sample.record.task
        weights = {name: self.config.rewards.weight(task, name) for name in rewards}
        length, finished = len(one.tokens[0][i]), one.finished[0][i]
        return Scored(task, rewards, metrics, length, finished, weights)

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
        self._thread.shutdown(wait=kind is None, cancel_futures=True)


def own_rewards(
    answers: Sequence[Answer], config: TrainConfig, judge: Judge
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(rewards, metrics) of each answer by its task alone; those of a task are scored together."""
    out: list[Any] = [None] * len(answers)
    for name in dict.fromkeys(sample.record.task for sample, _ in answers):
        places = [i for i, (sample, _) in enumerate(answers) if sample.record.task == name]
        part, task = [answers[i] for i in places], TASKS[name]
        records = [sample.record for sample, _ in part]
        metrics = task.measure(
            [task.parse(text, sample.record) for sample, text in part], records, judge
        )
        if config.rewards.mode == "legacy":
            texts, targets = [text for _, text in part], [record.answer for record in records]
            columns = score(name, texts, targets, mode="legacy")
            # Boxes at infinity were NaN when released: such a reward counts as not given.
            rewards = [
                {term: value for term, value in zip(columns, row, strict=True) if value == value}
                for row in zip(*columns.values(), strict=True)
            ]
        else:
            think = config.data.think
            rewards = [task.score(text, s.record, s.duration, think) for s, text in part]
        for place, named, measured in zip(places, rewards, metrics, strict=True):
            for term in task.judged.terms if task.judged else ():
                if term in named or config.rewards.weight(name, term):
                    named[term] = measured[term]
            out[place] = named, measured
    return out
