"""Filter tables of the CUDA resize: the weights of `resample.py`, cut into tiles for tensor cores.

A block of threads makes a tile of the output. Along each axis, a tile of n outputs is handled in
groups of 16 consecutive ones, and a group's source pixels in steps of 32: a step is the product of
a 16 x 32 matrix of weights with 32 x 8 pixels. Weights are cut into bytes ("planes": the highest is
signed, the others are not), each plane a matrix of its own. The matrices lie in memory as the
instruction wants them in registers (`multiply_add` in csrc/cuda/ptx.cuh):

    weights[tile, group, step, plane, lane, register, byte]    uint8
        is byte `plane` of the weight of output 8 (register % 2) + lane // 4 of the group and
        pixel 32 step + 16 (register // 2) + 4 (lane % 4) + byte from where the group begins

    spans[tile] = (first pixel, pixels, then for each group: where it begins after the first
                   pixel, steps that hold weights)    int32

Groups begin a multiple of four pixels (a word) after their tile, and tiles, across, at multiples of
16 (48 bytes of RGB keep the alignment of a row).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import native
from vcr1_fast.ops.resample import Taps, taps

GROUP, STEP, WORD = 16, 32, 4
ALIGN_ACROSS = 16  # pixels
TILES = ((28, 56), (14, 56), (28, 28), (14, 28), (14, 14))  # (rows, columns) of patches of 14
SHARED_LIMIT = 99 * 1024 - 3 * 256 * 4  # bytes a block may have on any GPU, less a look-up table
PLANES = {"u8": 2, "pil": 3}
_METHOD = {"u8": "matrix16", "pil": "matrix22", "f32": "float_rounded", "none": "float"}


class TileTable(NamedTuple):
    """One axis, as the module's docstring says; span and reach are the most pixels that a tile
    reads, and that its steps go over."""

    spans: Tensor
    weights: Tensor
    groups: int
    steps: int
    span: int
    reach: int


def tile_table(table: Taps, n_in: int, tile: int, align: int, planes: int) -> TileTable:
    """Cuts the integer weights of one axis into tiles of `tile` outputs."""
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


def _scalar_table(table: Taps) -> TileTable:
    weights = table.weights.contiguous()
    return TileTable(table.start.int(), weights, 0, weights.shape[1], 0, 0)


def _plan(
    method: str,
    sizes: Sequence[tuple[int, int]],
    tables: Sequence[TileTable],
    bits: Sequence[int],
    tile: Sequence[int],
    device: torch.device,
) -> Any:
    return native.CudaResizePlan(
        method,
        sizes,
        [t.spans.to(device) for t in tables],
        [t.weights.flatten().to(device) for t in tables],
        [
            (n, b, t.groups, t.steps, t.span, t.reach)
            for n, b, t in zip(tile, bits, tables, strict=True)
        ],
    )


@functools.lru_cache(maxsize=256)
def cuda_plan(
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    resample: str,
    antialias: bool,
    rounding: str,
    device: torch.device,
) -> Any:
    """The native module's CudaResizePlan of one pair of (height, width), its tables on `device`.

    Integer roundings take the largest tile whose working set fits a block's shared memory, and
    plain loops where none does (shrinking some 15 times and more).
    """
    sizes = tuple(zip(size_in, size_out, strict=True))
    tables = [taps(n_in, n_out, resample, antialias, rounding) for n_in, n_out in sizes]
    bits = [t.bits for t in tables]
    if size_in == size_out and rounding != "none":  # every rounding keeps the pixels
        return _plan("copy", sizes, [_scalar_table(t) for t in tables], bits, (0, 0), device)
    if rounding not in PLANES:
        scalar = [_scalar_table(t) for t in tables]
        return _plan(_METHOD[rounding], sizes, scalar, bits, (0, 0), device)
    for tile in TILES:
        cut = [
            tile_table(table, n_in, n, align, PLANES[rounding])
            for table, (n_in, _), n, align in zip(
                tables, sizes, tile, (1, ALIGN_ACROSS), strict=True
            )
        ]
        plan = _plan(_METHOD[rounding], sizes, cut, bits, tile, torch.device("cpu"))
        if plan.shared_bytes <= SHARED_LIMIT:
            return _plan(_METHOD[rounding], sizes, cut, bits, tile, device)
    return _plan("int", sizes, [_scalar_table(t) for t in tables], bits, (0, 0), device)
