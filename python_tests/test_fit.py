"""Frames resized where they are decoded give the patches of the plain way, bit for bit."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import BACKENDS, ClipReader, VideoError, read_clip, read_image
from vcr1_fast.model.qwen2_5_vl.preprocessor import Fit, ImageProcessorConfig, VideoProcessorConfig
from vcr1_fast.model.qwen2_5_vl.processor import Processor
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.train import setup

av = pytest.importorskip("av")
pytest.importorskip("decord")
Image = pytest.importorskip("PIL.Image")
SIZE = (270, 480)
FRAMES = FrameConfig(num_frames=12, max_pixels=64 * 784, total_pixels=12 * 32 * 784)


def write_video(path, size=SIZE, frames=24):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (size[0] // 6, size[1] // 6, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *base.shape[:2], "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 5 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit")
    write_video(path / "a.mp4")
    pixels = np.random.default_rng(1).integers(0, 256, (251, 333, 3), np.uint8)
    Image.fromarray(pixels).save(path / "a.png")
    (path / "frames").mkdir()
    for i in range(12):
        Image.fromarray(np.roll(pixels, i, axis=0)).save(path / "frames" / f"{i:03d}.png")
    write_tiny(
        path / "model", texts=["When?"], config=TinyConfig(layers=1, hidden_size=32, heads=2)
    )
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder / "model").with_frames(FRAMES)


def same(a, b):
    return torch.equal(a.pixel_values_videos, b.pixel_values_videos) and torch.equal(
        a.video_grid_thw, b.video_grid_thw
    )


CONFIGS = {
    "budget of the clip": FRAMES,
    "per frame": dataclasses.replace(FRAMES, total_pixels=None),
    "enlarged": dataclasses.replace(FRAMES, min_pixels=400 * 784, max_pixels=800 * 784),
    # The size chosen for a frame of this size is another one again: 336 x 588 to 308 x 560.
    "not settled": dataclasses.replace(
        FRAMES, min_pixels=240 * 784, max_pixels=240 * 784, total_pixels=None
    ),
    "odd number": dataclasses.replace(FRAMES, total_pixels=7 * 33 * 784),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_are_the_same_bit_for_bit(folder, processor, config, backend):
    processor = processor.with_frames(config)
    for path, times in ((folder / "a.mp4", None), (folder / "frames", [0.0, 0.0, 0.31, 1.0, 1.1])):
        plain = read_clip(str(path), config, times=times, backend=backend)
        fitted = read_clip(str(path), config, times=times, backend=backend, fit=processor.fit())
        assert plain.frames.shape[1:] != fitted.frames.shape[1:] and fitted.fitted
        assert np.array_equal(plain.times, fitted.times) and plain.fps == fitted.fps
        a, b = processor.prompt("x", [plain]), processor.prompt("x", [fitted])
        assert same(a, b)
        grid = a.video_grid_thw[0].tolist()
        assert list(fitted.frames.shape[1:3]) == [14 * grid[1], 14 * grid[2]]


def test_the_case_of_sizes_that_do_not_settle_is_one():
    config = VideoProcessorConfig(min_pixels=240 * 784, max_pixels=240 * 784)
    once = config.size(12, *SIZE)
    assert config.size(12, *once) != once


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_frames_that_were_turned_upright(processor, turn):
    frame = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    turned = np.rot90(frame, turn)
    expected = processor.fit()(turned.copy(), 4)
    assert np.array_equal(processor.fit()(turned, 4), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_video_that_lies_on_its_side(folder, processor, backend):
    data = bytearray(Path(write_video(folder / "upright.mp4", (96, 192))).read_bytes())
    place = data.find(b"tkhd") + 44  # the display matrix of the track header, 16.16 fixed point
    matrix = [0, 1, 0, -1, 0, 0, 0, 0, 1 << 14]  # a quarter turn
    data[place : place + 36] = b"".join((v << 16).to_bytes(4, "big", signed=True) for v in matrix)
    path = folder / "turned.mp4"
    path.write_bytes(data)
    plain = read_clip(str(path), FRAMES, backend=backend)
    assert plain.frames.shape[1] > plain.frames.shape[2]
    fitted = read_clip(str(path), FRAMES, backend=backend, fit=processor.fit())
    assert same(processor.prompt("x", [plain]), processor.prompt("x", [fitted]))


def test_images_are_the_same_bit_for_bit(folder, processor):
    for changes in ({}, {"max_pixels": 40 * 784}, {"min_pixels": 300 * 784}):
        bounded = processor.with_image(**changes)
        plain = read_image(str(folder / "a.png"))
        fitted = read_image(str(folder / "a.png"), bounded.fit())
        a, b = bounded.prompt("x", [plain]), bounded.prompt("x", [fitted])
        assert torch.equal(a.pixel_values, b.pixel_values)
        assert torch.equal(a.image_grid_thw, b.image_grid_thw)


def test_other_roundings_are_left_to_the_processor(processor):
    assert processor.fit() is not None
    for other in ("pil", "f32", "none"):
        assert processor.with_video(rounding=other).fit() is None
        assert processor.with_image(rounding=other).fit() is None
    with pytest.raises(ValueError, match="'f32'"):
        Fit(VideoProcessorConfig(rounding="f32"), ImageProcessorConfig())


def test_workers_send_small_frames(folder, processor):
    path = write_video(folder / "wide.mp4", (540, 960))
    records = [
        Record("a", "ocr", path, {"question": "x"}, "y"),
        Record("b", "ocr", None, {"question": "x"}, "y", image=str(folder / "a.png")),
        Record("c", "ocr", str(folder / "frames"), {"question": "x"}, "y", metadata={"fps": 3}),
    ]
    requests = [clip_request(record, FRAMES) for record in records]
    with ClipReader(workers=1, fit=processor.fit()) as reader:
        video, image, frames = reader.read(requests)
    # The budget counts pairs of frames: what becomes of them is half as many patches.
    assert video.frames.nbytes <= 2 * FRAMES.total_pixels * 3 < 12 * 540 * 960 * 3
    assert same(processor.prompt("x", [video]), processor.prompt("x", [read_clip(path, FRAMES)]))
    assert image.fitted and image.fps is None
    assert frames.duration == pytest.approx(4.0)  # 12 frames at the 3 a second of the record


def test_full_frames_are_not_all_in_memory_at_once(folder, processor):
    """numpy reports what it allocates to tracemalloc: PyAV's frames are numpy's."""
    path = write_video(folder / "large.mp4", (480, 852), frames=16)
    config = FrameConfig(num_frames=16, max_pixels=16 * 784, total_pixels=None)
    processor = processor.with_frames(config)
    peaks = []
    for fit in (None, processor.fit()):
        tracemalloc.start()
        read_clip(path, config, backend="pyav", fit=fit)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    full = 480 * 852 * 3
    assert peaks[0] > 16 * full and peaks[1] < 4 * full + 16 * 16 * 784 * 3


def test_a_shape_that_cannot_be_resized_names_the_file(folder, processor):
    Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(folder / "thin.png")
    with pytest.raises(VideoError, match=r"thin\.png: aspect ratio"):
        read_image(str(folder / "thin.png"), processor.fit())


@pytest.mark.parametrize("bounds", [(None, None), (28 * 28, 56 * 56)])
def test_runs_hold_small_frames_and_bound_images(tmp_path, folder, bounds):
    model, _ = write_inputs(tmp_path)
    records = [
        Record("a", "ocr", str(folder / "a.mp4"), {"question": "x"}, "y"),
        Record("b", "ocr", None, {"question": "x"}, "y", image=str(folder / "a.png")),
    ]
    write_records(tmp_path / "data.jsonl", records)
    overrides = [
        f"data.frames.image_{name}_pixels={value}"
        for name, value in zip(("min", "max"), bounds, strict=True)
        if value is not None
    ]
    config = configure(model, tmp_path / "data.jsonl", tmp_path / "run", *overrides)
    with setup.open_run(config, reference=False) as run:
        batch = next(run.batches())
        assert run.source._cache.bytes < 8 * 3136 * 3 + 600 * 784 * 3
    images = [sample.prompt for sample in batch if sample.record.image]
    (count,) = {prompt.patches for prompt in images}
    assert count == (2 * 4 if bounds[1] else 18 * 24)  # 28 x 56, or 252 x 336: nearest to 251 x 333
    with pytest.raises(ValueError, match="image_max_pixels must be positive, got 0"):
        FrameConfig(image_max_pixels=0)
