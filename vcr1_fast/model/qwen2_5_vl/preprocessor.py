"""Sizes and normalisation of images and clips, read from a checkpoint's settings files."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.ops.resize_frames import resize_frames
from vcr1_fast.ops.video_patches import PatchLayout

LAYOUT = PatchLayout(
    patch=14,
    merge=2,
    temporal=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
    std=(0.26862954, 0.26130258, 0.27577711),
)
VIDEO_FILE, BOTH_FILE, IMAGE_FILE = (
    "video_preprocessor_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# transformers reads the settings of clips and images from the first of these that has them.
_SETTINGS_FILES = {
    "video_processor": (VIDEO_FILE, BOTH_FILE, IMAGE_FILE),
    "image_processor": (BOTH_FILE, IMAGE_FILE),
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_TOKEN_PIXELS = LAYOUT.token**2
_MAX_FRAME_TOKENS = 768  # the most that qwen-vl-utils gives one frame
_MAX_ASPECT_RATIO = 200


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
    """(height, width) in pixels, multiples of `factor`, as the transformers processor chooses them.

    Both sides are rounded to the nearest multiple (halves to even); where that leaves
    [min_pixels, max_pixels], the frame is scaled with its aspect ratio kept and the sides are
    rounded inwards. With `total_pixels` (and `num_frames`) `max_pixels` is first lowered so that
    the clip fits that budget, as qwen-vl-utils does, but never under 1.05 * min_pixels.
    ValueError for an empty frame and for an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a frame with pixels, got {height} x {width}")
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"aspect ratio of {height} x {width} is above {_MAX_ASPECT_RATIO}")
    if total_pixels is not None:
        if num_frames is None or num_frames < 1:
            raise ValueError(f"total_pixels needs num_frames of at least 1, got {num_frames}")
        most = _MAX_FRAME_TOKENS * factor**2
        budget = min(most, total_pixels / num_frames * LAYOUT.temporal)
        max_pixels = min(max_pixels, max(budget, int(min_pixels * 1.05)))
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How an image becomes patches.

    The defaults are those of transformers' Qwen2VLImageProcessor; a checkpoint brings its own.
    `dtype` is that of the patches; the model casts them to its own anyway.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    resample: str = "bicubic"
    rounding: str = "u8"
    layout: PatchLayout = LAYOUT
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                "expected 0 < min_pixels <= max_pixels, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that frames of this size are resized to."""
        return smart_resize(
            height,
            width,
            factor=self.layout.token,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def as_json(self) -> dict[str, Any]:
        """As in a checkpoint's settings file."""
        kind = "video" if isinstance(self, VideoProcessorConfig) else "image"
        return {
            f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.layout.patch,
            "temporal_patch_size": self.layout.temporal,
            "merge_size": self.layout.merge,
            "resample": {name: number for number, name in _RESAMPLE.items()}[self.resample],
            "image_mean": list(self.layout.mean),
            "image_std": list(self.layout.std),
        }


@dataclass(frozen=True)
class VideoProcessorConfig(ImageProcessorConfig):
    """How frames become patches. Pixels are counted per frame; `total_pixels` is a clip's budget.

    The defaults are those of transformers' Qwen2VLVideoProcessor; a checkpoint brings its own.
    """

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


@dataclass(frozen=True)
class Fit:
    """Resizes frames to the size at which they are cut into patches, apart from the cutting: in the
    process that decodes them, since a full-size clip may be a hundred times as large.

    Bit for bit what cutting would do by itself, as long as it rounds to uint8 in between
    (rounding="u8"). To be called with a frame (H, W, 3) uint8 and the number of frames of its
    clip, None for an image. ValueError for a frame of an impossible shape.
    """

    video: VideoProcessorConfig
    image: ImageProcessorConfig

    def __post_init__(self) -> None:
        for config in (self.video, self.image):
            if config.rounding != "u8":
                raise ValueError(f'rounding must be "u8", got {config.rounding!r}')

    def __call__(self, frame: np.ndarray, count: int | None) -> np.ndarray:
        config = self.image if count is None else self.video
        size = config.size(count or 1, *frame.shape[:2])
        # A frame that was turned upright is a view with negative strides, which torch cannot take.
        whole = np.ascontiguousarray(frame)[None]
        return resize_frames(whole, size, resample=config.resample)[0].numpy()


C = TypeVar("C", bound=ImageProcessorConfig)


def read_sources(directory: Path) -> dict[str, dict[str, Any]]:
    """The settings files that a checkpoint directory has, by name."""
    names = (VIDEO_FILE, BOTH_FILE, IMAGE_FILE)
    return {name: read_json(directory / name) for name in names if (directory / name).exists()}


def parse_settings(directory: Path, sources: dict[str, dict[str, Any]], default: C) -> C:
    """Settings of images or of clips, by the kind of `default`, from the files that `read_sources`
    found; what they leave open is as in `default`.

    CheckpointError names the file without them, or with a value that is not supported.
    """
    section = "video_processor" if isinstance(default, VideoProcessorConfig) else "image_processor"
    for name in _SETTINGS_FILES[section]:
        settings = sources.get(name, {})
        if name == BOTH_FILE:
            settings = settings.get(section, {})
        if settings:
            return _parse(directory / name, settings, default)
    what = section.partition("_")[0]
    raise CheckpointError(directory / IMAGE_FILE, f"missing (no {what} settings)")


def _parse(path: Path, settings: dict[str, Any], default: C) -> C:
    layout = default.layout
    expected = {
        "patch_size": layout.patch,
        "temporal_patch_size": layout.temporal,
        "merge_size": layout.merge,
    }
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise CheckpointError(path, f"{key} {settings[key]} is not supported, only {value}")
    size = settings.get("size") or {}
    resample = settings.get("resample", 3)
    if resample not in _RESAMPLE:
        raise CheckpointError(path, f"resample {resample} is not one of {sorted(_RESAMPLE)}")

    def pixels(name: str, edge: str, otherwise: int) -> int:
        value = settings.get(name)
        return value if value is not None else size.get(edge, size.get(name, otherwise))

    try:
        return replace(
            default,
            min_pixels=pixels("min_pixels", "shortest_edge", default.min_pixels),
            max_pixels=pixels("max_pixels", "longest_edge", default.max_pixels),
            resample=_RESAMPLE[resample],
            layout=replace(
                layout,
                mean=tuple(settings.get("image_mean", layout.mean)),
                std=tuple(settings.get("image_std", layout.std)),
            ),
        )
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
