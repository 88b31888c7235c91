"""`data.resize: device`: the worker path's patches to the bit, in the order that CUDA needs."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_backend import needs_gpu
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError
from vcr1_fast.model import checkpoint, forward
from vcr1_fast.model import staging as module
from vcr1_fast.model.staging import Staging, staging
from vcr1_fast.train import setup

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")
FRAMES = FrameConfig(num_frames=6, min_pixels=4 * 1024, max_pixels=24 * 1024)


def write_video(path, size, frames=12, turn=False):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (size[0], size[1], 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        # 4:4:4 has odd sizes.
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 5 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if turn:
        data = bytearray(path.read_bytes())
        place = data.find(b"tkhd") + 44  # the display matrix of the track header, 16.16 fixed point
        matrix = [0, 1, 0, -1, 0, 0, 0, 0, 1 << 14]  # a quarter turn
        words = [(v << 16).to_bytes(4, "big", signed=True) for v in matrix]
        data[place : place + 36] = b"".join(words)
        path.write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Requests by what is special about them."""
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(1).integers(0, 256, (131, 97, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "frames").mkdir()
    for i in range(7):
        Image.fromarray(np.roll(pixels, i, axis=0)).save(folder / "frames" / f"{i}.png")
    odd = write_video(folder / "odd.mp4", (111, 173))
    return {
        "odd size": ClipRequest(odd, FRAMES),
        "turned": ClipRequest(write_video(folder / "turned.mp4", (96, 160), turn=True), FRAMES),
        "folder": ClipRequest(str(folder / "frames"), FRAMES),
        "odd number, repeated": ClipRequest(odd, FRAMES, times=(0.0, 0.0, 0.4, 0.9, 0.2)),
        "image": ClipRequest(str(folder / "a.png"), FRAMES, is_image=True),
    }


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def processor(request, tmp_path_factory):
    model, _ = write_inputs(tmp_path_factory.mktemp(request.param), family=request.param, layers=4)
    loaded = checkpoint.load_processor(model).with_frames(FRAMES)
    assert loaded.video.layout.patch == (14 if request.param == "qwen2_5_vl" else 16)
    return loaded


def parts(prompt):
    return prompt.input_ids, prompt.positions, prompt.video_grid_thw, prompt.image_grid_thw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_are_those_of_the_worker_path(processor, media, dtype, monkeypatch):
    with ClipReader(workers=0, fit=processor.fit()) as reader:
        plain = list(reader.read(media.values()))
    # A pair of frames at a time, or the whole clip.
    for chunk in (1, module.CHUNK_BYTES):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
        stage = Staging(processor, CPU, dtype)
        with ClipReader(workers=0, stage=stage) as reader:
            staged = list(reader.read(media.values()))
        for name, one, other in zip(media, plain, staged, strict=True):
            assert one.fitted and not other.fitted and other.staged is not None, name
            a, b = processor.prompt("Why?", [one]), processor.prompt("Why?", [other])
            for ours, theirs in zip(parts(b), parts(a), strict=True):
                assert torch.equal(ours, theirs), name
            pairs = [
                (a.pixel_values_videos, b.pixel_values_videos),
                (a.pixel_values, b.pixel_values),
            ]
            for theirs, ours in pairs:
                assert (theirs is None) == (ours is None), name
                if theirs is not None:
                    # The encoder rounds what it gets to its dtype, once.
                    assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype)), name
            assert stage.bytes(other.frames.shape) >= other.staged[0].nbytes
        several = [staged[0], staged[2]]
        a = processor.prompt("Why?", [plain[0], plain[2]]).pixel_values_videos
        assert torch.equal(processor.prompt("Why?", several).pixel_values_videos, a.to(dtype))


@pytest.mark.parametrize("rounding", ["pil", "f32"])
def test_other_roundings_too(processor, media, rounding):
    other = processor.with_video(rounding=rounding)
    with ClipReader(workers=0) as reader:
        (clip,) = reader.read([media["odd size"]])
    ours = other.prompt("x", [Staging(other, CPU, torch.float32)(clip)])
    theirs = other.prompt("x", [clip])
    assert torch.equal(ours.pixel_values_videos, theirs.pixel_values_videos)


