"""The tables of the CUDA resize, multiplied out as the kernels do, against torch's resize."""

import itertools

import numpy as np
import pytest
import torch

from vcr1_fast.ops.backend import native
from vcr1_fast.ops.resample import taps
from vcr1_fast.ops.resample_tiles import GROUP, SHARED_LIMIT, STEP, cuda_plan, tile_table

SIZES = [(1920, 532), (1080, 308), (160, 56), (61, 84), (28, 476), (700, 17), (5, 1), (1, 28)]


def unpack(table, planes):
    """(tiles, groups, 16, 32 steps) weights: every byte looked up where the format puts it."""
    tiles = len(table.spans)
    data = table.weights.numpy().reshape(tiles, table.groups, table.steps, planes, 32, 4, 4)
    out = np.zeros((tiles, table.groups, GROUP, STEP * table.steps), np.int64)
    for step, lane, register, byte in itertools.product(
        range(table.steps), range(32), range(4), range(4)
    ):
        output = 8 * (register % 2) + lane // 4
        pixel = STEP * step + 16 * (register // 2) + 4 * (lane % 4) + byte
        parts = data[:, :, step, :, lane, register, byte].astype(np.int64)
        parts[..., 0] = np.where(parts[..., 0] < 128, parts[..., 0], parts[..., 0] - 256)
        for plane in range(planes):
            out[:, :, output, pixel] = 256 * out[:, :, output, pixel] + parts[..., plane]
    return out


def torch_row(row, n_out, mode):
    image = row.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    out = torch.nn.functional.interpolate(image, (1, n_out), mode=mode, antialias=True)
    return out[0, 0, 0].long().numpy()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("tile", "align", "planes"), [(56, 16, 2), (28, 1, 2), (14, 1, 3)])
@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_products_of_the_table_are_the_resize(n_in, n_out, tile, align, planes, mode):
    axis = taps(n_in, n_out, mode, True, "u8")
    table = tile_table(axis, n_in, tile, align, planes)
    weights = unpack(table, planes)
    row = torch.randint(
        0, 256, (n_in,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n_in)
    )
    # What a tile does not read is noise in the kernels, and must weigh nothing.
    pixels = np.full(n_in + table.reach + align, 255, np.int64)
    pixels[:n_in] = row.numpy()
    result = np.zeros(n_out, np.int64)
    for index, (first, count, *groups) in enumerate(table.spans.tolist()):
        assert first % align == 0
        assert 0 < count <= table.span <= table.reach
        assert first + count <= n_in
        for group, (offset, steps) in enumerate(zip(groups[::2], groups[1::2], strict=True)):
            assert offset % 4 == 0
            assert offset + STEP * table.steps <= table.reach
            assert not weights[index, group, :, STEP * steps :].any()
            begin = first + offset
            sums = weights[index, group] @ pixels[begin : begin + STEP * table.steps]
            values = ((sums + (1 << axis.bits - 1)) >> axis.bits).clip(0, 255)
            for i in range(GROUP):
                output = index * tile + group * GROUP + i
                if group * GROUP + i < tile and output < n_out:
                    result[output] = values[i]
                else:
                    assert not weights[index, group, i].any()
    if n_in == 1:
        assert (result == row.item()).all()
    else:
        np.testing.assert_array_equal(result, torch_row(row, n_out, mode))


@pytest.mark.skipif(native is None or not native.has_cuda, reason="built without CUDA")
def test_plans_fit_the_shared_memory():
    device = torch.device("cpu")  # the plan alone needs no GPU
    plan = cuda_plan((1080, 1920), (308, 532), "bicubic", True, "u8", device)
    # Five blocks a multiprocessor of 227 KiB, 1.5 KiB of it the look-up table.
    assert 5 * (plan.shared_bytes + 1536) < 222 * 1024
    for height, width in ((4320, 7680), (308, 30_000), (60_000, 532)):
        plan = cuda_plan((height, width), (308, 532), "bicubic", True, "pil", device)
        assert plan.shared_bytes <= SHARED_LIMIT
