"""Antialiased resize of uint8 video frames, exact to the bit.

Two separable passes, horizontal first. One axis with n_in source and n_out output pixels, scale
s = n_in / n_out, filter half-width k (2 for bicubic, 1 for bilinear) stretched to
r = k * max(s, 1) when antialiasing:

    centre_i = s * (i + 1/2)
    reads j in [int(centre_i - r + 1/2), int(centre_i + r + 1/2)) cut to the image
    w_ij = f((j + 1/2 - centre_i) / max(s, 1)) / sum_j f(...)

f is the Keys cubic with a = -1/2, or the triangle. Without antialiasing the filter keeps its own
width, pixels outside the image repeat the border, and the cubic has a = -3/4, as in torch.

`rounding` names the library whose arithmetic is reproduced:

- "u8":   torch's uint8 CPU kernels and pillow-simd: int16 weights with the largest p <= 22 that
          keeps the biggest weight below 2^15, uint8 between the passes. Transformers' video
          processors give these pixels on CPU.
- "pil":  Pillow: int32 weights with p = 22, uint8 between the passes. Always horizontal first, as
          every Pillow before 13; Pillow 13 runs the vertical pass first where it reduces the height
          by much more than the width, and then differs in the last bit.
- "f32":  fp32 passes, then clamp to 0..255 and round half to even (transformers on CUDA,
          qwen-vl-utils), uint8 out. Equal to torch's up to its fp32 filter weights: now and then
          a pixel differs by one.
- "none": the fp32 passes alone, float32 out; the cubic may overshoot 0..255.

An integer pass computes clip((sum_j w_ij x_j + 2^(p-1)) >> p, 0, 255). The fp32 passes use the
float64 weights rounded to float32.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native

if TYPE_CHECKING:
    import numpy as np

RESAMPLE = {"bilinear": 1, "bicubic": 2}  # name -> filter half-width in pixels
ROUNDING = ("u8", "pil", "f32", "none")
PILLOW_BITS = 22

# Filter tables.


class Taps(NamedTuple):
    """Filter table of one axis.

    start (n_out,) int64: first source pixel read; weights (n_out, K): int32 or float32, zero beyond
    the last pixel read; bits: p of the integer tables, 0 for float ones.
    """

    start: Tensor
    weights: Tensor
    bits: int


def _keys_cubic(x: Tensor, a: float) -> Tensor:
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _triangle(x: Tensor) -> Tensor:
    return (1.0 - x.abs()).clamp(min=0.0)


def _antialiased(n_in: int, n_out: int, resample: str) -> tuple[Tensor, Tensor]:
    scale = n_in / n_out
    radius = RESAMPLE[resample] * max(scale, 1.0)
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    centre = scale * (torch.arange(n_out, dtype=torch.float64) + 0.5)
    start = (centre - radius + 0.5).to(torch.int64).clamp(min=0)  # to() truncates, as a C cast does
    count = (centre + radius + 0.5).to(torch.int64).clamp(max=n_in) - start

    column = torch.arange(math.ceil(radius) * 2 + 1)
    offset = ((column + start[:, None]).double() - centre[:, None] + 0.5) * inverse
    weights = _keys_cubic(offset, -0.5) if resample == "bicubic" else _triangle(offset)
    weights = torch.where(column < count[:, None], weights, 0.0)
    # Left to right, as torch and Pillow add: another order changes the last bit of some weights.
    total = torch.zeros(n_out, dtype=torch.float64)
    for k in range(len(column)):
        total = total + weights[:, k]
    weights = torch.where(total[:, None] != 0, weights / total[:, None], weights)
    return start, weights[:, : int(count.max())]


def _plain(n_in: int, n_out: int, resample: str) -> tuple[Tensor, Tensor]:
    k = RESAMPLE[resample]
    centre = (n_in / n_out) * (torch.arange(n_out, dtype=torch.float64) + 0.5) - 0.5
    first = centre.floor().to(torch.int64) - (k - 1)
    column = torch.arange(2 * k)
    offset = (column + first[:, None]).double() - centre[:, None]
    raw = _keys_cubic(offset, -0.75) if resample == "bicubic" else _triangle(offset)
    start = first.clamp(0, max(n_in - 2 * k, 0))
    index = (first[:, None] + column).clamp(0, n_in - 1) - start[:, None]
    weights = torch.zeros(n_out, min(2 * k, n_in), dtype=torch.float64)
    return start, weights.scatter_add_(1, index, raw)


def _quantise(weights: Tensor, bits: int) -> Tensor:
    # Half away from zero, then truncate, as a C cast does: torch.round would take halves to even.
    half = torch.where(weights < 0, -0.5, 0.5)
    return torch.trunc(half + weights * (1 << bits)).to(torch.int32)


@functools.lru_cache(maxsize=256)
def taps(n_in: int, n_out: int, resample: str, antialias: bool, rounding: str) -> Taps:
    """Filter table of one axis; an unchanged axis has weight one, exact in every rounding."""
    if n_in == n_out:
        start, weights = torch.arange(n_out), torch.ones(n_out, 1, dtype=torch.float64)
    else:
        start, weights = (_antialiased if antialias else _plain)(n_in, n_out, resample)
    if rounding in ("f32", "none"):
        return Taps(start, weights.float(), 0)
    bits = PILLOW_BITS
    if rounding == "u8":
        # The largest scale at which no weight overflows int16, as torch's kernels choose it.
        largest, bits = float(weights.max()), 0
        while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < (1 << 15):
            bits += 1
    return Taps(start, _quantise(weights, bits), bits)


def resample_axis(x: Tensor, dim: int, n_out: int, table: Taps) -> Tensor:
    """One pass over one axis in plain torch: (..., n_in, ...) -> (..., n_out, ...).

    Integer tables: uint8 -> uint8. Float tables: any -> float32, the products added left to right
    without fusing, so that kernels can reproduce the bits.
    """
    x = x.movedim(dim, 0).contiguous()  # index_select then copies whole slabs
    start, weights = table.start.to(x.device), table.weights.to(x.device)
    total = torch.zeros((n_out, *x.shape[1:]), dtype=weights.dtype, device=x.device)
    for k in range(weights.shape[1]):
        # Past the last pixel the weight is zero, so which pixel is read does not matter.
        source = x.index_select(0, (start + k).clamp(max=len(x) - 1))
        total = total + source * weights[:, k].view(-1, *[1] * (x.dim() - 1))
    if table.bits:
        total = ((total + (1 << (table.bits - 1))) >> table.bits).clamp(0, 255).to(torch.uint8)
    return total.movedim(0, dim)


def resized_dtype(rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "none" else torch.uint8


def resize_reference(
    frames: Tensor, size: Sequence[int], resample: str, antialias: bool, rounding: str
) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, h, w, 3) uint8, or float32 for "none"."""
    height, width = size
    x = resample_axis(frames, 2, width, taps(frames.shape[2], width, resample, antialias, rounding))
    x = resample_axis(x, 1, height, taps(frames.shape[1], height, resample, antialias, rounding))
    if rounding == "f32":
        x = x.clamp(0, 255).round()
    return x.to(resized_dtype(rounding))


