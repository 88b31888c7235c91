"""resize_frames against torch's uint8 resize, Pillow, fp32 interpolate and an exact numpy model."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from gpu_backend import device_of, through_gpu, with_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vcr1_fast import ops
from vcr1_fast.ops import backend as backend_module
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.resize_frames import (
    GROUP,
    ROUNDING,
    SHARED_LIMIT,
    STEP,
    _op,
    cuda_plan,
    resize_frames_reference,
    resized_dtype,
    taps,
    tile_table,
)

# vcr1_fast.ops.resize_frames is the function.
resize_frames_module = sys.modules["vcr1_fast.ops.resize_frames"]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = [  # (T, H, W), (h, w)
    ((2, 90, 160), (31, 56)),  # the ratio 2.86 of 720p to 252 x 448
    ((3, 45, 80), (28, 49)),
    ((1, 100, 90), (112, 84)),  # one axis grows
    ((2, 56, 56), (224, 224)),
    ((1, 111, 172), (47, 84)),  # odd
    ((2, 40, 33), (40, 17)),  # only the width changes
    ((2, 33, 40), (17, 40)),  # only the height
    ((2, 19, 23), (19, 23)),  # nothing does
    ((1, 150, 3), (4, 2)),  # ratio > 32
    ((1, 7, 700), (9, 17)),
    ((1, 1, 1), (28, 28)),
    ((1, 2, 5), (1, 1)),
    ((5, 16, 16), (15, 17)),
]


@pytest.fixture(params=with_cuda(_op))
def backend(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setattr(ops, "resize_frames", through_gpu(ops.resize_frames))
    with ops.use(request.param):
        yield request.param


def noise(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def torch_resize(frames, size, mode="bicubic", antialias=True):
    """torch's own resize of (T, H, W, 3): uint8 in, uint8 out; float in, float out."""
    out = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2), size, mode=mode, antialias=antialias, align_corners=False
    )
    return out.permute(0, 2, 3, 1)


def pillow_resize(frames, size, mode="bicubic"):
    """Two one-axis calls, horizontal first: the order of Pillow before 13, whatever the version."""
    height, width = size
    out = []
    for frame in frames.numpy():
        wide = Image.fromarray(frame).resize((width, frame.shape[0]), PILLOW[mode])
        out.append(np.asarray(wide.resize((width, height), PILLOW[mode])))
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_u8_equals_torch_to_the_bit(backend, shape, size, mode):
    frames = noise(shape)
    result = ops.resize_frames(frames, size, resample=mode)
    assert result.dtype == torch.uint8
    assert torch.equal(result, torch_resize(frames, size, mode))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_u8_with_weights_as_fine_as_pillows(backend, mode):
    # Shrunk so much that every weight fits int16 with 22 bits of fraction.
    frames = noise((1, 5, 3840))
    assert taps(3840, 14, mode, True, "u8").bits == taps(3840, 14, mode, True, "pil").bits
    assert torch.equal(
        ops.resize_frames(frames, (3, 14), resample=mode), torch_resize(frames, (3, 14), mode)
    )


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_u8_without_antialias_equals_torch(backend, shape, size, mode):
    frames = noise(shape)
    result = ops.resize_frames(frames, size, resample=mode, antialias=False)
    assert torch.equal(result, torch_resize(frames, size, mode, antialias=False))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_pil_equals_pillow_to_the_bit(backend, shape, size, mode):
    frames = noise(shape)
    result = ops.resize_frames(frames, size, resample=mode, rounding="pil")
    assert torch.equal(result, pillow_resize(frames, size, mode))


@pytest.mark.parametrize(("shape", "size"), [((1, 90, 160), (31, 56)), ((1, 64, 48), (96, 80))])
def test_pil_equals_one_call_of_pillow(backend, shape, size):
    frames = noise(shape)
    whole = Image.fromarray(frames[0].numpy()).resize((size[1], size[0]), PILLOW["bicubic"])
    result = ops.resize_frames(frames, size, rounding="pil")
    assert torch.equal(result[0], torch.from_numpy(np.asarray(whole).copy()))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_float_modes_follow_fp32_interpolate(backend, shape, size, mode):
    frames = noise(shape)
    expected = torch_resize(frames.double(), size, mode)
    result = ops.resize_frames(frames, size, resample=mode, rounding="none")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-4)

    rounded = ops.resize_frames(frames, size, resample=mode, rounding="f32")
    assert rounded.dtype == torch.uint8
    expected = expected.clamp(0, 255)
    difference = (rounded.double() - expected.round()).abs()
    assert difference.max() <= 1
    near_tie = (expected.frac() - 0.5).abs() < 2e-4  # where fp32 may fall on either side
    assert (difference[~near_tie] == 0).all()


