"""The settings of a training run, for `vcr1 sft` and `vcr1 train`.

The defaults are those of the VideoChat-R1 recipe where it has one.
"""

import math
from dataclasses import field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vcr1_fast.config.section import ConfigError, section
from vcr1_fast.config.sections import LengthConfig, PositionConfig, ReadingConfig
from vcr1_fast.engines.config import EngineConfig
from vcr1_fast.model.attention import Backend
from vcr1_fast.model.sampling import Decoding
from vcr1_fast.ops.grpo.config import GRPOLossConfig
from vcr1_fast.train.reward_config import RewardsConfig

Ratio = Annotated[float, Field(ge=0, le=1)]


@section
class ModelConfig(PositionConfig):
    """The checkpoint that is trained, and how."""

    path: str
    """A checkpoint directory, or its name on the Hugging Face hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights; the optimiser keeps float32 masters."""
    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters, which are trained instead of the weights; 0: no adapters."""
    lora_alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    adapter: str | None = None
    """Folder of a LoRA adapter (peft) to start from; its rank, alpha and layers hold."""
    lora_targets: tuple[str, ...] | None = None
    """Linear layers that get adapters, by the last part of their name; null: the family's."""
    freeze_vision: bool = False
    """Do not train the vision encoder and its projection."""
    vision_cache_mb: NonNegativeInt = 1024
    """MiB of main memory for a frozen vision encoder's clip features, kept over epochs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    attention: Backend = "auto"
    """How a group's completions attend to the prompt they share, see `model/attention.py`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", "must not be empty")
        if self.adapter is not None and self.lora_rank:
            raise ConfigError("lora_rank", "must be 0 with model.adapter, whose own rank holds")
        # Adapters on no layer would train nothing.
        if self.lora_rank and self.lora_targets is not None and not self.lora_targets:
            raise ConfigError("lora_targets", "must name a layer when lora_rank is not 0")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return bool(self.lora_rank) or self.adapter is not None


@section
class DataConfig(ReadingConfig):
    """The records that are trained on, and their order."""

    train: str
    """Records, JSONL."""
    val: str | None = None
    """Records to evaluate on while training, see `run.eval_every`; null: none."""
    difficulty: str | None = None
    """File of lines {"id", "score"}: an earlier model's score on each record, high for easy ones.
    Records without a score are left out, and counted."""
    difficulty_range: tuple[float, float] | None = None
    """Train on records whose score lies strictly between these two."""
    order: Literal["shuffled", "easy_first"] = "shuffled"
    """Order of an epoch; "easy_first": from the highest score to the lowest."""
    order_window: PositiveInt = 64
    """Records of "easy_first" come fewer than this many places from where sorting puts them."""
    cache_mb: NonNegativeInt = 1024
    """MiB of main memory for decoded clips; 0: none are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # A file of scores that nothing reads would be a silent mistake.
        wanted = self.difficulty_range is not None or self.order == "easy_first"
        if wanted != (self.difficulty is not None):
            raise ConfigError(
                "difficulty", "goes with difficulty_range, order: easy_first, or both of them"
            )
        if self.difficulty_range is not None and not (
            self.difficulty_range[0] < self.difficulty_range[1]
        ):
            raise ConfigError("difficulty_range", f"must rise, got {list(self.difficulty_range)}")


@section
class RolloutConfig(LengthConfig, EngineConfig):
    """How completions are sampled. A checkpoint's generation config plays no part."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of one prompt."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by this before sampling, and in the log-probs of the loss."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0: all tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the end-of-turn token."""
    batch_prompts: PositiveInt = 8
    """Prompts decoded together, each with its whole group."""
    decoding: Decoding = "auto"
    """Shapes in the decoding loop; "auto": "static" on a GPU, "dynamic" elsewhere; "graphs" records
    the static ones as CUDA graphs. The completions are the same."""
    gap_mean_limit: PositiveFloat | None = 0.2
    """The run stops at a step whose mean |rollout log-prob - training log-prob| is above this;
    null: at none."""
    gap_max_limit: PositiveFloat | None = None
    """The same for the largest |rollout log-prob - training log-prob| of a token; null: any."""

    ahead: Literal[0, 1] = 0
    """1: a vLLM server samples the next step's completions while this step updates; they are of the
    policy one step before. 0: each step's completions are of its own policy."""
    parity_every: NonNegativeInt | None = None
    """Steps between checks of the engine's log-probs on probes (engines/parity.py), the first one
    before any step; 0: none; null: 50, none for "own", whose tokens are measured in each step."""
    parity_limit: PositiveFloat | None = None
    """Largest difference of a token's log-prob in these checks, above which the run stops; null:
    1e-4 for float32 weights, 0.5 for bfloat16."""

    @property
    def checks_parity_every(self) -> int:
        """`parity_every` with null resolved."""
        if self.parity_every is not None:
            return self.parity_every
        return 0 if self.engine == "own" else 50

    def __post_init__(self) -> None:
        super().__post_init__()
        # An empty text would end every completion before its first token.
        if not all(self.stop):
            raise ConfigError("stop", f"must not hold an empty string, got {list(self.stop)}")
        if self.ahead and (self.engine != "vllm-server" or self.temperature != 1.0):
            raise ConfigError("ahead", "needs engine: vllm-server and temperature: 1")
        if self.engine != "own" and self.temperature < 0.01:
            raise ConfigError(
                "temperature", f"vLLM raises what is below 0.01 to it, got {self.temperature}"
            )


