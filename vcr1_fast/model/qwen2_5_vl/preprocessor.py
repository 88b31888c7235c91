"""Sizes and normalisation of Qwen2.5-VL's images and clips: what its settings files leave open, and
the pixel budget of a clip."""

from dataclasses import dataclass
from typing import ClassVar

from vcr1_fast.model import preprocessor as base
from vcr1_fast.model.preprocessor import Fit, frame_size
from vcr1_fast.ops.video_patches import PatchLayout

__all__ = ["LAYOUT", "Fit", "ImageProcessorConfig", "VideoProcessorConfig", "smart_resize"]

LAYOUT = PatchLayout(
    patch=14,
    merge=2,
    temporal=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
    std=(0.26862954, 0.26130258, 0.27577711),
)
_TOKEN_PIXELS = LAYOUT.token**2
_MAX_FRAME_TOKENS = 768  # the most that qwen-vl-utils gives one frame


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = LAYOUT.token,
    min_pixels: int = 128 * _TOKEN_PIXELS,
    max_pixels: float = _MAX_FRAME_TOKENS * _TOKEN_PIXELS,
    total_pixels: int | None = None,
    num_frames: int | None = None,
) -> tuple[int, int]:
    """(height, width) in pixels, multiples of `factor`: `frame_size` with a budget for a clip.

    With `total_pixels` (and `num_frames`) `max_pixels` is first lowered so that the clip fits that
    budget, as qwen-vl-utils does, but never under 1.05 * min_pixels.
    ValueError for an empty frame and for an aspect ratio above 200.
    """
    base.check_shape(height, width)
    if total_pixels is not None:
        if num_frames is None or num_frames < 1:
            raise ValueError(f"total_pixels needs num_frames of at least 1, got {num_frames}")
        most = _MAX_FRAME_TOKENS * factor**2
        budget = min(most, total_pixels / num_frames * LAYOUT.temporal)
        max_pixels = min(max_pixels, max(budget, int(min_pixels * 1.05)))
    return frame_size(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


@dataclass(frozen=True)
class ImageProcessorConfig(base.ImageProcessorConfig):
    """How an image becomes patches; defaults of transformers' Qwen2VLImageProcessor."""

    classes: ClassVar[dict[str, str]] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }

    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    layout: PatchLayout = LAYOUT


@dataclass(frozen=True)
class VideoProcessorConfig(ImageProcessorConfig):
    """How frames become patches. Pixels are counted per frame; `total_pixels` is a clip's budget.

    The defaults are those of transformers' Qwen2VLVideoProcessor; a checkpoint brings its own.
    """

    section: ClassVar[str] = "video_processor"
    classes: ClassVar[dict[str, str]] = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }

    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    total_pixels: int | None = None

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        return smart_resize(
            height,
            width,
            factor=self.layout.token,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            total_pixels=self.total_pixels,
            num_frames=frames,
        )
