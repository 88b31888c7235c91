"""Which frames of a clip are shown, with their times, to a model that reads times as text.

The rule of the families' video processor in transformers: at `fps` of the clip's length, any number
of frames (an odd one fills its last temporal patch with the last frame twice), at even distances
from the first frame to the last.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from vcr1_fast.data.sampling import FRAME_FACTOR, FrameConfig


@dataclass(frozen=True)
class ClipFrames(FrameConfig):
    """A run's frame settings under this family's rule.

    `num_frames` is taken as it is. The rule "linspace" is the one above; "hf" leaves the last frame
    out, floor(i * total / count), so that a whole rate gives whole distances.
    """

    @classmethod
    def of(cls, frames: FrameConfig) -> "ClipFrames":
        """The same settings under this rule."""
        return cls(**{item.name: getattr(frames, item.name) for item in fields(FrameConfig)})

    def count(self, total: int, video_fps: float) -> int:
        """The number of frames to take of `total` at `video_fps` frames a second. ValueError where
        the video is too short for the result."""
        if total < 1 or not (math.isfinite(video_fps) and video_fps > 0):
            raise ValueError(f"expected frames and a positive rate, got {total} at {video_fps} fps")
        count = self.num_frames
        if count is None:
            # In floating point and in this order, as transformers does it.
            count = int(total / video_fps * self.fps)
            count = min(max(count, self.min_frames), self.max_frames, total)
        if total < FRAME_FACTOR:
            raise ValueError(f"too short to sample: at least 2 frames are taken, it has {total}")
        if count > total:
            raise ValueError(f"cannot take {count} frames of {total}, expected 2 to {total}")
        return count

    def indices(self, total: int, count: int) -> np.ndarray:
        """`count` frame numbers of 0 .. total - 1, ascending, int64 (count,)."""
        if self.rule == "hf":
            return super().indices(total, count)
        # numpy's own rounding of i * step, as transformers has it: exact halves may go either way.
        return np.linspace(0, total - 1, count).round().astype(np.int64)