def test_half_rounds_to_even(backend):
    frames = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)[..., None].expand(1, 2, 2, 3)
    # Means of the two columns: 0.5 and 2.5.
    f32 = ops.resize_frames(frames, (2, 1), resample="bilinear", rounding="f32")
    assert f32[0, :, 0, 0].tolist() == [0, 2]
    u8 = ops.resize_frames(frames, (2, 1), resample="bilinear")
    assert u8[0, :, 0, 0].tolist() == [1, 3]


def exact_weights(n_in, n_out, p=None):
    """The antialiased cubic table in pure Python, an output pixel at a time."""

    def cubic(x):
        a, x = -0.5, abs(x)
        if x < 1:
            return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
        return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0

    scale = n_in / n_out
    radius, rows = 2 * max(scale, 1.0), []
    for i in range(n_out):
        centre = scale * (i + 0.5)
        lo = max(int(centre - radius + 0.5), 0)
        hi = min(int(centre + radius + 0.5), n_in)
        row = [cubic((j - centre + 0.5) / max(scale, 1.0)) for j in range(lo, hi)]
        total = math.fsum(row)
        rows.append((lo, [w / total for w in row]))
    return rows


def test_pil_equals_an_integer_model(backend):
    frames = noise((1, 37, 41), seed=3)
    x = frames[0].numpy().astype(object)  # Python integers: no width to overflow
    for axis, n_out in ((1, 13), (0, 50)):
        x = np.moveaxis(x, axis, 0)
        out = []
        for lo, row in exact_weights(len(x), n_out):
            quantised = [int(w * 2**22 + math.copysign(0.5, w)) for w in row]
            total = sum(q * x[lo + k] for k, q in enumerate(quantised))
            out.append(np.clip((total + 2**21) >> 22, 0, 255))
        x = np.moveaxis(np.stack(out), 0, axis)
    result = ops.resize_frames(frames, (50, 13), rounding="pil")
    assert torch.equal(result[0], torch.from_numpy(x.astype(np.uint8)))


def strided_views():
    base = noise((4, 60, 50))
    padded = torch.zeros((4, 64, 60, 5), dtype=torch.uint8)
    padded[:, 2:62, 3:53, 1:4] = base
    planar = base.permute(0, 3, 1, 2).contiguous()
    return {
        "dense": (base, base),
        "crop": (padded[:, 2:62, 3:53, 1:4], base),
        "every second frame": (base[::2], base[::2].clone()),
        "every second pixel": (base[:, ::2, ::2], base[:, ::2, ::2].clone()),
        "planar memory": (planar.permute(0, 2, 3, 1), base),
        "one frame repeated": (base[:1].expand(3, -1, -1, -1), base[:1].repeat(3, 1, 1, 1)),
        "transposed": (base.transpose(1, 2), base.transpose(1, 2).clone()),
    }


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize("view", strided_views())
def test_strides_do_not_matter(backend, view, rounding):
    frames, dense = strided_views()[view]
    result = ops.resize_frames(frames, (25, 30), rounding=rounding)
    assert torch.equal(result, ops.resize_frames(dense, (25, 30), rounding=rounding))


@pytest.mark.parametrize("rounding", ["u8", "none"])
def test_channels_first_in_channels_first_out(backend, rounding):
    frames = noise((3, 30, 50))
    expected = ops.resize_frames(frames, (20, 41), rounding=rounding).permute(0, 3, 1, 2)
    view = frames.permute(0, 3, 1, 2)
    for planar in (view, view.contiguous()):
        result = ops.resize_frames(planar, (20, 41), rounding=rounding)
        assert result.shape == (3, 3, 20, 41)
        assert torch.equal(result, expected)


