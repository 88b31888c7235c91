"""Antialiased resize of uint8 video frames, exact to the bit.

Two separable passes, horizontal first; `resample.py` holds the filter tables. `rounding` says
whose arithmetic is followed:

- "u8":   torch's uint8 CPU kernels (int16 weights, uint8 between the passes). Transformers' video
          processors give these pixels on CPU.
- "pil":  Pillow's (22-bit weights, uint8 between the passes). Always horizontal first, as every
          Pillow before 13; Pillow 13 runs the vertical pass first where it reduces the height by
          much more than the width, and then differs in the last bit.
- "f32":  fp32 passes, then clamp to 0..255 and round half to even (transformers on CUDA,
          qwen-vl-utils), uint8 out. Equal to torch's up to its fp32 filter weights: now and then
          a pixel differs by one.
- "none": the fp32 passes alone, float32 out; the cubic may overshoot 0..255.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native
from vcr1_fast.ops.resample import RESAMPLE, ROUNDING, native_plan, resample_axis, taps
from vcr1_fast.ops.resample_tiles import cuda_plan

if TYPE_CHECKING:
    import numpy as np


def resized_dtype(rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "none" else torch.uint8


def reference_resize(
    frames: Tensor, size: Sequence[int], resample: str, antialias: bool, rounding: str
) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, h, w, 3) uint8, or float32 for "none"."""
    height, width = size
    x = resample_axis(frames, 2, width, taps(frames.shape[2], width, resample, antialias, rounding))
    x = resample_axis(x, 1, height, taps(frames.shape[1], height, resample, antialias, rounding))
    if rounding == "f32":
        x = x.clamp(0, 255).round()
    return x.to(resized_dtype(rounding))


def reference(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    out.copy_(reference_resize(frames, out.shape[1:3], resample, antialias, rounding))


def _cpu(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    plan = native_plan(
        tuple(frames.shape[1:3]), tuple(out.shape[1:3]), resample, antialias, rounding
    )
    threads = torch.get_num_threads()
    native.resize_frames(frames, out, plan, scratch(plan, threads), threads)


def _cuda(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    sizes = tuple(frames.shape[1:3]), tuple(out.shape[1:3])
    plan = cuda_plan(*sizes, resample, antialias, rounding, frames.device)
    native.resize_frames(frames, out, plan)


def scratch(plan: Any, threads: int) -> Tensor:
    return torch.empty(threads * plan.scratch_bytes, dtype=torch.uint8)


def _fake(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    return None


_op = Op(
    "resize_frames",
    "(Tensor frames, Tensor(a!) out, str resample, bool antialias, str rounding) -> ()",
    _fake,
)
_op.register("reference", reference)
_op.register("cpu", _cpu)
_op.register("cuda", _cuda)


def as_thwc(frames: Tensor | np.ndarray) -> tuple[Tensor, bool]:
    """View uint8 frames as (T, H, W, 3) without a copy; also says if they came as (T, 3, H, W)."""
    if not isinstance(frames, Tensor):
        with warnings.catch_warnings():
            # Arrays from np.frombuffer are read-only; nothing here writes to frames.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            frames = torch.from_numpy(frames)
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames.dtype}")
    if frames.dim() != 4 or 3 not in (frames.shape[3], frames.shape[1]):
        raise ValueError(
            f"frames must be (T, H, W, 3) or (T, 3, H, W), got shape {tuple(frames.shape)}"
        )
    channels_first = frames.shape[3] != 3
    if channels_first:
        frames = frames.permute(0, 2, 3, 1)
    if frames.numel() == 0:
        raise ValueError(f"frames are empty: (T, H, W, C) = {tuple(frames.shape)}")
    return frames, channels_first


def check_size(size: Sequence[int], multiple: int = 1) -> tuple[int, int]:
    """(height, width) as ints, both positive multiples of `multiple`."""
    if len(size) != 2:
        raise ValueError(f"size must be (height, width), got {tuple(size)}")
    height, width = int(size[0]), int(size[1])
    if height <= 0 or width <= 0:
        raise ValueError(f"size must be positive, got height {height}, width {width}")
    if height % multiple or width % multiple:
        raise ValueError(
            f"height and width must be multiples of {multiple}, got {height} x {width}"
        )
    return height, width


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: object) -> None:
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out must be {shape} {dtype} on {device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if out.requires_grad:
        raise ValueError("out must not require grad: frames are uint8, nothing flows back")


def resize_frames(
    frames: Tensor | np.ndarray,
    size: Sequence[int],
    *,
    resample: str = "bicubic",
    antialias: bool = True,
    rounding: str = "u8",
    out: Tensor | None = None,
) -> Tensor:
    """Resize video frames.

    frames: uint8, (T, H, W, 3) or (T, 3, H, W) with any strides, or a numpy array (not copied);
        a shape that reads both ways is taken as (T, H, W, 3).
    size: (height, width) in pixels.
    resample: "bicubic" or "bilinear".
    antialias: stretch the filter when an axis shrinks. Without it the result is torch's
        `interpolate(antialias=False, align_corners=False)`.
    rounding: "u8", "pil", "f32" or "none"; see the module's docstring.
    out: where to write: the result's shape and dtype, any strides.

    Returns (T, height, width, 3), or (T, 3, height, width) for input of that order (in
    channels-last memory): uint8, or float32 for rounding="none". An axis whose size does not change
    is left alone, as torch and Pillow do.
    Raises ValueError for another dtype, rank, option or `out`, and for empty frames.
    """
    frames, channels_first = as_thwc(frames)
    height, width = check_size(size)
    check_choice("resample", resample, tuple(RESAMPLE))
    check_choice("rounding", rounding, ROUNDING)
    shape, dtype = (frames.shape[0], height, width, 3), resized_dtype(rounding)
    if out is None:
        target = torch.empty(shape, dtype=dtype, device=frames.device)
    else:
        target = out.permute(0, 2, 3, 1) if channels_first and out.dim() == 4 else out
        check_out(target, shape, dtype, frames.device)
    _op(frames, target, resample, antialias, rounding)
    if out is not None:
        return out
    return target.permute(0, 3, 1, 2) if channels_first else target
