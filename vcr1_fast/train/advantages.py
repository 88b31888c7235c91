"""Rewards to advantages: one matrix over all ranks, and the running scale of each task."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vcr1_fast.ops import group_advantages
from vcr1_fast.train.config import AdvantageConfig
from vcr1_fast.train.scoring import Scored


@dataclass
class TaskScales:
    """Running moments of each task's rewards (OneThinker, arXiv 2512.03043):

        m1 = decay m1 + (1 - decay) mean(r)     m2 = decay m2 + (1 - decay) mean(r^2)
        std = sqrt(max(m2 - m1^2, floor^2))

    over all of a task's completions of a step, whatever their group; a task's first step sets them.
    A step's rewards are added before its advantages are divided, as in the authors' code.
    """

    decay: float = 0.99
    floor: float = 1e-3
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By task: (m1, m2). The whole state; it goes into the checkpoint."""

    def update(self, rewards: Iterable[tuple[str, float]]) -> None:
        """Add a step's (task, reward) of every completion, of all ranks."""
        by_task: dict[str, list[float]] = {}
        for task, reward in rewards:
            by_task.setdefault(task, []).append(reward)
        for task, values in by_task.items():
            # fsum: every rank sums the same numbers to the same bits, in whatever order they came.
            first = math.fsum(values) / len(values)
            second = math.fsum(value * value for value in values) / len(values)
            old = self.moments.get(task, (first, second))
            self.moments[task] = (
                self.decay * old[0] + (1 - self.decay) * first,
                self.decay * old[1] + (1 - self.decay) * second,
            )

    def std(self, task: str) -> float:
        """Standard deviation by which a task's advantages are divided. KeyError before its first
        update."""
        first, second = self.moments[task]
        return math.sqrt(max(second - first * first, self.floor**2))

    def load(self, moments: Mapping[str, Iterable[float]]) -> None:
        """Restore the moments of a checkpoint."""
        self.moments = {}
        for task, (first, second) in moments.items():
            self.moments[task] = (first, second)


def advantages_of(
    everyone: Sequence[Scored], config: AdvantageConfig, group_size: int, scales: TaskScales
) -> Tensor:
    """(N,) advantages of all ranks' completions, groups in order; `scales` takes in the step's
    rewards where it is the scale."""
    if not everyone:
        return torch.zeros(0)
    scale: str | None = config.scale
    stds: Tensor | None = None
    if scale == "task_ema":
        # Every rank sees all completions, so all ranks keep the same moments without a collective.
        scales.update((one.task, one.total) for one in everyone)
        stds = torch.tensor([scales.std(one.task) for one in everyone], dtype=torch.float64)
        scale = "given"
    return group_advantages(
        reward_matrix(everyone),
        group_size,
        scale=scale,
        estimator=config.estimator,
        eps=config.eps,
        weights=weight_matrix(everyone),
        lengths=torch.tensor([one.length for one in everyone]),
        stds=stds,
        guard=config.ema_guard if stds is not None else None,
        nan="ignore",
    )


def rank_slice(count: int, rank: int) -> slice:
    """Where this rank's `count` completions lie among those of all ranks."""
    # Ranks differ in length: a quarantined clip is missing on one of them only.
    counts: list[int] = gather_object([count])
    first = sum(counts[:rank])
    return slice(first, first + count)


def reward_matrix(scored: Sequence[Scored]) -> Tensor:
    """(N, R) float64 rewards by completion and name; nan where a task lacks the reward."""
    return _by_name(scored, [one.rewards for one in scored], math.nan)


def weight_matrix(scored: Sequence[Scored]) -> Tensor:
    """(N, R) float64 weights of `reward_matrix`'s rewards."""
    return _by_name(scored, [one.weights for one in scored], 1.0)


def _by_name(
    scored: Sequence[Scored], values: Sequence[Mapping[str, float]], default: float
) -> Tensor:
    # Sorted, so that all ranks build the same columns and sum them in the same order.
    names = sorted({name for one in scored for name in one.rewards})
    rows = [[row.get(name, default) for name in names] for row in values]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(scored), len(names))
