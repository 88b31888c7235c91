"""Filter tables of separable resizing: the source pixels an output pixel reads, and their weights.

One axis with n_in source and n_out output pixels, scale s = n_in / n_out, filter half-width k
(2 for bicubic, 1 for bilinear) stretched to r = k * max(s, 1) when antialiasing:

    centre_i = s * (i + 1/2)
    reads j in [int(centre_i - r + 1/2), int(centre_i + r + 1/2)) cut to the image
    w_ij = f((j + 1/2 - centre_i) / max(s, 1)) / sum_j f(...)

f is the Keys cubic with a = -1/2, or the triangle. Without antialiasing the filter keeps its own
width, pixels outside the image repeat the border, and the cubic has a = -3/4, as in torch.

The integer tables fix the rounding that two libraries are known for:

- "u8":  int16 weights with the largest p <= 22 that keeps the biggest weight below 2^15 (torch's
  uint8 kernels, pillow-simd);
- "pil": int32 weights with p = 22 (Pillow).

Either way a pass computes clip((sum_j w_ij x_j + 2^(p-1)) >> p, 0, 255). The "f32" and "none"
roundings use the float64 weights rounded to float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import native

RESAMPLE = {"bilinear": 1, "bicubic": 2}  # name -> filter half-width in pixels
ROUNDING = ("u8", "pil", "f32", "none")
PILLOW_BITS = 22


class Taps(NamedTuple):
    """The table of one axis.

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
    # The bits of the integer weights hang on the order of this sum: left to right.
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
    half = torch.where(weights < 0, -0.5, 0.5)
    return torch.trunc(half + weights * (1 << bits)).to(torch.int32)


@functools.lru_cache(maxsize=256)
def taps(n_in: int, n_out: int, resample: str, antialias: bool, rounding: str) -> Taps:
    """The table of one axis; an axis that does not change gets weight one, exact in every mode."""
    if n_in == n_out:
        start, weights = torch.arange(n_out), torch.ones(n_out, 1, dtype=torch.float64)
    else:
        start, weights = (_antialiased if antialias else _plain)(n_in, n_out, resample)
    if rounding in ("f32", "none"):
        return Taps(start, weights.float(), 0)
    bits = PILLOW_BITS
    if rounding == "u8":
        largest, bits = float(weights.max()), 0
        while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < (1 << 15):
            bits += 1
    return Taps(start, _quantise(weights, bits), bits)


def resample_axis(x: Tensor, dim: int, n_out: int, table: Taps) -> Tensor:
    """One pass over one axis in plain torch: (..., n_in, ...) -> (..., n_out, ...).

    Integer tables: uint8 -> uint8. Float tables: any -> float32, the products added left to right
    without fusing, so that kernels can reproduce the bits.
    """
    x = x.movedim(dim, 0).contiguous()  # whole slabs to gather
    start, weights = table.start.to(x.device), table.weights.to(x.device)
    total = torch.zeros((n_out, *x.shape[1:]), dtype=weights.dtype, device=x.device)
    for k in range(weights.shape[1]):
        source = x.index_select(0, (start + k).clamp(max=len(x) - 1))
        total = total + source * weights[:, k].view(-1, *[1] * (x.dim() - 1))
    if table.bits:
        total = ((total + (1 << (table.bits - 1))) >> table.bits).clamp(0, 255).to(torch.uint8)
    return total.movedim(0, dim)


_NATIVE_MODE = {"u8": "int16", "pil": "int22", "f32": "float_rounded", "none": "float"}


def _native_table(table: Taps, rounding: str) -> tuple[Tensor, Tensor]:
    """(first, weights) as csrc/kernels.h describes ResizeAxis: integer taps come in pairs."""
    if not table.bits:
        return table.start.int(), table.weights.contiguous()
    odd = table.start % 2
    n_out, taps_out = table.weights.shape
    columns = -(-(taps_out + 1) // 2) * 2
    weights = torch.zeros(n_out, columns, dtype=torch.int32)
    weights.scatter_(1, odd[:, None] + torch.arange(taps_out), table.weights)
    while columns > 2 and not weights[:, columns - 2 :].any():
        columns -= 2
    weights = weights[:, :columns]
    if rounding == "pil":  # too wide for int16: high part, then low byte
        weights = torch.cat([weights >> 8, weights & 255], dim=1)
    return (table.start // 2).int(), weights.to(torch.int16)


@functools.lru_cache(maxsize=256)
def native_plan(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    resample: str,
    antialias: bool,
    rounding: str,
) -> Any:
    """The native module's ResizePlan of one pair of (height, width)."""
    tables = [
        taps(n_in, n_out, resample, antialias, rounding)
        for n_in, n_out in zip(size_in, size_out, strict=True)
    ]
    # Without a resize every rounding keeps the pixels.
    unchanged = size_in == size_out and rounding != "none"
    return native.ResizePlan(
        "copy" if unchanged else _NATIVE_MODE[rounding],
        size_in,
        size_out,
        [_native_table(t, rounding)[0] for t in tables],
        [_native_table(t, rounding)[1] for t in tables],
        [t.bits for t in tables],
    )
