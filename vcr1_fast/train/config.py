"""Every setting of a training run, for `vcr1 sft` and `vcr1 train` alike.

The defaults are those of the VideoChat-R1 recipe where it has one.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model.attention import Backend
from vcr1_fast.model.sampling import Decoding
from vcr1_fast.ops.grpo_config import GRPOLossConfig
from vcr1_fast.train.build import ConfigError
from vcr1_fast.train.reward_config import RewardsConfig


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(name, f"must be at least {least}, got {getattr(config, name)}")


def _above(config: Any, bound: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > bound:
            raise ConfigError(name, f"must be above {bound}, got {getattr(config, name)}")


def _inside(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(config, name) <= high:
            value = getattr(config, name)
            raise ConfigError(name, f"must lie in [{low}, {high}], got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    path: str
    """A checkpoint directory, or a hub name such as Qwen/Qwen2.5-VL-7B-Instruct."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lora_rank: int = 0
    """0: train the weights themselves; else low-rank adapters of this rank beside them."""
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    freeze_vision: bool = False
    """Leave the vision tower and its projection as they are."""
    vision_cache_mb: int = 1024
    """What a frozen tower made of the clips, held in main memory over epochs, in MiB."""
    gradient_checkpointing: bool = False
    attention: Backend = "auto"
    """How a group's completions attend to the prompt they share, see `model/attention.py`."""
    mrope: Literal["trained", "installed"] = "trained"
    """Positions as the checkpoints were trained with, or as the installed transformers has them."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "lora_rank", "vision_cache_mb")
        _above(self, 0, "lora_alpha")
        if not self.path:
            raise ConfigError("path", "must not be empty")
        if self.lora_rank and not self.lora_targets:
            raise ConfigError("lora_targets", "must name a layer when lora_rank is not 0")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train: str
    """Records, JSONL."""
    media_root: str | None = None
    """Folder that media paths are relative to; default: the records file's own folder."""
    tasks: tuple[str, ...] | None = None
    """Train on these tasks only; default: all tasks in the file."""
    difficulty: str | None = None
    """JSONL of {"id", "score"}: how well an earlier model did on each record, high for easy ones.
    Records without a score are left out, and counted."""
    difficulty_range: tuple[float, float] | None = None
    """Train on records whose score lies strictly between these two."""
    order: Literal["shuffled", "easy_first"] = "shuffled"
    """"easy_first": each epoch from the highest score to the lowest."""
    order_window: int = 64
    """Records of "easy_first" come fewer than so many places from where sorting puts them."""
    think: bool = False
    """Ask for reasoning before the answer."""
    prompts: str | None = None
    """File of other prompt templates (YAML or JSON), by task; default: the tasks' own."""
    media_first: bool = False
    """Show the video or image before the question, as VideoChat-R1.5 does, rather than after it."""
    system: str | None = None
    frames: FrameConfig = field(default_factory=FrameConfig)
    decoder: Literal["decord", "pyav"] = "decord"
    decode_workers: int = 2
    """Processes that read clips ahead; 0 reads in this one, where no time-out can be kept."""
    decode_timeout: float = 60.0
    """Seconds a clip may take before it is quarantined."""
    cache_mb: int = 1024
    """Decoded clips held in memory, in MiB; 0 holds none."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "decode_workers", "cache_mb")
        _above(self, 0, "decode_timeout")
        _at_least(self, 1, "order_window")
        if self.tasks is not None and not self.tasks:
            raise ConfigError("tasks", "must not be an empty list")
        wanted = self.difficulty_range is not None or self.order == "easy_first"
        if wanted != (self.difficulty is not None):
            raise ConfigError(
                "difficulty", "goes with difficulty_range, order: easy_first, or both of them"
            )
        if self.difficulty_range is not None and not (
            self.difficulty_range[0] < self.difficulty_range[1]
        ):
            raise ConfigError("difficulty_range", f"must rise, got {list(self.difficulty_range)}")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled. A checkpoint's generation config plays no part."""

    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the end-of-turn token."""
    batch_prompts: int = 8
    """Prompts decoded together, each with its whole group."""
    decoding: Decoding = "auto"
    """How the decoding loop runs: by "static" shapes on a GPU, "dynamic" ones elsewhere; "graphs"
    records the static ones as CUDA graphs. The completions are the same."""
    gap_mean_limit: float | None = 0.2
    """Mean |rollout log-prob - training log-prob| of a step above which the run stops; null: any.
    """
    gap_max_limit: float | None = None
    """The same for the largest gap of a token."""

    def __post_init__(self) -> None:
        _at_least(self, 2, "group_size")
        _above(self, 0, "temperature")
        _inside(self, 0, 1, "top_p")
        _above(self, 0, "top_p")
        _at_least(self, 0, "top_k")
        _at_least(self, 1, "max_new_tokens", "batch_prompts")
        for name in ("gap_mean_limit", "gap_max_limit"):
            if getattr(self, name) is not None:
                _above(self, 0, name)
        if not all(self.stop):
            raise ConfigError("stop", f"must not hold an empty string, got {list(self.stop)}")


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages; see `ops.group_advantages`."""

    estimator: Literal["grpo", "rloo", "opo", "gdpo", "reinforce_plus_plus_baseline"] = "grpo"
    scale: Literal["group", "batch", "task_ema", "none"] | None = None
    """What the difference to the mean is divided by; null takes the estimator's usual one.
    "task_ema": the running standard deviation of the task's rewards, by which tasks weigh alike
    (OneThinker's EMA-GRPO)."""
    eps: float = 1e-4
    ema_decay: float = 0.99
    """What "task_ema" keeps of its moments from one step to the next."""
    ema_floor: float = 1e-3
    """Least standard deviation of "task_ema"."""
    ema_guard: float | None = 5.0
    """A group with an advantage above this is divided by its own standard deviation; null: none."""

    def __post_init__(self) -> None:
        _above(self, 0, "eps", "ema_floor")
        _inside(self, 0, 1, "ema_decay")
        if self.ema_guard is not None:
            _above(self, 0, "ema_guard")
        if self.estimator == "gdpo" and self.scale in ("batch", "task_ema"):
            raise ConfigError("scale", f"gdpo knows group and none, got {self.scale}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and how a step is cut up."""

    REPLACED: ClassVar = {
        "micro_prompts": "replaced by tokens_per_microbatch, which counts tokens, not prompts"
    }

    steps: int = 1000
    """Rollout steps of `train`, optimiser steps of `sft`."""
    prompts_per_step: int = 8
    """Prompts of one step over all processes."""
    tokens_per_microbatch: int = 16384
    """Tokens in one forward and backward, a prompt counted once for its group; gradients are
    accumulated. A longer group is split by its completions; fewer where memory is short."""
    memory_gib: float | None = None
    """Memory that one forward and backward may take by the planner's estimate; null: what is free.
    """
    inner_epochs: int = 1
    """Times the rollouts of a step are gone through."""
    inner_steps: int = 1
    """Optimiser steps each time; each takes an equal part of the prompts."""
    lr: float = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0
    """Learning rate of the last step over the highest one."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    skip_nonfinite: bool = True
    """Leave out (and count) an optimiser step whose gradient is not finite, rather than stop."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "prompts_per_step", "tokens_per_microbatch")
        _at_least(self, 1, "inner_epochs", "inner_steps")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _above(self, 0, "lr", "eps", "max_grad_norm")
        if self.memory_gib is not None:
            _above(self, 0, "memory_gib")
        _inside(self, 0, 1, "final_lr_ratio")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", f"must lie in [0, 1), got {list(self.betas)}")
        if self.prompts_per_step % self.inner_steps:
            raise ConfigError(
                "inner_steps",
                f"must divide prompts_per_step {self.prompts_per_step}, got {self.inner_steps}",
            )


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, and how often."""

    output: str
    """Folder of this run: config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints, model."""
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    resume: bool = True
    """Go on from the newest whole checkpoint in `output`, where there is one."""
    log_rollouts_every: int = 1
    """Steps between those whose completions are written to rollouts.jsonl; 0: never."""
    tensorboard: bool = True
    device: Literal["auto", "cpu"] = "auto"
    """"auto": this process's GPU where there is one."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "save_every", "log_rollouts_every")
        _at_least(self, 1, "keep_checkpoints")
        if not self.output:
            raise ConfigError("output", "must not be empty")


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: GRPOLossConfig = field(default_factory=lambda: GRPOLossConfig(beta=0.04))
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("num_items", "num_sequences"):
            if getattr(self.loss, name) is not None:
                raise ConfigError(f"loss.{name}", "is counted by the trainer, not set")
        if self.loss.entropy_aggregation != "loss":
            raise ConfigError(
                "loss.entropy_aggregation",
                'must be "loss" here: a mean over each forward pass would change its weight',
            )
        if self.rewards.overlong_buffer > self.overlong_limit:
            raise ConfigError(
                "rewards.overlong_buffer",
                f"must be at most {self.overlong_limit}, got {self.rewards.overlong_buffer}",
            )
        if self.optim.warmup_steps >= self.optim.steps:
            raise ConfigError(
                "optim.warmup_steps",
                f"must be less than steps {self.optim.steps}, got {self.optim.warmup_steps}",
            )

    @property
    def overlong_limit(self) -> int:
        """Tokens at which a completion is overlong."""
        return self.rewards.overlong_limit or self.rollout.max_new_tokens