def test_numpy_input_also_read_only(backend):
    frames = noise((2, 30, 50))
    array = frames.numpy().copy()
    expected = ops.resize_frames(frames, (20, 41))
    assert torch.equal(ops.resize_frames(array, (20, 41)), expected)
    array.flags.writeable = False
    assert torch.equal(ops.resize_frames(array, (20, 41)), expected)


@pytest.mark.parametrize("layout", ["dense", "planar", "crop"])
@pytest.mark.parametrize("rounding", ["u8", "f32", "none"])
def test_out_is_filled_and_nothing_else(backend, rounding, layout):
    frames, sentinel = noise((2, 30, 50)), 77
    dtype = torch.float32 if rounding == "none" else torch.uint8
    if layout == "crop":
        buffer = torch.full((2, 24, 47, 5), sentinel, dtype=dtype)
        out = buffer[:, 1:21, 2:43, 1:4]
    elif layout == "planar":
        buffer = torch.full((4, 3, 20, 41), sentinel, dtype=dtype)
        out = buffer[1:3].permute(0, 2, 3, 1)
    else:
        buffer = torch.full((4, 20, 41, 3), sentinel, dtype=dtype)
        out = buffer[1:3]
    expected = ops.resize_frames(frames, (20, 41), rounding=rounding)
    assert ops.resize_frames(frames, (20, 41), rounding=rounding, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(sentinel)
    assert (buffer == sentinel).all()


def test_out_of_channels_first_frames(backend):
    frames = noise((2, 30, 50)).permute(0, 3, 1, 2)
    out = torch.zeros(2, 3, 20, 41, dtype=torch.uint8)
    assert ops.resize_frames(frames, (20, 41), out=out) is out
    assert torch.equal(out, ops.resize_frames(frames, (20, 41)))


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
def test_backends_agree_to_the_bit(backend, rounding):
    for shape, size in SIZES:
        frames = noise(shape, seed=5)
        result = ops.resize_frames(frames, size, rounding=rounding)
        expected = torch.empty_like(result)
        resize_frames_reference(frames, expected, "bicubic", True, rounding)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vbmi"])
def test_instruction_sets_agree_to_the_bit(isa):
    native = backend_module.native
    if native is None:
        pytest.skip("the native module is not built")
    try:
        native.choose_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for rounding in ("u8", "pil", "f32", "none"):
            for shape, size in SIZES:
                frames = noise(shape, seed=6)
                with ops.use("cpu"):
                    result = ops.resize_frames(frames, size, rounding=rounding)
                expected = torch.empty_like(result)
                resize_frames_reference(frames, expected, "bicubic", True, rounding)
                assert torch.equal(result, expected)
                with ops.use("cpu"):
                    patches = ops.video_patches(frames, (28, 56), rounding=rounding)[0]
                with ops.use("reference"):
                    expected = ops.video_patches(frames, (28, 56), rounding=rounding)[0]
                assert torch.equal(patches, expected)
    finally:
        native.choose_cpu_isa("auto")


# Every number of four-tap groups that has a loop of its own, and more; windows cut at the end of a
# row; n_in to n_out such that the largest "u8" weight needs more than two signed bytes.
TABLES = [
    ((37, 300), (74, 600)),  # 1 group
    ((45, 131), (27, 80)),
    ((72, 128), (25, 45)),
    ((66, 200), (17, 53)),
    ((90, 640), (15, 100)),  # 7
    ((64, 65), (9, 3)),
    ((46, 93), (45, 92)),
    ((64, 98), (15, 23)),  # needs the third byte on both axes
]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vbmi"])
@pytest.mark.parametrize(("shape", "size"), TABLES)
def test_every_kind_of_table_and_memory_order(isa, shape, size):
    native = backend_module.native
    if native is None:
        pytest.skip("the native module is not built")
    frames = noise((3, *shape), seed=8)
    expected = {mode: torch_resize(frames, size, mode) for mode in ("bicubic", "bilinear")}
    by_pillow = pillow_resize(frames, size)
    padded = torch.zeros(3, shape[0] + 2, shape[1] + 3, 4, dtype=torch.uint8)
    padded[:, 1:-1, 2:-1, :3] = frames
    orders = [
        frames,
        padded[:, 1:-1, 2:-1, :3],
        frames.flip(1).flip(1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        frames.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    threads = torch.get_num_threads()
    try:
        native.choose_cpu_isa(isa)
        with ops.use("cpu"):
            for n, same in enumerate(orders, start=1):
                torch.set_num_threads(n)
                for mode, whole in expected.items():
                    assert torch.equal(ops.resize_frames(same, size, resample=mode), whole)
                assert torch.equal(ops.resize_frames(same, size, rounding="pil"), by_pillow)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(threads)
        native.choose_cpu_isa("auto")


def test_a_u8_weight_of_three_signed_bytes_is_among_the_tables():
    largest = {
        int(taps(n_in, n_out, "bicubic", True, "u8").weights.abs().max())
        for shape, size in TABLES
        for n_in, n_out in zip(shape, size, strict=True)
    }
    assert any(weight > 127 * 256 + 127 for weight in largest), largest


def test_same_bits_again_and_for_every_number_of_threads(backend):
    frames = noise((5, 50, 70))
    expected = {r: ops.resize_frames(frames, (33, 44), rounding=r) for r in ("u8", "none")}
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for rounding, value in expected.items():
                assert torch.equal(ops.resize_frames(frames, (33, 44), rounding=rounding), value)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=30, deadline=None)
@given(
    value=st.integers(0, 255),
    sizes=st.tuples(*[st.integers(1, 70)] * 4),
    mode=st.sampled_from(["bicubic", "bilinear"]),
    rounding=st.sampled_from(["u8", "pil", "f32"]),
    antialias=st.booleans(),
)
def test_a_constant_image_stays_constant(value, sizes, mode, rounding, antialias):
    frames = torch.full((1, sizes[0], sizes[1], 3), value, dtype=torch.uint8)
    result = ops.resize_frames(
        frames, sizes[2:], resample=mode, rounding=rounding, antialias=antialias
    )
    assert (result == value).all()


@settings(max_examples=40, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 90)] * 4), seed=st.integers(0, 99))
def test_any_size_equals_torch(sizes, seed):
    frames = noise((2, *sizes[:2]), seed)
    assert torch.equal(ops.resize_frames(frames, sizes[2:]), torch_resize(frames, sizes[2:]))


