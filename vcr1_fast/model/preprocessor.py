"""Sizes and normalisation of images and clips, read from a checkpoint's settings files.

The family-free part: a family's subclasses say how large the frames of a clip become, and bring
the defaults for what a checkpoint leaves open (`model/<family>/preprocessor.py`).
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.ops.resize_frames import resize_frames
from vcr1_fast.ops.video_patches import PatchLayout

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
_MAX_ASPECT_RATIO = 200


def check_shape(height: int, width: int) -> None:
    """ValueError for an empty frame and for an aspect ratio above 200."""
    if height < 1 or width < 1:
        raise ValueError(f"expected a frame with pixels, got {height} x {width}")
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"aspect ratio of {height} x {width} is above {_MAX_ASPECT_RATIO}")


def frame_size(
    height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """(height, width) in pixels, multiples of `factor`, as transformers' image processor does it.

    Both sides are rounded to the nearest multiple (halves to even); where that leaves
    [min_pixels, max_pixels], the frame is scaled with its aspect ratio kept and the sides are
    rounded inwards. ValueError as `check_shape`.
    """
    check_shape(height, width)
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

    A family's subclass has the defaults of transformers; a checkpoint brings its own. `dtype` is
    that of the patches; the model casts them to its own anyway.
    """

    section: ClassVar[str] = "image_processor"
    """Where `processor_config.json` has these settings."""
    classes: ClassVar[dict[str, str]] = {}
    """Names of transformers' classes, as in a settings file."""

    min_pixels: int
    max_pixels: int
    resample: str = "bicubic"
    rounding: str = "u8"
    layout: PatchLayout = field(kw_only=True)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                "expected 0 < min_pixels <= max_pixels, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that `frames` frames of this size are resized to. ValueError
        for a shape or a number that the family does not take."""
        return frame_size(
            height,
            width,
            factor=self.layout.token,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def further_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Further fields that only this family has, read from a settings file."""
        return {}

    def as_json(self) -> dict[str, Any]:
        """As in a checkpoint's settings file."""
        return {
            **self.classes,
            **self.pixels_as_json(),
            "patch_size": self.layout.patch,
            "temporal_patch_size": self.layout.temporal,
            "merge_size": self.layout.merge,
            "resample": {name: number for number, name in _RESAMPLE.items()}[self.resample],
            "image_mean": list(self.layout.mean),
            "image_std": list(self.layout.std),
        }

    def pixels_as_json(self) -> dict[str, Any]:
        """The bounds, by the names that the family's settings files have."""
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}


@dataclass(frozen=True)
class Fit:
    """Resizes frames to the size at which they are cut into patches, apart from the cutting: in the
    process that decodes them, since a full-size clip may be a hundred times as large.

    Bit for bit what cutting would do by itself, as long as it rounds to uint8 in between
    (rounding="u8"). To be called with a frame (H, W, 3) uint8 and the number of frames of its
    clip, None for an image. ValueError for a frame of an impossible shape.
    """

    video: ImageProcessorConfig
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
    section = default.section
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
            **default.further_settings(settings),
        )
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
