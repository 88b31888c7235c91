"""Video frames to the patch rows that Qwen2-VL and Qwen2.5-VL read, in one pass.

    resize (resize_frames.py) -> repeat the last frame if T is odd -> (x - 255 mean_c) / (255 std_c)
    in fp32 -> cut into patches -> cast

With patch P = 14, merge M = 2 and temporal patch TP = 2, pixel (t, h, w, c) of the resized clip
goes to

    row     (((t // TP * (grid_h // M) + h // PM) * (grid_w // M) + w // PM) * M + h // P % M) * M
            + w // P % M
    column  ((c * TP + t % TP) * P + h % P) * P + w % P

so that four neighbouring rows make one token of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native
from vcr1_fast.ops.host_memory import empty
from vcr1_fast.ops.resample import RESAMPLE, ROUNDING, native_plan
from vcr1_fast.ops.resample_tiles import cuda_plan
from vcr1_fast.ops.resize_frames import (
    as_thwc,
    check_choice,
    check_out,
    check_size,
    reference_resize,
    scratch,
)

if TYPE_CHECKING:
    import numpy as np

PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2
PATCH_VALUES = 3 * TEMPORAL_PATCH * PATCH * PATCH  # 1176
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pixel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a channel in units of pixel values, rounded to fp32 before the 255."""
    return torch.tensor(mean) * 255.0, torch.tensor(std) * 255.0


def reference(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    x = reference_resize(frames, size, resample, True, rounding)
    if len(x) % TEMPORAL_PATCH:
        x = torch.cat([x, x[-1:]])
    offset, scale = (v.to(x.device) for v in pixel_scale(mean, std))
    x = (x.float() - offset) / scale
    rows, columns = size[0] // PATCH, size[1] // PATCH
    x = x.view(-1, TEMPORAL_PATCH, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    out.copy_(x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, PATCH_VALUES))


def _cpu(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    plan = native_plan(tuple(frames.shape[1:3]), tuple(size), resample, True, rounding)
    threads = torch.get_num_threads()
    offset, scale = (v.tolist() for v in pixel_scale(mean, std))
    native.video_patches(frames, out, plan, offset, scale, scratch(plan, threads), threads)


def _cuda(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    sizes = tuple(frames.shape[1:3]), tuple(size)
    plan = cuda_plan(*sizes, resample, True, rounding, frames.device)
    offset, scale = (v.tolist() for v in pixel_scale(mean, std))
    native.video_patches(frames, out, plan, offset, scale)


def _fake(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    return None


_op = Op(
    "video_patches",
    "(Tensor frames, Tensor(a!) out, int[] size, str resample, str rounding, "
    "float[] mean, float[] std) -> ()",
    _fake,
)
_op.register("reference", reference)
_op.register("cpu", _cpu)
_op.register("cuda", _cuda)


def video_patches(
    frames: Tensor | np.ndarray,
    size: Sequence[int] | None = None,
    *,
    resample: str = "bicubic",
    rounding: str = "u8",
    dtype: torch.dtype = torch.bfloat16,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Resize, normalise and cut a clip into the rows of `pixel_values_videos`.

    frames: uint8, (T, H, W, 3) or (T, 3, H, W) with any strides, or a numpy array (not copied).
    size: (height, width) in pixels, multiples of 28; None: no resize, the frames' own is checked.
    resample, rounding: as in `resize_frames`; always antialiased. The default gives what
        transformers' processor gives on CPU, to the bit, rounded once to `dtype`.
    dtype: float32, bfloat16 or float16.
    mean, std: of the three channels, in units of 0..1.
    out: where to write: contiguous (N, 1176) of `dtype`. Without it, large results on the CPU take
        the memory of earlier ones that are gone (see `host_memory`).

    Returns patches (N, 1176) and grid_thw, int64 (3,) on the CPU: (ceil(T / 2), height / 14,
    width / 14), whose product is N.
    Raises ValueError for another dtype, rank, size, option or `out`, and for empty frames.
    """
    frames, _ = as_thwc(frames)
    height, width = check_size(frames.shape[1:3] if size is None else size, multiple=PATCH * MERGE)
    check_choice("resample", resample, tuple(RESAMPLE))
    check_choice("rounding", rounding, ROUNDING)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"mean and std must be three numbers, std > 0; got {mean} and {std}")
    grid = (-(-frames.shape[0] // TEMPORAL_PATCH), height // PATCH, width // PATCH)
    shape = (grid[0] * grid[1] * grid[2], PATCH_VALUES)
    if out is None:
        on_cpu = frames.device.type == "cpu"
        out = empty(shape, dtype) if on_cpu else frames.new_empty(shape, dtype=dtype)
    else:
        check_out(out, shape, dtype, frames.device)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    _op(frames, out, [height, width], resample, rounding, list(mean), list(std))
    return out, torch.tensor(grid, dtype=torch.int64, device="cpu")
