"""Text and clips to the inputs of Qwen2.5-VL.

Value for value what transformers' Qwen2_5_VLProcessor gives on CPU, without torchvision: the chat
template comes from the checkpoint, one `<|video_pad|>` or `<|image_pad|>` of the rendered text
becomes one token per 2 x 2 patches of the clip or image, and the sampling rate of the clip sets
`second_per_grid_ts`. An image is cut like a clip of one frame, which fills both halves of its
temporal patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model import processor as base
from vcr1_fast.model.files import read_json
from vcr1_fast.model.preprocessor import parse_settings, read_sources
from vcr1_fast.model.processor import (
    ClipLike,
    Mrope,
    VideoText,
    read_chat_template,
    read_tokenizer,
)
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions
from vcr1_fast.model.qwen2_5_vl.preprocessor import ImageProcessorConfig, VideoProcessorConfig

__all__ = ["ImageProcessorConfig", "Processor", "VideoProcessorConfig"]


@dataclass(frozen=True, eq=False)
class Processor(base.Processor):
    """Renders, tokenises, cuts into patches and counts positions.

    special: token ids and grid constants of the checkpoint's config.json; video, image: sizes and
    normalisation from its settings files. `video_text` changes nothing: a clip is written alike.
    """

    special: SpecialIds = field(kw_only=True)
    video: VideoProcessorConfig = field(default_factory=VideoProcessorConfig, kw_only=True)
    image: ImageProcessorConfig = field(default_factory=ImageProcessorConfig, kw_only=True)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        mrope: Mrope = "trained",
        video_text: VideoText = "trained",
        image: ImageProcessorConfig | None = None,
        video: VideoProcessorConfig | None = None,
    ) -> "Processor":
        """Read tokenizer, chat template, config.json, video and image settings of a checkpoint.

        Args:
            directory: of the checkpoint.
            mrope: how positions are counted, see `positions.py`.
            video_text: kept for the settings of a run.
            image, video: what the settings files leave open (None: the defaults of transformers),
                and the patch layout they must agree with.

        Raises:
            CheckpointError: naming the missing or unusable file.
        """
        from transformers import Qwen2_5_VLConfig

        directory = Path(directory)
        tokenizer = read_tokenizer(directory)
        sources = read_sources(directory)
        settings = Qwen2_5_VLConfig.from_dict(read_json(directory / "config.json"))
        return cls(
            tokenizer,
            read_chat_template(directory, tokenizer),
            sources,
            mrope=mrope,
            video_text=video_text,
            special=SpecialIds.from_config(settings),
            video=parse_settings(directory, sources, video or VideoProcessorConfig()),
            image=parse_settings(directory, sources, image or ImageProcessorConfig()),
        )

    def with_bounds(self, frames: FrameConfig) -> "Processor":
        return self.with_video(
            min_pixels=frames.min_pixels,
            max_pixels=frames.max_pixels,
            total_pixels=frames.total_pixels,
        ).with_image(**base.image_bounds(frames))

    def expand(
        self, rendered: str, clips: Sequence[ClipLike], grids: Tensor
    ) -> tuple[str, list[int]]:
        """All tokens of a clip are one run."""
        return rendered, (grids.prod(dim=1) // self.video.layout.merge**2).tolist()

    def positions(
        self, ids: Tensor, types: Tensor, videos: Tensor, seconds: Tensor, images: Tensor
    ) -> Tensor:
        return mrope_positions(ids, videos, seconds, images, self.special, mrope=self.mrope)