def test_a_shape_that_no_model_takes_names_the_file(processor, tmp_path):
    Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(tmp_path / "thin.png")
    stage = Staging(processor, CPU, torch.float32)
    assert stage.bytes((1, 4, 1000, 3)) == 0
    with ClipReader(workers=0, stage=stage) as reader:
        (error,) = reader.read([ClipRequest(str(tmp_path / "thin.png"), is_image=True)])
    assert isinstance(error, VideoError) and "thin.png: aspect ratio" in str(error)


class Recorder:
    """Stands for torch.cuda's streams and events, and says in which order they were used."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"side of {device}")
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        original = module.video_patches
        monkeypatch.setattr(
            module,
            "video_patches",
            lambda *args, **more: (self.calls.append("kernel"), original(*args, **more))[1],
        )

    @contextlib.contextmanager
    def stream(self, stream):
        self.calls.append(f"enter {stream}")
        yield
        self.calls.append("leave")

    def event(self, blocking):
        assert blocking
        return SimpleNamespace(
            record=lambda stream: self.calls.append(f"record on {stream}"),
            synchronize=lambda: self.calls.append("wait"),
        )


def test_the_order_of_streams_and_events(processor, media, monkeypatch):
    recorder = Recorder(monkeypatch)
    stage = Staging(processor, torch.device("cuda", 1), torch.float32)
    assert stage.pin
    stage.device = CPU  # the rest of the code is the same
    with ClipReader(workers=0) as reader:
        (clip,) = reader.read([media["odd size"]])
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * clip.frames[0].nbytes)
    staged = stage(clip)
    # All work on one side stream, and complete before anybody gets the patches or the frames go.
    side = "side of cuda:1"
    assert recorder.calls == [
        f"enter {side}", "kernel", "kernel", f"record on {side}", "wait", "leave",
    ]  # fmt: skip
    used = []
    on_device = SimpleNamespace(
        is_cuda=True, device="cuda:1", record_stream=lambda stream: used.append(stream)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    patches, _ = processor._patches(
        dataclasses.replace(staged, staged=(on_device, staged.staged[1]))
    )
    assert patches is on_device and used == ["current of cuda:1"]


def test_what_the_device_has_no_memory_for_is_made_later(processor, media, monkeypatch):
    with ClipReader(workers=0, fit=processor.fit()) as reader:
        (plain,) = reader.read([media["odd size"]])
    original, failures = module.video_patches, iter([True, False])

    def full(*args, **more):
        if next(failures):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **more)

    monkeypatch.setattr(module, "video_patches", full)
    stage = Staging(processor, CPU, torch.float32)
    with ClipReader(workers=0, stage=stage) as reader:
        (clip,) = reader.read([media["odd size"]])
    assert isinstance(clip, Clip) and clip.staged is None
    ours = processor.prompt("x", [stage.stage(clip)])
    theirs = processor.prompt("x", [plain])
    assert torch.equal(ours.pixel_values_videos, theirs.pixel_values_videos)


def test_a_gpu_of_ours_is_the_default_and_the_cpu_is_not(processor, monkeypatch):
    encoder = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(module, "vision_encoder", lambda model: encoder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(module.backend, "unavailable", lambda name: None)
    stage = staging(None, processor, "auto")
    assert (stage.device, stage.dtype) == (encoder.device, torch.bfloat16)
    assert staging(None, processor, "worker") is None
    # Triton has no such kernel: the plain form would be slower than the workers.
    monkeypatch.setattr(module.backend, "unavailable", lambda name: f"no {name}")
    assert staging(None, processor, "auto") is None
    encoder.device = CPU
    monkeypatch.setattr(module.backend, "unavailable", lambda name: None)
    assert staging(None, processor, "auto") is None
    assert staging(None, processor, "device").device == CPU


def test_patches_of_two_devices_meet_on_the_models(monkeypatch):
    seen = []

    def encode(model, pixels, grids):
        seen.append(pixels)
        return [torch.zeros(1, 2, device="meta")] * len(grids)

    monkeypatch.setattr(forward, "encode_videos", encode)
    grid = torch.tensor([1, 2, 2])
    kinds = (("cpu", torch.float32), ("meta", torch.bfloat16))
    given = [torch.zeros(4, 6, device=device, dtype=dtype) for device, dtype in kinds]
    prompts = [
        SimpleNamespace(patches=4, media=lambda pixels=pixels: [(pixels, grid)]) for pixels in given
    ]
    forward.prompt_features(None, prompts)
    assert seen[0].device.type == "meta" and seen[0].dtype == torch.bfloat16
    assert len(seen[0]) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_either_path_has_the_same_batches(tmp_path, media, workers):
    model, data = write_inputs(tmp_path)
    records = [
        *load_records(data)[:2],
        Record("i", "ocr", None, {"question": "x"}, "y", image=media["image"].path),
        Record("bad", "ocr", str(tmp_path / "none.mp4"), {"question": "x"}, "y"),
    ]
    write_records(tmp_path / "all.jsonl", records)
    seen = {}
    for resize in ("worker", "device"):
        config = configure(
            model,
            tmp_path / "all.jsonl",
            tmp_path / resize,
            f"data.resize={resize}",
            f"data.decode_workers={workers}",
            "data.prefetch_mb=1",
            "optim.steps=3",
            "model.dtype=bfloat16",
        )
        with setup.open_run(config, reference=False) as run:
            batches = [list(batch) for batch in run.batches()]
            cached = list(run.source._cache._values.values())
            assert cached and all(clip.staged is None for clip in cached)
            assert all(clip.fitted == (resize == "worker") for clip in cached)
            seen[resize] = [(s.record.id, s.prompt) for batch in batches for s in batch]
        assert "none.mp4" in (Path(config.run.output) / "quarantine.jsonl").read_text()
    assert len(seen["worker"]) == 9
    for (name, a), (other, b) in zip(seen["worker"], seen["device"], strict=True):
        assert name == other
        for pixels in ("pixel_values_videos", "pixel_values"):
            ours, theirs = getattr(a, pixels), getattr(b, pixels)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                # Of the model's dtype: made for the device, from the cache too.
                assert theirs.dtype == torch.bfloat16
                assert torch.equal(ours.bfloat16(), theirs)


def test_requests_of_records_are_staged_whatever_the_task(processor, tmp_path, media):
    """Clips read through a worker process, its frames in shared memory."""
    records = [
        Record("a", "ocr", media["odd size"].path, {"question": "x"}, "y"),
        Record("b", "ocr", media["folder"].path, {"question": "x"}, "y", metadata={"fps": 3}),
    ]
    stage = Staging(processor, CPU, torch.bfloat16)
    with ClipReader(workers=1, stage=stage, prefetch_bytes=1) as reader:
        clips = list(reader.read(clip_request(record, processor.frames) for record in records))
    for clip in clips:
        again = processor.prompt("x", [dataclasses.replace(clip, staged=None)])
        ours = processor.prompt("x", [clip])
        assert torch.equal(ours.pixel_values_videos, again.pixel_values_videos.bfloat16())


@needs_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_patches_are_those_of_the_cpu_while_the_gpu_is_busy(processor, media, workers):
    device, dtype = torch.device("cuda"), torch.bfloat16
    stage, cpu = Staging(processor, device, dtype), Staging(processor, CPU, dtype)
    asked = [*media.values()] * 4
    busy = torch.randn(4096, 4096, device=device)
    with (
        ClipReader(workers=workers, stage=stage, prefetch_bytes=1 << 20) as reader,
        ClipReader(workers=workers, stage=cpu) as other,
    ):
        for ours, theirs in zip(reader.read(asked), other.read(asked), strict=True):
            assert torch.from_numpy(ours.frames).is_pinned() == bool(workers)
            # Clips are dropped while work that reads their patches is still queued.
            for _ in range(8):
                busy = busy @ busy / 64
            patches, _ = processor._patches(ours)
            copied = patches.clone()
            del ours, patches
            assert torch.equal(copied.cpu(), theirs.staged[0])
