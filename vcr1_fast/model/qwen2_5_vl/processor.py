"""Text and clips to the inputs of Qwen2.5-VL.

Value for value what transformers' Qwen2_5_VLProcessor gives on CPU, without torchvision: the chat
template comes from the checkpoint, one `<|video_pad|>` or `<|image_pad|>` of the rendered text
becomes one token per 2 x 2 patches of the clip or image, and the sampling rate of the clip sets
`second_per_grid_ts`. An image is cut like a clip of one frame, which fills both halves of its
temporal patch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model import processor as base
from vcr1_fast.model.files import read_json
from vcr1_fast.model.processor import ClipLike, Mrope, read_chat_template, read_tokenizer
from vcr1_fast.model.prompt import IMAGE, VIDEO, Prompt
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions
from vcr1_fast.model.qwen2_5_vl.preprocessor import (
    IMAGE_FILE,
    VIDEO_FILE,
    Fit,
    ImageProcessorConfig,
    VideoProcessorConfig,
    parse_settings,
    read_sources,
)
from vcr1_fast.ops.video_patches import video_patches

__all__ = ["ImageProcessorConfig", "Processor", "VideoProcessorConfig"]


@dataclass(frozen=True, eq=False)
class Processor(base.Processor):
    """Renders, tokenises, cuts into patches and counts positions.

    special: token ids and grid constants of the checkpoint's config.json; video, image: sizes and
    normalisation from its settings files.
    """

    video_token: ClassVar[str] = "<|video_pad|>"
    image_token: ClassVar[str] = "<|image_pad|>"

    special: SpecialIds = field(kw_only=True)
    video: VideoProcessorConfig = field(default_factory=VideoProcessorConfig)
    image: ImageProcessorConfig = field(default_factory=ImageProcessorConfig)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        mrope: Mrope = "trained",
        image: ImageProcessorConfig | None = None,
        video: VideoProcessorConfig | None = None,
    ) -> "Processor":
        """Read tokenizer, chat template, config.json, video and image settings of a checkpoint.

        Args:
            directory: of the checkpoint.
            mrope: how positions are counted, see `positions.py`.
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
            special=SpecialIds.from_config(settings),
            video=parse_settings(directory, sources, video or VideoProcessorConfig()),
            image=parse_settings(directory, sources, image or ImageProcessorConfig()),
        )

    def settings(self) -> dict[str, dict[str, Any]]:
        return {VIDEO_FILE: self.video.as_json(), IMAGE_FILE: self.image.as_json()}

    def with_video(self, **changes: Any) -> "Processor":
        """The same processor with other video settings, e.g. `with_video(max_pixels=200_704)`."""
        return replace(self, video=replace(self.video, **changes))

    def with_image(self, **changes: Any) -> "Processor":
        """The same processor with other image settings."""
        return replace(self, image=replace(self.image, **changes))

    def with_bounds(self, frames: FrameConfig) -> "Processor":
        bounds = {"min_pixels": frames.image_min_pixels, "max_pixels": frames.image_max_pixels}
        return self.with_video(
            min_pixels=frames.min_pixels,
            max_pixels=frames.max_pixels,
            total_pixels=frames.total_pixels,
        ).with_image(**{name: value for name, value in bounds.items() if value is not None})

    def fit(self) -> Fit | None:
        exact = self.video.rounding == self.image.rounding == "u8"
        return Fit(self.video, self.image) if exact else None

    def prompt(
        self, text: str, clips: Sequence[ClipLike] = (), *, system: str | None = None
    ) -> Prompt:
        kinds = torch.tensor([IMAGE if clip.fps is None else VIDEO for clip in clips]).long()
        names = {IMAGE: "image", VIDEO: "video"}
        media = [{"type": names[kind]} for kind in kinds.tolist()]
        rendered = self.render(self.turns(text, media, system), answer=True)
        ids = self.encode(rendered)
        types = self._token_types(ids)
        if not torch.equal(types[types > 0], kinds):
            found, given = ([int((k == kind).sum()) for kind in names] for k in (types, kinds))
            raise ValueError(
                f"the prompt has {found[0]} image and {found[1]} video tokens for {given[0]} "
                f"images and {given[1]} clips: {rendered!r}"
            )
        self.refuse_control_tokens(text, system)
        parts = [self._patches(clip) for clip in clips]
        repeats = torch.ones_like(ids)
        if parts:
            grids = torch.stack([grid for _, grid in parts])
            repeats[types > 0] = grids.prod(dim=1) // self.video.layout.merge**2
        ids = ids.repeat_interleave(repeats)
        types = types.repeat_interleave(repeats)
        (images, image_grids), (videos, video_grids) = (
            _joined(part for part, k in zip(parts, kinds.tolist(), strict=True) if k == kind)
            for kind in (IMAGE, VIDEO)
        )
        seconds = torch.tensor(
            [self.video.layout.temporal / clip.fps for clip in clips if clip.fps is not None],
            dtype=torch.float32,
        )
        return Prompt(
            input_ids=ids,
            mm_token_type_ids=types,
            positions=mrope_positions(
                ids, video_grids, seconds, image_grids, self.special, mrope=self.mrope
            ),
            pixel_values_videos=videos,
            video_grid_thw=video_grids,
            second_per_grid_ts=seconds,
            pixel_values=images,
            image_grid_thw=image_grids,
            text=rendered,
        )

    def _token_types(self, ids: Tensor) -> Tensor:
        return IMAGE * (ids == self.image_id).long() + VIDEO * (ids == self.video_id).long()

    def _patches(self, clip: ClipLike) -> tuple[Tensor, Tensor]:
        frames = clip.frames
        is_image = clip.fps is None
        if is_image and len(frames) != 1:
            raise ValueError(f"an image has one frame, a clip has a rate: got {len(frames)} frames")
        config = self.image if is_image else self.video
        fitted = getattr(clip, "fitted", False)
        count, height, width = frames.shape[:3]
        return video_patches(
            frames,
            None if fitted else config.size(count, height, width),
            resample=config.resample,
            rounding=config.rounding,
            dtype=config.dtype,
            layout=config.layout,
        )


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor]:
    found = list(parts)
    if not found:
        return None, torch.zeros(0, 3, dtype=torch.int64)
    return torch.cat([patches for patches, _ in found]), torch.stack([grid for _, grid in found])
