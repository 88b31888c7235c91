"""video_patches against a numpy model of the layout and transformers' own video processor."""

import numpy as np
import pytest
import torch
from gpu_backend import device_of, needs_gpu, through_gpu, to_gpu, with_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import require_torchvision

from vcr1_fast import ops
from vcr1_fast.ops.resample import ROUNDING
from vcr1_fast.ops.video_patches import CLIP_MEAN, CLIP_STD, _op
from vcr1_fast.ops.video_patches import reference as reference_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=with_cuda(_op))
def backend(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setattr(ops, "video_patches", through_gpu(ops.video_patches))
    with ops.use(request.param):
        yield request.param


def noise(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def torch_resize(frames, size):
    out = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
    )
    return out.permute(0, 2, 3, 1)


def model(frames, mean=CLIP_MEAN, std=CLIP_STD):
    """Where each value of a resized clip lands, pixel by pixel, normalised in fp32."""
    x = frames.numpy()
    if len(x) % 2:
        x = np.concatenate([x, x[-1:]])
    offset = np.array(mean, np.float32) * np.float32(255)
    scale = np.array(std, np.float32) * np.float32(255)
    x = (x.astype(np.float32) - offset) / scale
    steps, height, width, _ = x.shape
    rows, columns = height // 14, width // 14
    t, h, w, c = np.meshgrid(*map(np.arange, x.shape), indexing="ij")
    row = t // 2
    for part, size in (
        (h // 28, rows // 2),
        (w // 28, columns // 2),
        (h // 14 % 2, 2),
        (w // 14 % 2, 2),
    ):
        row = row * size + part
    column = ((c * 2 + t % 2) * 14 + h % 14) * 14 + w % 14
    out = np.full((steps // 2 * rows * columns, 1176), np.nan, np.float32)
    out[row, column] = x
    return torch.from_numpy(out), [steps // 2, rows, columns]


CASES = [  # (T, H, W), (h, w)
    ((2, 90, 160), (56, 84)),
    ((5, 40, 70), (28, 56)),  # odd T
    ((1, 100, 90), (112, 84)),  # one frame, one axis grows
    ((3, 28, 28), (56, 84)),
    ((4, 56, 70), (56, 28)),
    ((2, 60, 84), (28, 84)),
    ((2, 28, 1000), (28, 28)),  # ratio > 32
    ((2, 33, 45), (28, 476)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_equals_the_model(backend, shape, size, dtype):
    frames = noise(shape)
    patches, grid = ops.video_patches(frames, size, dtype=dtype)
    expected, expected_grid = model(torch_resize(frames, size))
    assert grid.tolist() == expected_grid
    assert grid.dtype == torch.int64
    assert patches.dtype == dtype
    assert torch.equal(patches, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 28, 28), (1, 56, 84), (3, 84, 140)])
def test_without_resize(backend, shape, dtype):
    frames = noise(shape)
    expected, expected_grid = model(frames)
    for size in (None, shape[1:]):
        patches, grid = ops.video_patches(frames, size, dtype=dtype)
        assert grid.tolist() == expected_grid
        assert torch.equal(patches, expected.to(dtype))


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizes_as_resize_frames_does(backend, mode, rounding):
    frames = noise((3, 45, 61))
    resized = ops.resize_frames(frames, (56, 28), resample=mode, rounding=rounding)
    patches, _ = ops.video_patches(
        frames, (56, 28), resample=mode, rounding=rounding, dtype=torch.float32
    )
    assert torch.equal(patches, model(resized)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pixel_value_is_rounded_once(backend, dtype):
    """All 256 values in each channel, with other constants than CLIP's."""
    values = torch.arange(28 * 28, dtype=torch.int64).remainder(256).to(torch.uint8)
    frames = values.view(1, 28, 28, 1).repeat(1, 1, 1, 3)
    for mean, std in (
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.25, 1.0), (1e-3, 1.0, 0.333)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        patches, _ = ops.video_patches(frames, mean=mean, std=std, dtype=dtype)
        assert torch.equal(patches, model(frames, mean, std)[0].to(dtype))


def transformers_processor():
    """The video processor of transformers, or a skip that says why it cannot run."""
    require_torchvision()
    try:
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except ImportError as error:
        pytest.skip(f"transformers' video processor does not import: {error}")
    return Qwen2VLVideoProcessor


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("steps", [4, 3, 1])
def test_equals_transformers(backend, steps):
    processor = transformers_processor()(size={"shortest_edge": 3136, "longest_edge": 28 * 28 * 20})
    frames = noise((steps, 130, 201))
    theirs = processor(videos=[frames.numpy()], return_tensors="pt", do_sample_frames=False)
    grid = theirs["video_grid_thw"][0]
    size = (int(grid[1]) * 14, int(grid[2]) * 14)
    patches, ours = ops.video_patches(frames, size, dtype=torch.float32)
    assert ours.tolist() == grid.tolist()
    assert torch.equal(patches, theirs["pixel_values_videos"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_order_of_frames_does_not_matter(backend, dtype):
    frames = noise((3, 61, 50))
    expected, _ = ops.video_patches(frames, (56, 28), dtype=dtype)
    channels_first = frames.permute(0, 3, 1, 2)
    padded = torch.zeros(3, 64, 55, 4, dtype=torch.uint8)
    padded[:, 1:62, 2:52, :3] = frames
    for same in (
        frames.numpy(),
        channels_first,
        channels_first.contiguous(),
        padded[:, 1:62, 2:52, :3],
        frames.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(ops.video_patches(same, (56, 28), dtype=dtype)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(56, 84), None])
def test_out_is_filled_and_nothing_else(backend, dtype, size):
    frames, sentinel = noise((3, 28, 56)), 77.0
    expected, _ = ops.video_patches(frames, size, dtype=dtype)
    n = len(expected)
    buffer = torch.full((n + 2, 1176), sentinel, dtype=dtype)
    result, _ = ops.video_patches(frames, size, dtype=dtype, out=buffer[1:-1])
    assert result.data_ptr() == buffer[1:].data_ptr()
    assert torch.equal(buffer[1:-1], expected)
    assert (buffer[0] == sentinel).all()
    assert (buffer[-1] == sentinel).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 5, 31])
def test_out_may_start_anywhere(backend, dtype, shift):
    """Memory that is aligned to one element only, with sentinels on both sides."""
    frames, sentinel = noise((4, 60, 90)), 77.0
    expected, _ = ops.video_patches(frames, (56, 84), dtype=dtype)
    buffer = torch.full((expected.numel() + 64,), sentinel, dtype=dtype)
    out = buffer[shift : shift + expected.numel()].view(expected.shape)
    ops.video_patches(frames, (56, 84), dtype=dtype, out=out)
    assert torch.equal(out, expected)
    assert (buffer[:shift] == sentinel).all()
    assert (buffer[shift + expected.numel() :] == sentinel).all()


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_to_the_bit(backend, rounding, dtype):
    for shape, size in CASES:
        frames = noise(shape, seed=5)
        result, _ = ops.video_patches(frames, size, rounding=rounding, dtype=dtype)
        expected = torch.empty_like(result)
        reference_op(frames, expected, size, "bicubic", rounding, CLIP_MEAN, CLIP_STD)
        assert torch.equal(result, expected)


def test_same_bits_again_and_for_every_number_of_threads(backend):
    frames = noise((5, 50, 70))
    expected, _ = ops.video_patches(frames, (56, 84))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.video_patches(frames, (56, 84))[0], expected)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 80), st.integers(1, 80)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_any_clip_equals_the_model(shape, grid, seed):
    frames, size = noise(shape, seed), (grid[0] * 28, grid[1] * 28)
    patches, _ = ops.video_patches(frames, size, dtype=torch.float32)
    assert torch.equal(patches, model(torch_resize(frames, size))[0])


CLIPS = [((16, 720, 1280), (252, 448)), ((5, 360, 640), (224, 392)), ((3, 1080, 1920), (308, 532))]


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize(("shape", "size"), CLIPS)
@needs_gpu
def test_cpu_and_cuda_give_the_same_bits(shape, size, rounding):
    """Clips of the sizes that models train on, in tiles enough for every multiprocessor."""
    frames = noise(shape, seed=9)
    for dtype in DTYPES:
        with ops.use("cpu,cuda"):
            expected, _ = ops.video_patches(frames, size, rounding=rounding, dtype=dtype)
            result, _ = ops.video_patches(to_gpu(frames), size, rounding=rounding, dtype=dtype)
            again, _ = ops.video_patches(
                to_gpu(frames.permute(0, 3, 1, 2).contiguous()),
                size,
                rounding=rounding,
                dtype=dtype,
            )
        assert torch.equal(result.cpu(), expected)
        assert torch.equal(result, again)


@pytest.mark.parametrize("rounding", ROUNDING)
def test_opcheck_and_compile(rounding, backend):
    frames = noise((3, 30, 50)).to(device_of(backend))
    out = torch.empty(2 * 4 * 6, 1176, device=frames.device)
    arguments = (frames, out, [56, 84], "bicubic", rounding, list(CLIP_MEAN), list(CLIP_STD))
    torch.library.opcheck(torch.ops.vcr1_fast.video_patches.default, arguments)

    def step(x):
        patches, grid = ops.video_patches(x, (56, 84), rounding=rounding)
        return patches * 2, grid

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(frames), step(frames), strict=True):
        assert torch.equal(ours, expected)


def test_errors_name_the_values():
    frames = noise((2, 30, 56))
    with pytest.raises(ValueError, match="30 x 56"):
        ops.video_patches(frames)
    with pytest.raises(ValueError, match="28 x 42"):
        ops.video_patches(frames, (28, 42))
    with pytest.raises(ValueError, match="empty"):
        ops.video_patches(frames[:0], (28, 28))
    with pytest.raises(ValueError, match="int32"):
        ops.video_patches(frames, (28, 28), dtype=torch.int32)
    with pytest.raises(ValueError, match="std"):
        ops.video_patches(frames, (28, 28), std=(0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match=r"\(4, 1176\)"):
        ops.video_patches(frames, (28, 28), out=torch.empty(5, 1176, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="contiguous"):
        ops.video_patches(frames, (28, 28), out=torch.empty(1176, 4, dtype=torch.bfloat16).t())
