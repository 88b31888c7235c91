"""Video frames to the patch rows that a vision encoder reads, in one pass.

    resize (resize_frames.py) -> repeat the last frame until T divides by TP
    -> (x - 255 mean_c) / (255 std_c) in fp32 -> cut into patches -> cast

With patch P, merge M and temporal patch TP, pixel (t, h, w, c) of the resized clip goes to

    row     (((t // TP * (grid_h // M) + h // PM) * (grid_w // M) + w // PM) * M + h // P % M) * M
            + w // P % M
    column  ((c * TP + t % TP) * P + h % P) * P + w % P

so M * M neighbouring rows make one token of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native
from vcr1_fast.ops.host_memory import empty
from vcr1_fast.ops.resize_frames import (
    RESAMPLE,
    ROUNDING,
    as_thwc,
    check_choice,
    check_out,
    check_size,
    cpu_plan,
    cuda_plan,
    current_stream,
    resize_reference,
    scratch,
)

if TYPE_CHECKING:
    import numpy as np

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PatchLayout:
    """How a model family cuts frames into patches and normalises them.

    patch: side of a square patch in pixels; merge: side, in patches, of the square that makes one
    token; temporal: frames in a patch; mean, std: of the three channels, in units of 0..1.
    The native kernels are compiled for the shapes of csrc/patch_layout.h, (patch, merge, temporal)
    = (14, 2, 2) and (16, 2, 2); the backend "reference" takes any.
    Raises ValueError for counts below 1, another number of channels, or a std that is not positive.
    """

    patch: int
    merge: int
    temporal: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("patch", "merge", "temporal"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(
                f"mean and std must be three numbers, std > 0; got {self.mean} and {self.std}"
            )

    @property
    def token(self) -> int:
        """Side of a token's square in pixels; frame sizes are multiples of it."""
        return self.patch * self.merge

    @property
    def values(self) -> int:
        """Values of a patch: columns of the result."""
        return 3 * self.temporal * self.patch * self.patch

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches along time, height and width of a clip; their product counts the rows."""
        return -(-frames // self.temporal), height // self.patch, width // self.patch


CLIP_14 = PatchLayout(
    patch=14,
    merge=2,
    temporal=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
"""Default layout of `video_patches`: patches of 14 with CLIP's normalisation."""


