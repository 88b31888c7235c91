"""video_patches against a numpy model of the layout and transformers' own video processor."""

import numpy as np
import pytest
import torch
from gpu_backend import device_of, needs_gpu, through_gpu, to_gpu, with_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import require_torchvision

from vcr1_fast import ops
from vcr1_fast.ops.resize_frames import ROUNDING
from vcr1_fast.ops.video_patches import CLIP_14, PatchLayout, _op, video_patches_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every shape that the kernels are compiled for; the second with Qwen3-VL's normalisation.
LAYOUTS = [CLIP_14, PatchLayout(16, 2, 2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))]
OTHER = PatchLayout(7, 3, 4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))  # not compiled
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.patch))


def of_14(size, layout):
    """A size given for patches of 14, with as many patches of the layout."""
    return tuple(x // 14 * layout.patch for x in size)


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


def model(frames, mean=None, std=None, layout=CLIP_14):
    """Where each value of a resized clip lands, pixel by pixel, normalised in fp32."""
    patch, merge, temporal = layout.patch, layout.merge, layout.temporal
    x = frames.numpy()
    while len(x) % temporal:
        x = np.concatenate([x, x[-1:]])
    offset = np.array(mean or layout.mean, np.float32) * np.float32(255)
    scale = np.array(std or layout.std, np.float32) * np.float32(255)
    x = (x.astype(np.float32) - offset) / scale
    steps, height, width, _ = x.shape
    rows, columns = height // patch, width // patch
    t, h, w, c = np.meshgrid(*map(np.arange, x.shape), indexing="ij")
    token = patch * merge
    row = t // temporal
    for part, size in (
        (h // token, rows // merge),
        (w // token, columns // merge),
        (h // patch % merge, merge),
        (w // patch % merge, merge),
    ):
        row = row * size + part
    column = ((c * temporal + t % temporal) * patch + h % patch) * patch + w % patch
    shape = (steps // temporal * rows * columns, 3 * temporal * patch**2)
    out = np.full(shape, np.nan, np.float32)
    out[row, column] = x
    return torch.from_numpy(out), [steps // temporal, rows, columns]


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
@by_layout
def test_equals_the_model(backend, layout, shape, size, dtype):
    frames, size = noise(shape), of_14(size, layout)
    patches, grid = ops.video_patches(frames, size, layout=layout, dtype=dtype)
    expected, expected_grid = model(torch_resize(frames, size), layout=layout)
    assert grid.tolist() == expected_grid
    assert grid.dtype == torch.int64
    assert patches.dtype == dtype
    assert torch.equal(patches, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 28, 28), (1, 56, 84), (3, 84, 140)])
@by_layout
def test_without_resize(backend, layout, shape, dtype):
    shape = (shape[0], *of_14(shape[1:], layout))
    frames = noise(shape)
    expected, expected_grid = model(frames, layout=layout)
    for size in (None, shape[1:]):
        patches, grid = ops.video_patches(frames, size, layout=layout, dtype=dtype)
        assert grid.tolist() == expected_grid
        assert torch.equal(patches, expected.to(dtype))


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@by_layout
def test_resizes_as_resize_frames_does(backend, layout, mode, rounding):
    frames, size = noise((3, 45, 61)), of_14((56, 28), layout)
    resized = ops.resize_frames(frames, size, resample=mode, rounding=rounding)
    patches, _ = ops.video_patches(
        frames, size, layout=layout, resample=mode, rounding=rounding, dtype=torch.float32
    )
    assert torch.equal(patches, model(resized, layout=layout)[0])


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
@by_layout
def test_out_is_filled_and_nothing_else(backend, layout, dtype, size):
    frames, sentinel = noise((3, *of_14((28, 56), layout))), 77.0
    size = size and of_14(size, layout)
    expected, _ = ops.video_patches(frames, size, layout=layout, dtype=dtype)
    n = len(expected)
    buffer = torch.full((n + 2, layout.values), sentinel, dtype=dtype)
    result, _ = ops.video_patches(frames, size, layout=layout, dtype=dtype, out=buffer[1:-1])
    assert result.data_ptr() == buffer[1:].data_ptr()
    assert torch.equal(buffer[1:-1], expected)
    assert (buffer[0] == sentinel).all()
    assert (buffer[-1] == sentinel).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 5, 31])
@by_layout
def test_out_may_start_anywhere(backend, layout, dtype, shift):
    """Memory that is aligned to one element only, with sentinels on both sides."""
    frames, sentinel, size = noise((4, 60, 90)), 77.0, of_14((56, 84), layout)
    expected, _ = ops.video_patches(frames, size, layout=layout, dtype=dtype)
    buffer = torch.full((expected.numel() + 64,), sentinel, dtype=dtype)
    out = buffer[shift : shift + expected.numel()].view(expected.shape)
    ops.video_patches(frames, size, layout=layout, dtype=dtype, out=out)
    assert torch.equal(out, expected)
    assert (buffer[:shift] == sentinel).all()
    assert (buffer[shift + expected.numel() :] == sentinel).all()


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@by_layout
def test_backends_agree_to_the_bit(backend, layout, rounding, dtype):
    for shape, size in CASES:
        frames, size = noise(shape, seed=5), of_14(size, layout)
        result, _ = ops.video_patches(frames, size, layout=layout, rounding=rounding, dtype=dtype)
        expected = torch.empty_like(result)
        video_patches_reference(frames, expected, size, "bicubic", rounding, layout)
        assert torch.equal(result, expected)


@by_layout
def test_same_bits_again_and_for_every_number_of_threads(backend, layout):
    frames, size = noise((5, 50, 70)), of_14((56, 84), layout)
    expected, _ = ops.video_patches(frames, size, layout=layout)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.video_patches(frames, size, layout=layout)[0], expected)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 80), st.integers(1, 80)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_clip_equals_the_model(shape, grid, seed, layout):
    frames, size = noise(shape, seed), (grid[0] * layout.token, grid[1] * layout.token)
    patches, _ = ops.video_patches(frames, size, layout=layout, dtype=torch.float32)
    assert torch.equal(patches, model(torch_resize(frames, size), layout=layout)[0])


def test_the_reference_takes_any_layout_and_the_kernels_say_what_they_take():
    frames = noise((5, 50, 70))
    with ops.use("reference"):
        patches, grid = ops.video_patches(frames, (42, 63), layout=OTHER, dtype=torch.float32)
    expected, expected_grid = model(torch_resize(frames, (42, 63)), layout=OTHER)
    assert grid.tolist() == expected_grid == [2, 6, 9]
    assert torch.equal(patches, expected)
    if "cpu" in _op.backends():
        with pytest.raises(ValueError, match=r"\(7, 3, 4\), only for \(14, 2, 2\) \(16, 2, 2\)"):
            ops.video_patches(frames, (42, 63), layout=OTHER)


def test_mean_and_std_take_the_place_of_the_layouts(backend):
    frames = noise((2, 32, 32))
    layout = LAYOUTS[1]
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for options in ({"mean": mean}, {"std": std}, {"mean": mean, "std": std}):
        patches, _ = ops.video_patches(frames, layout=layout, dtype=torch.float32, **options)
        assert torch.equal(patches, model(frames, layout=layout, **options)[0])


CLIPS = [((16, 720, 1280), (252, 448)), ((5, 360, 640), (224, 392)), ((3, 1080, 1920), (308, 532))]


@pytest.mark.parametrize("rounding", ["u8", "pil", "f32", "none"])
@pytest.mark.parametrize(("shape", "size"), CLIPS)
@by_layout
@needs_gpu
def test_cpu_and_cuda_give_the_same_bits(layout, shape, size, rounding):
    """Clips of the sizes that models train on, in tiles enough for every multiprocessor."""
    frames, size = noise(shape, seed=9), of_14(size, layout)
    planar = frames.permute(0, 3, 1, 2).contiguous()
    for dtype in DTYPES:
        options = {"layout": layout, "rounding": rounding, "dtype": dtype}
        with ops.use("cpu,cuda"):
            expected, _ = ops.video_patches(frames, size, **options)
            result, _ = ops.video_patches(to_gpu(frames), size, **options)
            again, _ = ops.video_patches(to_gpu(planar), size, **options)
        assert torch.equal(result.cpu(), expected)
        assert torch.equal(result, again)


@pytest.mark.parametrize("rounding", ROUNDING)
def test_opcheck_and_compile(rounding, backend):
    frames = noise((3, 30, 50)).to(device_of(backend))
    out = torch.empty(2 * 4 * 6, 1176, device=frames.device)
    arguments = (frames, out, [56, 84], "bicubic", rounding)
    layout = {name: list(x) if name in ("mean", "std") else x for name, x in vars(CLIP_14).items()}
    torch.library.opcheck(torch.ops.vcr1_fast.video_patches.default, arguments, layout)

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
    with pytest.raises(ValueError, match="mean and std must be three"):
        ops.video_patches(frames, (28, 28), mean=())
    with pytest.raises(ValueError, match=r"multiples of 32.*28 x 64"):
        ops.video_patches(frames, (28, 64), layout=LAYOUTS[1])
    for name in ("patch", "merge", "temporal"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            PatchLayout(**{**vars(CLIP_14), name: 0})
