"""Sizes and normalisation of images and clips, for families whose times are text.

A clip has one pixel budget for all its frames together, within which frames keep their size.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vcr1_fast.model import preprocessor as base
from vcr1_fast.ops.video_patches import PatchLayout

LAYOUT = PatchLayout(patch=16, merge=2, temporal=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def clip_size(
    frames: int,
    height: int,
    width: int,
    *,
    min_pixels: float,
    max_pixels: float,
    layout: PatchLayout = LAYOUT,
) -> tuple[int, int]:
    """(height, width) in pixels of a clip's frames, multiples of `layout.token`.

    `smart_resize` of the families' video processor in transformers. A frame with a side below one
    token is enlarged first; then both sides are rounded to the nearest multiple (halves to even).
    Where all frames together, their number rounded to whole temporal patches, leave [min_pixels,
    max_pixels], the frame is scaled with its aspect ratio kept and the sides are rounded inwards.

    ValueError for fewer frames than a temporal patch has, and as `base.check_shape`.
    """
    factor = layout.token
    if frames < layout.temporal:
        raise ValueError(f"a clip needs at least {layout.temporal} frames, got {frames}")
    base.check_shape(height, width)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    # Halves go to even here, too: 5 frames count as 4, 7 as 8.
    counted = round(frames / layout.temporal) * layout.temporal
    if counted * rows * columns > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


@dataclass(frozen=True)
class ImageProcessorConfig(base.ImageProcessorConfig):
    """How an image becomes patches; the defaults are those of the released checkpoints. A family
    adds the names of transformers' classes (`classes`)."""

    min_pixels: int = 64 * 32 * 32
    max_pixels: int = 16_384 * 32 * 32
    layout: PatchLayout = LAYOUT

    def pixels_as_json(self) -> dict[str, Any]:
        return {"size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}}


@dataclass(frozen=True)
class VideoProcessorConfig(ImageProcessorConfig):
    """How frames become patches.

    min_pixels, max_pixels: of a clip, all frames together; the defaults are those of the families'
    video processor in transformers. cap_pixels_per_frame, max_video_tokens: its settings of these
    names, a further limit for each frame. frame_pixels: (fewest, most) of a frame as a run sets
    them, in the place of all these limits; total_pixels: a run's budget for a clip, of which two
    frames, one temporal patch, count once, as in qwen-vl-utils.
    """

    section: ClassVar[str] = "video_processor"

    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    frame_pixels: tuple[int, int] | None = None
    total_pixels: int | None = None

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        low, high = self._bounds(frames)
        return clip_size(frames, height, width, min_pixels=low, max_pixels=high, layout=self.layout)

    def _bounds(self, frames: int) -> tuple[int, int]:
        """Fewest and most pixels of a clip of so many frames."""
        if self.frame_pixels is None:
            if not self.cap_pixels_per_frame:
                return self.min_pixels, self.max_pixels
            most = self.max_video_tokens * self.layout.token**2
            most = min(most, self.max_pixels // max(frames, 1))
            return self.min_pixels, max(most, int(self.min_pixels * 1.05)) * frames
        low, high = (bound * frames for bound in self.frame_pixels)
        if self.total_pixels is not None:
            budget = self.total_pixels * self.layout.temporal
            high = min(high, max(budget, int(low * 1.05)))
        return low, high

    def further_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            # null: transformers' default, which is off.
            "cap_pixels_per_frame": bool(settings.get("cap_pixels_per_frame")),
            "max_video_tokens": settings.get("max_video_tokens", self.max_video_tokens),
        }

    def pixels_as_json(self) -> dict[str, Any]:
        cap = {"cap_pixels_per_frame": True, "max_video_tokens": self.max_video_tokens}
        return super().pixels_as_json() | (cap if self.cap_pixels_per_frame else {})
