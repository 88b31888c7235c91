"""Decoded frames to patches on the model's device, ahead of the step: `data.resize: device`.

    worker   decodes into shared memory, pinned for CUDA (data/blocks.py)
    thread   copies the frames to the device and launches `video_patches` there, which resizes,
             normalises and lays them out in one pass; all on a side stream
    step     takes the patches (`Processor.prompt`)

The thread waits for its copies and kernels, the step for nothing: while it runs, the copy engine
and a few of the GPU's processors work for the next one. On the CPU the same code runs, without
pinning and streams.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vcr1_fast.data.video import Clip, VideoError
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.vision import vision_encoder
from vcr1_fast.ops import backend
from vcr1_fast.ops.video_patches import video_patches

CHUNK_BYTES = 256 << 20
"""Bytes of decoded frames on the device at a time."""
_LOG = logging.getLogger(__name__)


class Staging:
    """A `ClipReader`'s stage: clips whose `staged` holds (patches, grid_thw) as `processor.prompt`
    would make them, in `dtype`, on `device`; `pin`: whether it wants pinned memory.

    Bit for bit the patches of the CPU where these are rounded to `dtype`, since our kernels agree
    in every rounding of `video_patches`.
    """

    def __init__(self, processor: Processor, device: torch.device, dtype: torch.dtype) -> None:
        self.processor, self.device, self.dtype = processor, device, dtype
        self.pin = device.type == "cuda"
        # One for all threads: a stream executes in order, so a chunk's buffer, which the allocator
        # gives to the next user of this stream, is read before it is written again.
        self._stream = torch.cuda.Stream(device) if self.pin else None

    def __call__(self, clip: Clip) -> Clip:
        """The clip with its patches; as it came where the device has no memory for them now.

        VideoError for frames of a shape that the model does not take.
        """
        try:
            return self.stage(clip)
        except torch.OutOfMemoryError:
            # The step that runs now needs it. `stage` is called again when it is done.
            _LOG.info("%s: no memory on %s for its patches yet", clip.path, self.device)
            return clip

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the patches of frames (T, H, W, 3); 0 for a shape that will be refused."""
        count, height, width = shape[:3]
        known = [self.processor.video, *([self.processor.image] if count == 1 else [])]
        sizes = [0]
        for config in known:
            try:
                grid = config.layout.grid(count, *config.size(count, height, width))
            except ValueError:
                continue
            sizes.append(grid[0] * grid[1] * grid[2] * config.layout.values * self.dtype.itemsize)
        return max(sizes)

    def stage(self, clip: Clip) -> Clip:
        """The clip with its patches, which are complete on return. Errors as for a call, and
        torch.OutOfMemoryError."""
        config, frames = self.processor.settings_of(clip), torch.from_numpy(clip.frames)
        count, height, width = frames.shape[:3]
        try:
            size = (height, width) if clip.fitted else config.size(count, height, width)
        except ValueError as error:
            raise VideoError(clip.path, str(error)) from error
        layout = config.layout
        grid = layout.grid(count, *size)
        rows = grid[1] * grid[2]  # of a temporal patch; those of a chunk lie one after another
        # Whole temporal patches: the last frame is repeated at the clip's end alone.
        step = max(CHUNK_BYTES // (frames[0].nbytes * layout.temporal), 1) * layout.temporal
        with self._on_stream():
            patches = torch.empty(
                grid[0] * rows, layout.values, dtype=self.dtype, device=self.device
            )
            for begin in range(0, count, step):
                # Not blocking: from pinned memory the copy engine reads while this thread goes on.
                part = frames[begin : begin + step].to(self.device, non_blocking=True)
                first = begin // layout.temporal * rows
                made = layout.grid(len(part), *size)[0] * rows
                video_patches(
                    part,
                    size,
                    layout=layout,
                    resample=config.resample,
                    rounding=config.rounding,
                    out=patches[first : first + made],
                    dtype=self.dtype,
                )
            self._finish()
        return replace(clip, staged=(patches, torch.tensor(grid, dtype=torch.int64, device="cpu")))

    def _on_stream(self) -> AbstractContextManager[object]:
        # Also makes the stream's device current, which in a new thread is device 0.
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _finish(self) -> None:
        """Wait for the work of this call.

        Afterwards nothing reads the frames, whose memory another worker may get as soon as the clip
        is dropped, and whoever launches work with the patches needs no event to wait for.
        """
        if self._stream is not None:
            # Blocking: a thread that spins would take a core from the step.
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            done.synchronize()


def staging(model: nn.Module, processor: Processor, resize: str) -> Staging | None:
    """The stage of `data.resize` for a model; None: workers resize."""
    if resize == "worker":
        return None
    encoder: Any = vision_encoder(model)
    device = encoder.device
    if resize == "auto" and not (device.type == "cuda" and backend.unavailable("cuda") is None):
        return None
    return Staging(processor, device, encoder.dtype)