def memory_orders(frames):
    """The same pixels in every order that the kernels tell apart."""
    steps, height, width, _ = frames.shape
    wide = torch.zeros(steps, height + 2, width + 5, 3, dtype=torch.uint8)
    wide[:, 1:-1, 2:-3] = frames
    line = -(-width * 3 // 16) * 16
    aligned = torch.zeros(steps * height * line, dtype=torch.uint8)
    aligned = aligned.as_strided(frames.shape, (height * line, line, 3, 1))
    aligned.copy_(frames)
    planes = torch.zeros(steps, 3, height, width + 3, dtype=torch.uint8)
    planes[..., 1:-2] = frames.permute(0, 3, 1, 2)
    padded = torch.cat([frames, frames[..., :1]], dim=3)
    return {
        "dense": frames,
        "crop": wide[:, 1:-1, 2:-3],
        "aligned": aligned,
        "planes": planes[..., 1:-2].permute(0, 2, 3, 1),
        "scattered": padded[..., :3],
    }


@pytest.mark.parametrize("name", ["dense", "crop", "aligned", "planes", "scattered"])
@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
def test_memory_order_does_not_matter(backend, rounding, name):
    for shape, size in [*SIZES, ((2, 131, 250), (40, 129)), ((1, 300, 333), (31, 29))]:
        frames = noise(shape, seed=8)
        expected = torch.empty(shape[0], *size, 3, dtype=resized_dtype(rounding))
        resize_frames_reference(frames, expected, "bicubic", True, rounding)
        result = ops.resize_frames(memory_orders(frames)[name], size, rounding=rounding)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("rounding", ROUNDING)
def test_opcheck_and_compile(rounding, backend):
    frames = noise((2, 30, 50)).to(device_of(backend))
    out = torch.empty(2, 20, 41, 3, dtype=resized_dtype(rounding), device=frames.device)
    torch.library.opcheck(
        torch.ops.vcr1_fast.resize_frames.default, (frames, out, "bicubic", True, rounding)
    )

    def step(x):
        return ops.resize_frames(x, (20, 41), rounding=rounding).float() + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(frames), step(frames))


