"""Settings of an evaluation and of a chat."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vcr1_fast.config.section import ConfigError, section
from vcr1_fast.config.sections import LengthConfig, PositionConfig, PromptConfig, ReadingConfig
from vcr1_fast.engines.config import EngineConfig
from vcr1_fast.model.sampling import SamplingConfig
from vcr1_fast.rewards.judge import JudgeConfig


@section
class PlacementConfig(PositionConfig):
    """How a checkpoint is loaded to answer questions."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; "auto": bfloat16 on a GPU, float32 on the CPU."""
    device: str = "auto"
    """torch's name of a device; "auto": the GPU where there is one."""

    def placement(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the model, with "auto" resolved for this machine."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return getattr(torch, dtype), torch.device(device)


@section
class PerceptionConfig:
    """Iterative perception: name the evidence in a first pass, then show it more densely.

    The first `passes` - 1 passes ask for the answer and its evidence. The evidence is then shown
    `density` times as densely as the rest, in the same number of frames. The last pass asks the
    task's own question. For questions with lettered options; other tasks are asked once. See
    perception.py.
    """

    passes: PositiveInt = 1
    """Passes over a clip; 1: no iterative perception."""
    density: Annotated[float, Field(ge=1, le=100)] = 1.5
    """Frame rate inside the evidence divided by that outside; the default is VideoChat-R1.5's."""
    max_spans: PositiveInt = 3
    """Evidence spans that are taken from an answer, the first ones."""


@section
class EvalConfig(ReadingConfig, PlacementConfig, EngineConfig):
    """How records are answered and scored. Decoding is always greedy."""

    max_new_tokens: PositiveInt = 256
    """Tokens of the longest completion."""
    batch_size: PositiveInt = 8
    """Prompts decoded together. Part of the result's identity: padding changes rounding."""
    retry_failed: bool = False
    """Ask again about records whose clip or prompt failed in an earlier run of this folder."""
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    train_records: str | None = None
    """Records on which the blind baseline is fitted; null: the evaluated records themselves."""
    shard_index: NonNegativeInt = 0
    """Number of the shard that this process answers, from 0."""
    shard_count: PositiveInt = 1
    """Shards that the records are split into."""
    restart: bool = False
    """Delete what the output folder holds of another evaluation, rather than refuse to mix them;
    completions are kept where only the judge differs."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges captions: scores depend on it, completions do not."""
    benchmark: str | None = None
    """The published split that the records are, to show published numbers beside ours; null: the
    records' `metadata.benchmark`. Names: see published.json."""
    breakdown: tuple[str, ...] = ("type", "length", "domain")
    """Metadata fields by whose values scores are also shown, where records have them."""
    pictured: NonNegativeInt = 40
    """Records that `predictions.html` shows, with frames; 0: no such page."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the confidence intervals."""
    resamples: PositiveInt = 2000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        ReadingConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        if self.shard_index >= self.shard_count:
            raise ConfigError(
                "shard_index", f"must be in [0, {self.shard_count}), got {self.shard_index}"
            )


@section
class EvalRun:
    """One `vcr1 eval` command: which checkpoint, which records, where to write."""

    records: str
    """Records, JSONL."""
    output: str
    """Folder of the results."""
    model: str | None = None
    """A checkpoint directory, or a hub name."""
    predictions: str | None = None
    """A file of completions to score, in the place of a model."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            given = "neither" if self.model is None else "both"
            raise ConfigError("model", f"expected a model or a file of predictions, got {given}")


@section
class ChatConfig(PromptConfig, LengthConfig, PlacementConfig):
    """One `vcr1 chat` command."""

    model: str
    """A checkpoint directory, or a hub name."""
    video: str | None = None
    """File, or folder of frames."""
    image: tuple[str, ...] = ()
    """Images, shown after the video where there is one."""
    question: tuple[str, ...] = ()
    """Asked one after the other; none: lines of the standard input."""
    start: float | None = None
    """Second of the video from which it is shown; null: its start."""
    end: float | None = None
    """Second of the video up to which it is shown; null: its end."""
    folder_fps: PositiveFloat | None = None
    """Frames per second of a folder of images, which holds no rate itself."""
    temperature: NonNegativeFloat = 0.0
    """Logits are divided by this before sampling; 0 takes the most likely token."""
    seed: int = 0
    """Seed of sampling."""

    def sampling(self) -> SamplingConfig:
        """How answers are sampled."""
        return SamplingConfig(
            temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens
        )
