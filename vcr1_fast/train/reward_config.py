"""Settings of the rewards: terms, weights, and the judge of captions."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat

from vcr1_fast.config.section import ConfigError, section
from vcr1_fast.rewards import legacy
from vcr1_fast.rewards.judge import JudgeConfig
from vcr1_fast.rewards.plugin import split_spec
from vcr1_fast.tasks import TASKS

SHAPING = ("overlong", "length", "repetition", "temporal")
"""Columns that any task may have besides its own."""


def flat(values: object) -> object:
    """Nested mappings as one, keys joined by dots: {"tracking": {"format": 1}} becomes
    {"tracking.format": 1}. ConfigError for a name given twice."""
    if not isinstance(values, Mapping):
        return values
    found: dict[str, object] = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else {"": value}
        assert isinstance(inner, dict)
        for rest, item in inner.items():
            key = f"{name}.{rest}" if rest else str(name)
            if key in found:
                raise ConfigError(key, "is given twice")
            found[key] = item
    return found


@section
class TemporalConfig:
    """T-GRPO (Video-R1): a bonus where a clip is understood better than with its frames shuffled.
    See `rewards.shaping.temporal_bonuses`."""

    rollouts: NonNegativeInt = 0
    """Completions sampled on the shuffled clip, for comparison only (Video-R1: half a group);
    0: none, and no bonus."""
    bonus: float = 0.3
    """Added to right completions where the ratio is reached."""
    ratio: float = 0.8
    """The bonus needs a mean accuracy of at least this times that on shuffled frames."""
    tasks: tuple[str, ...] | None = None
    """Tasks that get the bonus; null: all."""

    def __post_init__(self) -> None:
        for name in self.tasks or ():
            if name not in TASKS:
                raise ConfigError("tasks", f"unknown task {name!r}; known: {', '.join(TASKS)}")


@section
class RewardsConfig:
    """The reward of a completion is the weighted sum of its task's rewards, of the terms below that
    are switched on, and of the user's own. The defaults are VideoChat-R1's plain sum."""

    mode: Literal["strict", "legacy"] = "strict"
    """Version of the rewards; "legacy": as released, faults included, for the tasks of
    `rewards.score`."""
    weights: Annotated[dict[str, float], BeforeValidator(flat)] = field(default_factory=dict)
    """Weights by reward ("format"), or by task and reward ("tracking.format", or nested), which
    take precedence; 1 where none is given."""
    functions: tuple[str, ...] = ()
    """The user's own rewards, "module:function" or "file.py:function"; see `rewards.plugin`."""
    timeout: PositiveFloat | None = 600.0
    """Seconds that one of `functions` may take for one batch; null: no bound."""
    threshold: float = 0.1
    """Accuracy above which a completion counts as right, for the two bonuses (Video-R1: 0.1)."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens below the longest completion over which "overlong" falls to -1 (DAPO); 0: off."""
    overlong_limit: int | None = None
    """Tokens at which "overlong" is -1; null: rollout.max_new_tokens."""
    length_bonus: float = 0.0
    """Reward "length" of right completions with a length in the band (Video-R1: 0.2); 0: off."""
    length_band: tuple[int, int] = (320, 512)
    """Fewest and most tokens that earn `length_bonus`."""
    repetition_ngram: NonNegativeInt = 0
    """Words of an n-gram whose repetitions "repetition" penalises, down to -1; 0: off."""
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        # Below the buffer the penalty would start before the first token.
        if self.overlong_limit is not None and self.overlong_limit < max(self.overlong_buffer, 1):
            raise ConfigError(
                "overlong_limit",
                f"must be at least overlong_buffer {self.overlong_buffer} and 1, "
                f"got {self.overlong_limit}",
            )
        if not 0 <= self.length_band[0] <= self.length_band[1]:
            raise ConfigError("length_band", f"must be a range, got {list(self.length_band)}")
        # Rewards are columns by name: a second one of a name would replace the first.
        own = self.own_names()
        taken = {*SHAPING, *(name for task in TASKS for name in names_of(task))}
        for i, name in enumerate(own):
            if name in taken or name in own[:i]:
                raise ConfigError("functions", f"two rewards would have the name {name!r}")
        # A misspelt name would leave a reward at weight 1 unnoticed.
        for name in self.weights:
            self._check_name(name)

    def own_names(self) -> list[str]:
        """Column names of `functions`."""
        try:
            return [split_spec(spec)[1] for spec in self.functions]
        except ValueError as error:
            raise ConfigError("functions", str(error)) from None

    def weight(self, task: str, name: str) -> float:
        """Weight of a task's reward. A judge's further scores (a caption's precision and F1)
        count nothing unless they are given a weight."""
        # Added by default, a caption's F1 would count its recall twice.
        default = 0.0 if name not in TASKS[task].reward_names and name in names_of(task) else 1.0
        return self.weights.get(f"{task}.{name}", self.weights.get(name, default))

    def _check_name(self, name: str) -> None:
        task, dot, reward = name.rpartition(".")
        if dot and task not in TASKS:
            raise ConfigError(f"weights.{name}", f"unknown task {task!r}; {', '.join(TASKS)}")
        general = [*SHAPING, *self.own_names()]
        tasks = [task] if dot else list(TASKS)
        known = dict.fromkeys([*(n for t in tasks for n in names_of(t)), *general])
        if reward not in known:
            raise ConfigError(
                f"weights.{name}", f"unknown reward {reward!r}; known: {', '.join(known)}"
            )


def names_of(task: str) -> tuple[str, ...]:
    """Names that a task's rewards may have."""
    judged = TASKS[task].judged
    return tuple(dict.fromkeys([*TASKS[task].reward_names, *(judged.terms if judged else ())]))


def check_mode(config: RewardsConfig, tasks: list[str]) -> None:
    """ValueError where a task has no rewards in the mode asked for."""
    # Found when the run opens, not at the task's first sample.
    missing = [task for task in tasks if task not in legacy.REWARDS]
    if config.mode == "legacy" and missing:
        raise ConfigError(
            "rewards.mode", f"legacy has no rewards for {', '.join(missing)}: none were released"
        )