@section
class AdvantageConfig:
    """How rewards become advantages; see `ops.group_advantages`."""

    estimator: Literal["grpo", "rloo", "opo", "gdpo", "reinforce_plus_plus_baseline"] = "grpo"
    """Baseline that a completion's reward is compared with, see `ops.group_advantages`."""
    scale: Literal["group", "batch", "task_ema", "none"] | None = None
    """Divisor of the difference to the mean; null takes the estimator's usual one.
    "task_ema": the running standard deviation of the task's rewards, by which tasks weigh alike
    (OneThinker's EMA-GRPO)."""
    eps: PositiveFloat = 1e-4
    """Added to the standard deviation before the division."""
    ema_decay: Ratio = 0.99
    """Decay per step of the moments of "task_ema"."""
    ema_floor: PositiveFloat = 1e-3
    """Least standard deviation of "task_ema"."""
    ema_guard: PositiveFloat | None = 5.0
    """A group with an advantage above this is divided by its own standard deviation; null: none."""

    def __post_init__(self) -> None:
        # gdpo normalises over the batch itself: a second scale would divide twice.
        if self.estimator == "gdpo" and self.scale in ("batch", "task_ema"):
            raise ConfigError("scale", f"gdpo knows group and none, got {self.scale}")


@section
class OptimConfig:
    """AdamW, its schedule, and how a step is cut up."""

    # A setting that vanished must be an error that names its successor.
    REPLACED: ClassVar = {
        "micro_prompts": "replaced by tokens_per_microbatch, which counts tokens, not prompts",
        "skip_nonfinite": "replaced by max_skipped_updates: 0 stops at the first such step",
    }

    steps: PositiveInt = 1000
    """Rollout steps of `train`, optimiser steps of `sft`."""
    epochs: PositiveFloat | None = None
    """Passes over the records, in the place of `steps`; null: by `steps`."""
    prompts_per_step: PositiveInt = 8
    """Prompts of one step over all processes."""
    tokens_per_microbatch: PositiveInt = 16384
    """Tokens in one forward and backward, a prompt counted once for its group; gradients are
    accumulated. A longer group runs its prompt once and its completions in parts; fewer where
    memory is short."""
    # For devices that other processes use too.
    memory_gib: PositiveFloat | None = None
    """GiB that one forward and backward may take by the planner's estimate; null: all available."""
    inner_epochs: PositiveInt = 1
    """Passes over the rollouts of a step."""
    inner_steps: PositiveInt = 1
    """Optimiser steps per inner epoch; each takes an equal part of the prompts."""
    lr: PositiveFloat = 1e-6
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    final_lr_ratio: Ratio = 0.0
    """Learning rate of the last step divided by `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment; each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient of all parameters is scaled down to this norm."""
    max_skipped_updates: NonNegativeInt = 10
    """Optimiser steps skipped in a row, because loss or gradient was not finite, after which the
    run stops; their completions are in skipped.jsonl."""

    def __post_init__(self) -> None:
        # At 1 a moment never moves, and the bias correction divides by 0.
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", f"must lie in [0, 1), got {list(self.betas)}")
        # Parts of different size would weigh prompts differently.
        if self.prompts_per_step % self.inner_steps:
            raise ConfigError(
                "inner_steps",
                f"must divide prompts_per_step {self.prompts_per_step}, got {self.inner_steps}",
            )


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]