def pixel_scale(layout: PatchLayout) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels in units of pixel values."""
    # Rounded to fp32 before the 255, as transformers does: the other order changes the last bit.
    # Named dtype and device: the caller's defaults must not reach the pixels.
    mean, std = (
        torch.tensor(x, dtype=torch.float32, device="cpu") for x in (layout.mean, layout.std)
    )
    return mean * 255.0, std * 255.0


def video_patches_reference(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    layout: PatchLayout,
) -> None:
    p, m, tp = layout.patch, layout.merge, layout.temporal
    x = resize_reference(frames, size, resample, True, rounding)
    # The last frame is repeated, as by transformers' processor; so an image fills its patch.
    missing = -len(x) % tp
    x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
    offset, scale = (v.to(x.device) for v in pixel_scale(layout))
    x = (x.float() - offset) / scale
    rows, columns = size[0] // p, size[1] // p
    # Rows in the order of tokens: the m x m patches that the merger joins are neighbours. A row is
    # (channel, time, height, width), the order of the weights of the encoder's projection.
    x = x.view(-1, tp, rows // m, m, p, columns // m, m, p, 3)
    out.copy_(x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, layout.values))


def _cpu(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    layout: PatchLayout,
) -> None:
    plan = cpu_plan(tuple(frames.shape[1:3]), tuple(size), resample, True, rounding)
    # Scratch memory is per thread.
    threads = torch.get_num_threads()
    native.video_patches(
        frames=frames,
        out=out,
        plan=plan,
        scratch=scratch(plan, threads),
        num_threads=threads,
        **_native_layout(layout),
    )


def _cuda(
    frames: Tensor,
    out: Tensor,
    size: Sequence[int],
    resample: str,
    rounding: str,
    layout: PatchLayout,
) -> None:
    sizes = tuple(frames.shape[1:3]), tuple(size)
    # Tiles of whole patches: a block writes a patch's channel without its neighbours' values.
    unit, stream = layout.patch, current_stream(frames)
    plan = cuda_plan(*sizes, resample, True, rounding, frames.device, unit=unit, stream=stream)
    native.video_patches(frames=frames, out=out, plan=plan, **_native_layout(layout))


@functools.lru_cache(maxsize=64)  # a process has a layout or two; the tensors cost 10 us a call
def _native_layout(layout: PatchLayout) -> dict[str, Any]:
    offset, scale = (v.tolist() for v in pixel_scale(layout))
    return {
        "patch": layout.patch,
        "merge": layout.merge,
        "temporal": layout.temporal,
        "offset": offset,
        "scale": scale,
    }


# The op's schema cannot carry a dataclass: it is built again from its fields, once per layout.
_layout = functools.lru_cache(maxsize=64)(PatchLayout)


def _with_layout(fn: Callable[..., None]) -> Callable[..., None]:
    """`fn` for the op's schema, which has no dataclasses: a layout's fields come by name."""

    def run(
        frames: Tensor,
        out: Tensor,
        size: Sequence[int],
        resample: str,
        rounding: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        **counts: int,
    ) -> None:
        layout = _layout(mean=tuple(mean), std=tuple(std), **counts)
        fn(frames, out, size, resample, rounding, layout)

    return run


def _fake(frames: Tensor, out: Tensor, *_: Any, **__: Any) -> None:
    return None


_op = Op(
    "video_patches",
    "(Tensor frames, Tensor(a!) out, int[] size, str resample, str rounding, *, "
    "int patch, int merge, int temporal, float[] mean, float[] std) -> ()",
    _fake,
)
_op.register("reference", _with_layout(video_patches_reference))
_op.register("cpu", _with_layout(_cpu))
_op.register("cuda", _with_layout(_cuda))


def video_patches(
    frames: Tensor | np.ndarray,
    size: Sequence[int] | None = None,
    *,
    layout: PatchLayout = CLIP_14,
    resample: str = "bicubic",
    rounding: str = "u8",
    dtype: torch.dtype = torch.bfloat16,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Resize, normalise and cut a clip into patch rows.

    frames: uint8, (T, H, W, 3) or (T, 3, H, W) with any strides, or a numpy array (not copied).
    size: (height, width) in pixels, multiples of `layout.token`; None: no resize, the frames' own
        size is checked.
    layout: patch sizes and normalisation; a model family has its own. The default is CLIP_14.
    resample, rounding: as in `resize_frames`; always antialiased. The default gives what
        transformers' processor gives on CPU, to the bit, rounded once to `dtype`.
    dtype: float32, bfloat16 or float16.
    mean, std: of the three channels, in units of 0..1, instead of the layout's.
    out: where to write: contiguous (N, layout.values) of `dtype`. Without it, large results on the
        CPU reuse the memory of earlier, released ones (see `host_memory`).

    Returns patches (N, layout.values) and grid_thw, int64 (3,) on the CPU: (ceil(T / temporal),
    height / patch, width / patch), whose product is N.
    Raises ValueError for another dtype, rank, size, option or `out`, for empty frames, and for a
    layout that the kernels are not compiled for.
    """
    frames, _ = as_thwc(frames)
    if mean is not None or std is not None:
        mean = layout.mean if mean is None else tuple(mean)
        std = layout.std if std is None else tuple(std)
        layout = replace(layout, mean=mean, std=std)
    # Frames that a decoding worker has resized pass through without a resize.
    given = frames.shape[1:3] if size is None else size
    height, width = check_size(given, multiple=layout.token)
    check_choice("resample", resample, tuple(RESAMPLE))
    check_choice("rounding", rounding, ROUNDING)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    grid = layout.grid(frames.shape[0], height, width)
    shape = (grid[0] * grid[1] * grid[2], layout.values)
    if out is None:
        on_cpu = frames.device.type == "cpu"
        out = empty(shape, dtype) if on_cpu else frames.new_empty(shape, dtype=dtype)
    else:
        check_out(out, shape, dtype, frames.device)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    _op(
        frames,
        out,
        [height, width],
        resample,
        rounding,
        patch=layout.patch,
        merge=layout.merge,
        temporal=layout.temporal,
        mean=list(layout.mean),
        std=list(layout.std),
    )
    return out, torch.tensor(grid, dtype=torch.int64, device="cpu")
