"""Which frames of a video are sampled.

Two rules are in use. "linspace" is the rule of qwen-vl-utils (first and last frame included), by
which VideoChat-R1 was trained; "hf" is that of the transformers video processor (the last frame is
left out). Both are computed in integers here: in floating point the "hf" rule runs past the last
frame for about 4 % of all (total, count) pairs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["linspace", "hf"]
RULES: tuple[Rule, ...] = ("linspace", "hf")

FRAME_FACTOR = 2  # frames are taken in pairs, which make a temporal patch


@dataclass(frozen=True)
class FrameConfig:
    """How a clip is sampled and how large its frames may be.

    The defaults are those of the VideoChat-R1 recipe, at whose 784 pixels a token they are 16 to
    768 tokens for two frames and at most 3,584 tokens a video. A model family with another rule
    returns a subclass from its processor's `with_frames`, which overrides `count` and `indices`.
    """

    fps: float = 2.0
    """Frames taken per second of the clip, within `min_frames` and `max_frames`."""
    min_frames: int = 4
    """Fewest frames of a clip."""
    max_frames: int = 768
    """Most frames of a clip."""
    num_frames: int | None = None
    """Frames of every clip, in the place of `fps`, `min_frames` and `max_frames`; null: by them."""
    min_pixels: int = 12_544
    """Fewest pixels of a frame."""
    max_pixels: int = 602_112
    """Most pixels of a frame."""
    total_pixels: int | None = 2_809_856
    """Most pixels of a clip, all frames together; null: no limit."""
    rule: Rule = "linspace"
    """Which frames: "linspace" (qwen-vl-utils, first and last included) or "hf" (transformers)."""
    image_min_pixels: int | None = None
    """Fewest pixels of an image; null: the checkpoint's limit."""
    image_max_pixels: int | None = None
    """Most pixels of an image; null: the checkpoint's limit (16,384 tokens for released ones)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, got {self.fps}")
        if not FRAME_FACTOR <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"expected {FRAME_FACTOR} <= min_frames <= max_frames, "
                f"got {self.min_frames} and {self.max_frames}"
            )
        if self.num_frames is not None and self.num_frames < FRAME_FACTOR:
            raise ValueError(f"num_frames must be at least {FRAME_FACTOR}, got {self.num_frames}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                "expected 0 < min_pixels <= max_pixels, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )
        for name in ("image_min_pixels", "image_max_pixels"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.total_pixels is not None and self.total_pixels <= 0:
            raise ValueError(f"total_pixels must be positive, got {self.total_pixels}")
        _check_rule(self.rule)

    def count(self, total: int, video_fps: float) -> int:
        """The number of frames to take of `total` frames at `video_fps`; see `smart_nframes`."""
        return smart_nframes(
            total,
            video_fps,
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            num_frames=self.num_frames,
            rule=self.rule,
        )

    def indices(self, total: int, count: int) -> np.ndarray:
        """The `count` frames to take of `total`; see `frame_indices`."""
        return frame_indices(total, count, self.rule)


def smart_nframes(
    total: int,
    video_fps: float,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    num_frames: int | None = None,
    rule: Rule = "linspace",
) -> int:
    """An even number of frames for a video of `total` frames at `video_fps` frames a second.

    `num_frames`, where given, is rounded to the nearest even number (halves to a multiple of 4) and
    the other limits are not used. The two rules differ for an odd `min_frames` only: "linspace"
    rounds it up (qwen-vl-utils 0.0.14), "hf" rounds the result down (transformers 5.23).
    ValueError where the video is too short for the result.
    """
    _check_rule(rule)
    if total < 1 or not (math.isfinite(video_fps) and video_fps > 0):
        raise ValueError(f"expected frames and a positive rate, got {total} at {video_fps} fps")
    if num_frames is not None:
        count = round(num_frames / FRAME_FACTOR) * FRAME_FACTOR
    else:
        low = min_frames if rule == "hf" else min_frames + min_frames % FRAME_FACTOR
        high = min(max_frames, total) if rule == "hf" else max_frames
        high -= high % FRAME_FACTOR
        wanted = min(max(total / video_fps * fps, low), high, total)
        count = math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR
    if total < FRAME_FACTOR:
        raise ValueError(f"too short to sample: frames are taken in pairs, it has {total}")
    if not FRAME_FACTOR <= count <= total:
        raise ValueError(f"cannot take {count} frames of {total}, expected 2 to {total}")
    return count


def frame_indices(total: int, count: int, rule: Rule = "linspace") -> np.ndarray:
    """`count` frame numbers of 0 .. total-1, ascending, int64 (count,).

    "linspace": i * (total-1) / (count-1), rounded to the nearest (exact halves to even);
    "hf": floor(i * total / count). Both exact for any size, so never out of range.
    """
    _check_rule(rule)
    if total < 1 or count < 1:
        raise ValueError(f"expected at least one frame, got total={total}, count={count}")
    steps = np.arange(count, dtype=np.int64)
    if rule == "hf":
        return steps * total // count
    if count == 1:
        return steps
    twice, divisor = 2 * steps * (total - 1) + (count - 1), 2 * (count - 1)
    nearest = twice // divisor
    is_half = twice % divisor == 0
    return nearest - (is_half & (nearest % 2 == 1))


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"unknown sampling rule {rule!r}, expected one of {', '.join(RULES)}")