@section
class RunConfig:
    """Where the run writes, and how often."""

    REPLACED: ClassVar = {"tensorboard": "replaced by trackers: [tensorboard], or [] for none"}

    output: str
    """Folder of this run: config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints, model."""
    seed: NonNegativeInt = 0
    """Seed of the prompt order, of sampling and of adapter weights."""
    save_every: NonNegativeInt = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `output`, where there is one."""
    resume_from: str | None = None
    """Checkpoint to start from where `output` has none: a folder step-N of this or another run.
    Data, base model and batch must be the same; other settings may branch off."""
    stop_grace: NonNegativeFloat = 20.0
    """Seconds that a step in progress may still take after SIGTERM, SIGHUP or Ctrl-C before it is
    given up; then the run saves a checkpoint and ends. Several processes always finish the step."""
    log_rollouts_every: NonNegativeInt = 1
    """Steps between those whose completions are written to rollouts.jsonl; 0: never."""
    trackers: tuple[Tracker, ...] | None = None
    """Experiment trackers that get the metrics, samples and settings as well, all through
    accelerate; null: TensorBoard where it is installed. Those named must be installed."""
    project: str = "vcr1"
    """Project of the run in trackers that have projects."""
    track_samples_every: NonNegativeInt = 50
    """Steps between tables of the worst completions, with film strips, in trackers; 0: none."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on `data.val` (greedy answers, metrics `val/...`); also before the
    first step and after the last."""
    eval_records: PositiveInt = 64
    """Records of `data.val` that are answered, at even distances in the file."""
    keep_best: str | None = None
    """Metric of the evaluation, e.g. val/score, by which the best model is kept in `best`; null:
    none is. val/score is the mean over the tasks of each task's metric to watch."""
    patience: NonNegativeInt = 0
    """Evaluations without a better `keep_best` after which the run ends early; 0: never."""
    device: Literal["auto", "cpu"] = "auto"
    """Device of training; "auto": this process's GPU where there is one."""
    parallel: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    """How several processes hold the model: "fsdp" shards weights, gradients and optimiser over all
    of them, "hybrid" over those of a machine, "ddp" keeps a whole copy in each; "auto": "fsdp"."""
    cpu_offload: bool = False
    """Keep the shards of "fsdp" and "hybrid", and the optimiser's work, in main memory."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("output", "must not be empty")
        if self.resume_from is not None and not self.resume:
            raise ConfigError("resume_from", "needs resume: true")
        if self.cpu_offload and self.parallel == "ddp":
            raise ConfigError("cpu_offload", "needs shards: parallel fsdp or hybrid")
        if self.keep_best is not None and not self.keep_best.startswith("val/"):
            raise ConfigError("keep_best", f"must be a metric val/..., got {self.keep_best!r}")
        if self.patience and self.keep_best is None:
            raise ConfigError("patience", "needs keep_best, the metric to watch")


@section
class TrainConfig:
    """One run."""

    ALIASES: ClassVar = {
        "model_name_or_path": "model.path",
        "torch_dtype": "model.dtype",
        "bf16": "model.dtype",
        "lora_r": "model.lora_rank",
        "use_peft": "model.lora_rank",
        "dataset": "data.train",
        "dataset_name": "data.train",
        "train_file": "data.train",
        "output_dir": "run.output",
        "save_steps": "run.save_every",
        "eval_steps": "run.eval_every",
        "eval_dataset": "data.val",
        "val_files": "data.val",
        "load_best_model_at_end": "run.keep_best",
        "metric_for_best_model": "run.keep_best",
        "early_stopping_patience": "run.patience",
        "save_total_limit": "run.keep_checkpoints",
        "resume_from_checkpoint": "run.resume_from",
        "report_to": "run.trackers",
        "log_with": "run.trackers",
        "wandb_project": "run.project",
        "log_completions": "run.log_rollouts_every",
        "learning_rate": "optim.lr",
        "lr_scheduler_type": "optim.schedule",
        "max_steps": "optim.steps",
        "num_train_epochs": "optim.epochs",
        "num_iterations": "optim.inner_epochs",
        "per_device_train_batch_size": "optim.prompts_per_step",
        "train_batch_size": "optim.prompts_per_step",
        "batch_size": "optim.prompts_per_step",
        "gradient_accumulation_steps": "optim.tokens_per_microbatch",
        "num_generations": "rollout.group_size",
        "max_completion_length": "rollout.max_new_tokens",
        "max_response_length": "rollout.max_new_tokens",
        "kl_coef": "loss.beta",
        "epsilon": "loss.eps_low",
        "epsilon_high": "loss.eps_high",
        "reward_funcs": "rewards.functions",
        "reward_weights": "rewards.weights",
        "scale_rewards": "advantage.scale",
        "nframes": "data.frames.num_frames",
    }
    """What other trainers call a setting (TRL, ms-swift, verl, axolotl): our name of it."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: GRPOLossConfig = field(default_factory=lambda: GRPOLossConfig(beta=0.04))
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.run.keep_best is not None and self.data.val is None:
            raise ConfigError("run.keep_best", "needs data.val, the records to evaluate on")
        for name in ("num_items", "num_sequences"):
            if getattr(self.loss, name) is not None:
                raise ConfigError(f"loss.{name}", "is counted by the trainer, not set")
        if self.rollout.ahead and self.loss.rollout_correction in (None, "none"):
            raise ConfigError("rollout.ahead", "needs loss.rollout_correction: it is off-policy")
        if self.rollout.ahead and self.rewards.temporal.rollouts:
            raise ConfigError("rollout.ahead", "does not go with rewards.temporal.rollouts")
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
        if self.optim.epochs is None and self.optim.warmup_steps >= self.optim.steps:
            raise ConfigError(
                "optim.warmup_steps",
                f"must be less than steps {self.optim.steps}, got {self.optim.warmup_steps}",
            )

    def with_steps(self, records: int) -> "TrainConfig":
        """The same run with `optim.steps` counted for so many records, where `optim.epochs` asks
        for that. ConfigError for a warm-up that is as long as the run."""
        epochs, size = self.optim.epochs, self.optim.prompts_per_step
        if epochs is None:
            return self
        # Rounded up: the last step also takes records of the next epoch.
        steps = max(1, math.ceil(epochs * records / size))
        if self.optim.warmup_steps >= steps:
            raise ConfigError(
                "optim.warmup_steps",
                f"must be less than the {steps} steps of {epochs:g} epochs of {records} records, "
                f"got {self.optim.warmup_steps}",
            )
        return replace(self, optim=replace(self.optim, steps=steps))

    @property
    def overlong_limit(self) -> int:
        """Tokens at which a completion is overlong."""
        return self.rewards.overlong_limit or self.rollout.max_new_tokens