def test_errors_name_the_values():
    frames = noise((2, 30, 50))
    with pytest.raises(ValueError, match="float32"):
        ops.resize_frames(frames.float(), (20, 20))
    with pytest.raises(ValueError, match=r"\(2, 30, 50\)"):
        ops.resize_frames(frames[..., 0], (20, 20))
    with pytest.raises(ValueError, match="empty"):
        ops.resize_frames(frames[:0], (20, 20))
    with pytest.raises(ValueError, match="height 0"):
        ops.resize_frames(frames, (0, 20))
    with pytest.raises(ValueError, match="lanczos"):
        ops.resize_frames(frames, (20, 20), resample="lanczos")
    with pytest.raises(ValueError, match="round"):
        ops.resize_frames(frames, (20, 20), rounding="round")
    with pytest.raises(ValueError, match=r"\(2, 20, 21, 3\)"):
        ops.resize_frames(frames, (20, 20), out=torch.empty(2, 20, 21, 3, dtype=torch.uint8))


# The tables of the CUDA resize, multiplied out as the kernels do, against torch's resize.

TILES = [(56, 16, 2), (64, 16, 2), (28, 1, 2), (14, 1, 3), (16, 1, 3)]
TABLE_SIZES = [(1920, 532), (1080, 308), (160, 56), (61, 84), (28, 476), (700, 17), (5, 1), (1, 28)]


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
@pytest.mark.parametrize(
    ("tile", "align", "planes"), [(56, 16, 2), (64, 16, 2), (28, 1, 2), (14, 1, 3), (16, 1, 3)]
)
@pytest.mark.parametrize(("n_in", "n_out"), TABLE_SIZES)
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
    plan = cuda_plan((1080, 1920), (308, 532), "bicubic", True, "u8", device, unit=14)
    # Five blocks a multiprocessor of 227 KiB, 1.5 KiB of it the look-up table.
    assert 5 * (plan.shared_bytes + 1536) < 222 * 1024
    for height, width in ((4320, 7680), (308, 30_000), (60_000, 532)):
        plan = cuda_plan((height, width), (308, 532), "bicubic", True, "pil", device)
        assert plan.shared_bytes <= SHARED_LIMIT


class RecordedAxis:
    """Stands in for the native classes of a CUDA plan, which a build without CUDA cannot make."""

    def __init__(self, **fields):
        vars(self).update(fields)


class RecordedPlan(RecordedAxis):
    @property
    def shared_bytes(self):  # larger tiles never fit: every tile is tried
        return SHARED_LIMIT + (self.vertical.tile > self.least)


@pytest.mark.parametrize("unit", [14, 16])
def test_cuda_tiles_are_whole_units_and_four_groups_at_most(unit, monkeypatch):
    tried = []

    def plan(**fields):
        tried.append(RecordedPlan(least=unit, **fields))
        return tried[-1]

    fake = RecordedAxis(ResizeAxis=RecordedAxis, CudaResizePlan=plan)
    monkeypatch.setattr(resize_frames_module, "native", fake)
    device = torch.device("cpu")
    build = cuda_plan.__wrapped__  # plans of the stand-in must not stay in the cache
    chosen = build((45, 80), (32 * unit, 48 * unit), "bicubic", True, "u8", device, unit=unit)
    assert (chosen.method, chosen.vertical.tile, chosen.horizontal.tile) == (
        "matrix16",
        unit,
        4 * unit,
    )
    for each in tried:
        for axis in (each.vertical, each.horizontal):
            assert axis.tile % unit == 0 and axis.groups == -(-axis.tile // GROUP) <= 4
        assert (each.vertical.n_in, each.vertical.n_out) == (45, 32 * unit)
        assert (each.horizontal.n_in, each.horizontal.n_out) == (80, 48 * unit)
        assert each.vertical.first.dtype == torch.int32 and each.horizontal.bits > 0
