"""The running spread of each task's rewards, by which their advantages are divided."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class TaskScales:
    """Moments of each task's rewards over the steps, as OneThinker (arXiv 2512.03043) keeps them:

        m1 = decay m1 + (1 - decay) mean(r)     m2 = decay m2 + (1 - decay) mean(r^2)
        std = sqrt(max(m2 - m1^2, floor^2))

    over all of a task's completions of a step, whatever their group; its first step sets them.
    A step's rewards are added before its advantages are divided, as in the authors' code.
    """

    decay: float = 0.99
    floor: float = 1e-3
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By task: (m1, m2). All the state there is; it goes into the checkpoint."""

    def update(self, rewards: Iterable[tuple[str, float]]) -> None:
        """Add a step's (task, reward) of every completion, of all processes."""
        by_task: dict[str, list[float]] = {}
        for task, reward in rewards:
            by_task.setdefault(task, []).append(reward)
        for task, values in by_task.items():
            new = _mean(values), _mean([value * value for value in values])
            old = self.moments.get(task, new)
            self.moments[task] = (
                self.decay * old[0] + (1 - self.decay) * new[0],
                self.decay * old[1] + (1 - self.decay) * new[1],
            )

    def std(self, task: str) -> float:
        """What a task's advantages are divided by. KeyError for one never seen."""
        first, second = self.moments[task]
        return math.sqrt(max(second - first * first, self.floor**2))

    def load(self, moments: Mapping[str, Iterable[float]]) -> None:
        """Go on from moments that a checkpoint holds."""
        self.moments = {task: tuple(pair) for task, pair in moments.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
