"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

import torch

from vcr1_fast.data.sampling import FrameConfig


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
    """File of other wordings (YAML or JSON), by task; default: the tasks' own."""
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
    train_records: str | None = None
    """Records on which the no-look floor is fitted; default: the evaluated records themselves."""
    shard_index: int = 0
    shard_count: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    restart: bool = False
    """Delete what the output folder holds of another evaluation, rather than refuse to mix them."""
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "shard_count", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.decode_workers < 0:
            raise ValueError(f"decode_workers must not be negative, got {self.decode_workers}")
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
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return getattr(torch, dtype), torch.device(device)


@dataclass(frozen=True)
class EvalRun:
    """One `vcr1 eval` command: which checkpoint, which records, where to write."""

    model: str
    records: str
    output: str
    eval: EvalConfig = field(default_factory=EvalConfig)
