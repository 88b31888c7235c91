"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

import torch

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.rewards.judge import JudgeConfig


@dataclass(frozen=True)
class PerceptionConfig:
    """Iterative perception: look at a clip, name the evidence, look again where it is.

    The first `passes` - 1 looks ask for the answer and its evidence; the evidence is then shown
    `density` times as densely as the rest, in as many frames; the last look asks the task's own
    question. For questions with lettered options; other tasks are asked once. See perception.py.
    """

    passes: int = 1
    density: float = 1.5
    """The value of VideoChat-R1.5."""
    max_spans: int = 3
    """Spans taken of an answer, the first ones."""

    def __post_init__(self) -> None:
        for name in ("passes", "max_spans"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1.0 <= self.density <= 100.0:
            raise ValueError(f"density must lie in [1, 100], got {self.density}")


@dataclass(frozen=True)
class EvalConfig:
    """How records are answered and scored. Decoding is always greedy."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    media_root: str | None = None
    """Folder that media paths are relative to; default: the records file's own folder."""
    tasks: tuple[str, ...] | None = None
    """Evaluate these tasks only; default: all tasks in the file."""
    think: bool = False
    """Ask for reasoning before the answer."""
    prompts: str | None = None
    """File of other prompt templates (YAML or JSON), by task; default: the tasks' own."""
    media_first: bool = False
    """Show the video or image before the question, as VideoChat-R1.5 does, rather than after it."""
    system: str | None = None
    max_new_tokens: int = 256
    mrope: Literal["trained", "installed"] = "trained"
    """Positions as the checkpoints were trained with, or as the installed transformers has them."""
    batch_size: int = 8
    """Prompts decoded together. Part of the result's identity: padding changes rounding."""
    decoder: Literal["decord", "pyav"] = "decord"
    decode_workers: int = 2
    """Processes that read clips ahead; 0 reads in this one, where no time-out can be kept."""
    decode_timeout: float = 60.0
    """Seconds a clip may take before it is quarantined."""
    retry_failed: bool = False
    """Ask again about records whose clip or prompt failed in an earlier run of this folder."""
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    train_records: str | None = None
    """Records on which the blind baseline is fitted; default: the evaluated records themselves."""
    shard_index: int = 0
    shard_count: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    restart: bool = False
    """Delete what the output folder holds of another evaluation, rather than refuse to mix them;
    completions are kept where only the judge is another."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges captions: scores depend on it, completions do not."""
    benchmark: str | None = None
    """The published split that the records are, to show published numbers beside ours; default: the
    records' `metadata.benchmark`. Names: see published.json."""
    breakdown: tuple[str, ...] = ("type", "length", "domain")
    """Metadata fields by whose values scores are also told apart, where records have them."""
    pictured: int = 40
    """Records that `predictions.html` shows, with frames; 0: no such page."""
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "shard_count", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decode_workers", "pictured"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.decode_timeout <= 0:
            raise ValueError(f"decode_timeout must be positive, got {self.decode_timeout}")
        if not 0 <= self.shard_index < self.shard_count:
            raise ValueError(
                f"shard_index must be in [0, {self.shard_count}), got {self.shard_index}"
            )
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must be inside (0, 1), got {self.level}")
        for name in ("dtype", "decoder", "mrope"):
            allowed = get_args(get_type_hints(EvalConfig)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def placement(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the model, with "auto" resolved for this machine."""
        return placement(self.dtype, self.device)


def placement(dtype: str, device: str) -> tuple[torch.dtype, torch.device]:
    """dtype and device by name, "auto" being bfloat16 on a GPU where there is one, else float32 on
    the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return getattr(torch, dtype), torch.device(device)


@dataclass(frozen=True)
class EvalRun:
    """One `vcr1 eval` command: which checkpoint, which records, where to write."""

    records: str
    output: str
    model: str | None = None
    predictions: str | None = None
    """A file of completions to score, in the place of a model."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(f"expected a model or a file of predictions, got {given}")