# Plans: the same tables in the form that the kernels read.

_CPU_MODE = {"u8": "int16", "pil": "int22", "f32": "float_rounded", "none": "float"}
_CUDA_METHOD = {"u8": "matrix16", "pil": "matrix22", "f32": "float_rounded", "none": "float"}


def _keeps_pixels(size_in: tuple[int, int], size_out: tuple[int, int], rounding: str) -> bool:
    # "none" gives float32, so even an unchanged frame is converted.
    return size_in == size_out and rounding != "none"


def _cpu_table(table: Taps, rounding: str) -> tuple[Tensor, Tensor]:
    """(first, weights) as csrc/kernels.h describes ResizeAxis: integer taps come in pairs.

    The kernels multiply and add two int16 products at a time (pmaddwd), so a row of weights begins
    at an even pixel.
    """
    if not table.bits:
        return table.start.int(), table.weights.contiguous()
    odd = table.start % 2
    n_out, taps_out = table.weights.shape
    columns = -(-(taps_out + 1) // 2) * 2
    weights = torch.zeros(n_out, columns, dtype=torch.int32)
    weights.scatter_(1, odd[:, None] + torch.arange(taps_out), table.weights)
    # The parity may have added a pair that no row needs.
    while columns > 2 and not weights[:, columns - 2 :].any():
        columns -= 2
    weights = weights[:, :columns]
    if rounding == "pil":  # too wide for int16: high part, then low byte
        weights = torch.cat([weights >> 8, weights & 255], dim=1)
    return (table.start // 2).int(), weights.to(torch.int16)


@functools.lru_cache(maxsize=256)
def cpu_plan(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    resample: str,
    antialias: bool,
    rounding: str,
) -> Any:
    """The native module's ResizePlan of one pair of (height, width)."""

    def axis(n_in: int, n_out: int) -> Any:
        table = taps(n_in, n_out, resample, antialias, rounding)
        first, weights = _cpu_table(table, rounding)
        return native.ResizeAxis(
            n_in=n_in, n_out=n_out, bits=table.bits, first=first, weights=weights
        )

    copies = _keeps_pixels(size_in, size_out, rounding)
    return native.ResizePlan(
        mode="copy" if copies else _CPU_MODE[rounding],
        vertical=axis(size_in[0], size_out[0]),
        horizontal=axis(size_in[1], size_out[1]),
    )


def scratch(plan: Any, threads: int) -> Tensor:
    """Memory that the CPU kernels need for `plan`, uint8."""
    return torch.empty(threads * plan.scratch_bytes, dtype=torch.uint8)


# Tables for tensor cores. A block of threads makes a tile of the output. Along each axis, a tile of
# n outputs is handled in groups of 16 consecutive ones, and a group's source pixels in steps of 32:
# a step is the product of a 16 x 32 matrix of weights with 32 x 8 pixels.

GROUP, STEP, WORD = 16, 32, 4
ALIGN_ACROSS = 16  # pixels: 48 bytes of RGB keep the alignment of a row
PLANES = {"u8": 2, "pil": 3}  # bytes of a weight
# (rows, columns) of the tiles to try, largest first, in units. At most 64 columns: a block has four
# warps, and a warp takes a group of 16 of them.
_TILES = ((2, 4), (1, 4), (2, 2), (1, 2), (1, 1))
# Bytes of shared memory that a block may have on any GPU, less a look-up table.
SHARED_LIMIT = 99 * 1024 - 3 * 256 * 4


class TileTable(NamedTuple):
    """Weights of one axis, cut into tiles.

    weights[tile, group, step, plane, lane, register, byte], uint8: byte `plane` of the weight of
        output 8 (register % 2) + lane // 4 of the group and pixel
        32 step + 16 (register // 2) + 4 (lane % 4) + byte from where the group begins. The highest
        byte is signed, the others are not. This is the order in which the matrix instruction wants
        them in registers (`multiply_add` in csrc/cuda/ptx.cuh).
    spans[tile], int32: first pixel, pixels, then for each group where it begins after the first
        pixel and the steps that hold weights.
    span, reach: the most pixels that a tile reads, and that its steps go over.
    """

    spans: Tensor
    weights: Tensor
    groups: int
    steps: int
    span: int
    reach: int


def tile_table(table: Taps, n_in: int, tile: int, align: int, planes: int) -> TileTable:
    """Cut the integer weights of one axis into tiles of `tile` outputs.

    Tiles begin at multiples of `align` pixels, groups a multiple of four pixels (a word) after
    their tile: the kernels load whole words.
    """
    n_out, width = table.weights.shape
    groups, tiles = -(-tile // GROUP), -(-n_out // tile)
    within = torch.arange(groups * GROUP)
    output = torch.arange(tiles)[:, None] * tile + within
    inside = (output < n_out) & (within < tile)
    output = output.clamp(max=n_out - 1).view(tiles, groups, GROUP)
    inside = inside.view(tiles, groups, GROUP)

    start = table.start[output]
    end = torch.where(inside, (start + width).clamp(max=n_in), 0)
    begin = torch.where(inside, start, n_in).amin(-1)
    first = begin.amin(1, keepdim=True) // align * align
    offset = (begin - first) // WORD * WORD
    pixels = end.amax(-1) - first - offset  # of a group; none inside: negative
    offset = torch.where(pixels > 0, offset, 0)
    steps = -(-pixels.clamp(min=0) // STEP)
    most = max(int(steps.max()), 2)  # two are worth a kernel with its weights in registers

    # Dense groups; a weight past the last pixel is zero and falls in the margin, which is cut off.
    column = (start - (first + offset)[..., None]).clamp(min=0)[..., None] + torch.arange(width)
    values = torch.where(inside[..., None], table.weights[output], 0)
    dense = torch.zeros(tiles, groups, GROUP, most * STEP + width, dtype=torch.int32)
    dense.scatter_(3, column.clamp(max=dense.shape[3] - 1), values)
    dense = dense[..., : most * STEP]
    shifts = torch.arange(planes - 1, -1, -1) * 8
    parts = (dense[..., None] >> shifts) & 255
    # (output / 8, output % 8), (step, half, lane, byte), plane
    parts = parts.view(tiles, groups, 2, 8, most, 2, 4, 4, planes)
    weights = parts.permute(0, 1, 4, 8, 3, 6, 5, 2, 7).to(torch.uint8).contiguous()

    count = (end.amax((1, 2)) - first[:, 0])[:, None]
    pairs = torch.stack([offset, steps], dim=-1).view(tiles, -1)
    spans = torch.cat([first, count, pairs], dim=1).int()
    span = int(count.max())
    reach = max(span, int(offset.max()) + most * STEP)
    return TileTable(spans, weights, groups, most, span, reach)


@functools.lru_cache(maxsize=256)
def cuda_plan(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    resample: str,
    antialias: bool,
    rounding: str,
    device: torch.device,
    unit: int = GROUP,
    stream: int = 0,
) -> Any:
    """The native module's CudaResizePlan of one pair of (height, width), its tables on `device`.

    unit: tiles are multiples of it; video_patches passes its patch, so that no tile cuts one.
    stream: the current one. Each has tables apart: the allocator may give memory that the cache
        drops to the next user of the stream it was made on, which another may still be reading.
    Integer roundings take the largest tile whose working set fits a block's shared memory, and
    plain loops where none does (shrinking some 15 times and more).
    """
    sizes = tuple(zip(size_in, size_out, strict=True))
    tables = [taps(n_in, n_out, resample, antialias, rounding) for n_in, n_out in sizes]

    def plan(method: str, axes: list[dict[str, Any]], on: torch.device) -> Any:
        vertical, horizontal = (
            native.ResizeAxis(
                n_in=n_in,
                n_out=n_out,
                bits=table.bits,
                first=axis["first"].to(on),
                weights=axis["weights"].flatten().to(on),
                **{name: x for name, x in axis.items() if name not in ("first", "weights")},
            )
            for (n_in, n_out), table, axis in zip(sizes, tables, axes, strict=True)
        )
        return native.CudaResizePlan(method=method, vertical=vertical, horizontal=horizontal)

    scalar = [
        {"first": t.start.int(), "weights": t.weights.contiguous(), "steps": t.weights.shape[1]}
        for t in tables
    ]
    if _keeps_pixels(size_in, size_out, rounding):
        return plan("copy", scalar, device)
    if rounding not in PLANES:
        return plan(_CUDA_METHOD[rounding], scalar, device)
    for rows, columns in _TILES:
        tile, axes = (rows * unit, columns * unit), []
        for table, (n_in, _), n, align in zip(tables, sizes, tile, (1, ALIGN_ACROSS), strict=True):
            fields = tile_table(table, n_in, n, align, PLANES[rounding])._asdict()
            axes.append({"first": fields.pop("spans"), "tile": n, **fields})
        # On the CPU first: the plan alone says whether the tile fits, and most need no second try.
        if plan(_CUDA_METHOD[rounding], axes, torch.device("cpu")).shared_bytes <= SHARED_LIMIT:
            return plan(_CUDA_METHOD[rounding], axes, device)
    return plan("int", scalar, device)


# The op.


def resize_frames_reference(
    frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str
) -> None:
    out.copy_(resize_reference(frames, out.shape[1:3], resample, antialias, rounding))


def _cpu(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    sizes = tuple(frames.shape[1:3]), tuple(out.shape[1:3])
    plan = cpu_plan(*sizes, resample, antialias, rounding)
    threads = torch.get_num_threads()
    native.resize_frames(
        frames=frames, out=out, plan=plan, scratch=scratch(plan, threads), num_threads=threads
    )


def current_stream(x: Tensor) -> int:
    """Number of the stream that work on `x` goes to; 0 on the CPU."""
    return torch.cuda.current_stream(x.device).stream_id if x.is_cuda else 0


def _cuda(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    sizes = tuple(frames.shape[1:3]), tuple(out.shape[1:3])
    stream = current_stream(frames)
    plan = cuda_plan(*sizes, resample, antialias, rounding, frames.device, stream=stream)
    native.resize_frames(frames=frames, out=out, plan=plan)


def _fake(frames: Tensor, out: Tensor, resample: str, antialias: bool, rounding: str) -> None:
    return None


_op = Op(
    "resize_frames",
    "(Tensor frames, Tensor(a!) out, str resample, bool antialias, str rounding) -> ()",
    _fake,
)
_op.register("reference", resize_frames_reference)
_op.register("cpu", _cpu)
_op.register("cuda", _cuda)


def as_thwc(frames: Tensor | np.ndarray) -> tuple[Tensor, bool]:
    """View uint8 frames as (T, H, W, 3) without a copy; True when they came as (T, 3, H, W)."""
    if not isinstance(frames, Tensor):
        with warnings.catch_warnings():
            # Arrays from np.frombuffer are read-only; the ops never write to frames.
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
    keeps its pixels, as in torch and Pillow.
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
