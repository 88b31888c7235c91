"""Settings that several commands share, each declared and documented here only."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from vcr1_fast.config.section import ConfigError, section
from vcr1_fast.data.sampling import FrameConfig


@section
class PromptConfig:
    """How a clip is shown."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    system: str | None = None
    """System prompt; null: none."""
    media_first: bool = False
    """Show the video or image before the question, as VideoChat-R1.5 does, rather than after it."""
    decoder: Literal["decord", "pyav"] = "pyav"
    """Package that decodes videos."""


@section
class ReadingConfig(PromptConfig):
    """Which records and clips are read, and how the model is asked about them."""

    media_root: str | None = None
    """Folder that media paths are relative to; null: the folder of the records file."""
    inside_root: bool = False
    """Quarantine records whose media lie outside `media_root`, symbolic links followed."""
    columns: dict[str, str] | None = None
    """Column of the records file for each of our fields that has another name there, e.g.
    {video: video_path, prompt.question: q}; null: the fields' own names."""
    tasks: tuple[str, ...] | None = None
    """Use the records of these tasks only; null: all tasks in the file. A single one is also the
    task of rows that name none."""
    think: bool = False
    """Ask for reasoning before the answer."""
    prompts: str | None = None
    """File of other prompt wordings (YAML or JSON), by task; null: the tasks' own."""
    decode_workers: NonNegativeInt = 2
    """Processes that decode clips ahead; 0 decodes in the main process, without a time-out."""
    decode_timeout: PositiveFloat = 60.0
    """Seconds that a clip may take before it is quarantined."""
    prefetch_mb: PositiveInt = 1024
    """MiB of clips decoded ahead, and of what is made of them on the device; the clip that is
    waited for may exceed them."""
    cache_dir: str | None = None
    """Folder in which decoded and resized clips are kept over runs and shared by processes; null:
    none. Videos that change and other settings are noticed."""
    cache_dir_gib: PositiveFloat = 20.0
    """GiB of that folder at most; the clips used longest ago are removed."""
    resize: Literal["auto", "worker", "device"] = "auto"
    """Where frames get the model's size: by the CPU in the process that decodes them, or with
    normalisation and patches in one kernel on the model's device, ahead of the step. The patches
    are the same. "auto": the device if it is a GPU that our CUDA kernels run on, and there is no
    `cache_dir`, which keeps frames in the model's size."""

    def __post_init__(self) -> None:
        if self.tasks is not None and not self.tasks:
            raise ConfigError("tasks", "must not be an empty list")

    @property
    def resized_by(self) -> Literal["auto", "worker", "device"]:
        """`resize`, with "auto" decided where `cache_dir` decides it."""
        return "worker" if self.resize == "auto" and self.cache_dir is not None else self.resize


@section
class PositionConfig:
    """How a prompt's clips are written and the positions of its tokens are computed."""

    mrope: Literal["trained", "installed"] = "trained"
    """Positions as the checkpoints were trained with, or as the installed transformers has them."""
    video_text: Literal["trained", "installed"] = "trained"
    """Text around a clip's tokens as the checkpoints were trained with, or as the installed
    transformers writes it; `vcr1 doctor` prints where they differ."""


@section
class LengthConfig:
    """Limits of sampled completions."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities reach this sum; 1: all tokens."""
    max_new_tokens: PositiveInt = 1024
    """Tokens of the longest completion."""
