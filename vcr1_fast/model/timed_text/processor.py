"""Text and clips to the inputs of a model that reads the times of frames as text.

A clip is written as one line: for each temporal patch, the time at which it is shown and a separate
vision block,

    <0.2 seconds><|vision_start|><|video_pad|>...<|vision_end|><1.3 seconds><|vision_start|>...

The chat template writes <|vision_start|><|video_pad|><|vision_end|> for a clip. transformers 4.57,
by which the checkpoints were trained, and vLLM replace all three by the line above. transformers
5.x replaces the pad token alone, so that an outer start and end token stay around the line: two
tokens that the model has not seen there. `video_text` "trained" is the former, "installed" what
the installed transformers does.

The time of a temporal patch is the mean of its first and last frame's; a last frame without a
partner counts twice. All else is as in the families' processor in transformers, value for value.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model import processor as base
from vcr1_fast.model.preprocessor import parse_settings, read_sources
from vcr1_fast.model.processor import (
    ClipLike,
    Mrope,
    VideoText,
    read_chat_template,
    read_tokenizer,
)
from vcr1_fast.model.timed_text.frames import ClipFrames
from vcr1_fast.model.timed_text.positions import mrope_positions
from vcr1_fast.model.timed_text.preprocessor import ImageProcessorConfig, VideoProcessorConfig

START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
_P = TypeVar("_P", bound="Processor")
_WITH_PAIR = re.compile("|".join(map(re.escape, (START + PAD + END, PAD))))
_PAD_ALONE = re.compile(re.escape(PAD))


@dataclass(frozen=True, eq=False)
class Processor(base.Processor):
    """Renders, tokenises, cuts into patches and counts positions.

    video, image: sizes and normalisation from the checkpoint's settings files. `mrope` changes
    nothing, see `positions.py`. A family says which settings it has where a checkpoint is silent
    (`video_settings`, `image_settings`), and where transformers' processor is (`source`).
    """

    video_settings: ClassVar[type[VideoProcessorConfig]]
    image_settings: ClassVar[type[ImageProcessorConfig]]
    source: ClassVar[str]
    """File of transformers' processor, inside its package."""

    frames: FrameConfig = field(default_factory=ClipFrames)
    video: VideoProcessorConfig = field(kw_only=True)
    image: ImageProcessorConfig = field(kw_only=True)

    @classmethod
    def from_pretrained(
        cls: type[_P],
        directory: str | Path,
        *,
        mrope: Mrope = "trained",
        video_text: VideoText = "trained",
    ) -> _P:
        """Read tokenizer, chat template, video and image settings of a checkpoint directory.
        CheckpointError names the missing or unusable file."""
        directory = Path(directory)
        tokenizer = read_tokenizer(directory)
        sources = read_sources(directory)
        return cls(
            tokenizer,
            read_chat_template(directory, tokenizer),
            sources,
            mrope=mrope,
            video_text=video_text,
            video=parse_settings(directory, sources, cls.video_settings()),
            image=parse_settings(directory, sources, cls.image_settings()),
        )

    def with_bounds(self, frames: FrameConfig) -> "Processor":
        return self.with_video(
            frame_pixels=(frames.min_pixels, frames.max_pixels), total_pixels=frames.total_pixels
        ).with_image(**base.image_bounds(frames))

    def with_frames(self, frames: FrameConfig, *, media_first: bool = False) -> "Processor":
        return super().with_frames(ClipFrames.of(frames), media_first=media_first)

    def expand(
        self, rendered: str, clips: Sequence[ClipLike], grids: Tensor
    ) -> tuple[str, list[int]]:
        """Every temporal patch of a clip is a run, with its time before it."""
        merged = self.video.layout.merge**2
        runs: list[int] = []
        lines: list[str] = []
        for clip, (t, h, w) in zip(clips, grids.tolist(), strict=True):
            runs += [h * w // merged] * t
            if clip.fps is not None:
                times = patch_times(clip, self.video.layout.temporal)
                lines.append("".join(f"<{time:.1f} seconds>{START}{PAD}{END}" for time in times))
        outer_pair = self.video_text == "installed" and installed_keeps_outer_pair(self.source)
        pattern = _PAD_ALONE if outer_pair else _WITH_PAIR
        written = iter(lines)
        return pattern.sub(lambda _: next(written), rendered), runs

    def positions(
        self, ids: Tensor, types: Tensor, videos: Tensor, seconds: Tensor, images: Tensor
    ) -> Tensor:
        return mrope_positions(types, videos, images, merge=self.video.layout.merge)


def patch_times(clip: ClipLike, temporal: int) -> list[float]:
    """Seconds at which each temporal patch of a clip is shown. ValueError for another number of
    times than frames."""
    count = len(clip.frames)
    given = getattr(clip, "times", None)
    if given is None:
        assert clip.fps is not None  # an image has no times
        given = [index / clip.fps for index in range(count)]
    times = [max(float(time), 0.0) for time in given]  # a time stamp may be rounded below 0
    if len(times) != count:
        raise ValueError(f"a clip of {count} frames has {len(times)} times")
    times += times[-1:] * (-count % temporal)
    return [(times[i] + times[i + temporal - 1]) / 2 for i in range(0, len(times), temporal)]


@cache
def installed_keeps_outer_pair(source: str) -> bool:
    """Whether the installed transformers leaves a start and end token around a clip's line: its
    processor, in the file `source`, replaces single placeholder tokens since 5.0.

    Found in the source: importing transformers takes seconds, and `vcr1 doctor` imports nothing.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed")
    text = (Path(spec.origin).parent / source).read_text(encoding="utf-8")
    return "def replace_video_token(" in text


def video_text_row(source: str) -> str:
    """What the settings of `video_text` do with the installed transformers, for `vcr1 doctor`."""
    outer = "with" if installed_keeps_outer_pair(source) else "without"
    return (
        "video_text=trained (default) writes no start/end pair around all temporal patches; "
        f"installed (transformers {metadata.version('transformers')}) writes them {outer} one"
    )
