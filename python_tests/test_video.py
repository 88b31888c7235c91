"""Decoding of real files written here, and the worker processes around it."""

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import fake_readers
import numpy as np
import pytest
from PIL import Image

from vcr1_fast.data import workers
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import (
    BACKENDS,
    Clip,
    ClipReader,
    ClipRequest,
    VideoError,
    count_frames,
    probe,
    read_clip,
)

av = pytest.importorskip("av")
pytest.importorskip("decord")

STEP = 5  # grey levels between neighbouring frames: more than compression changes
SIZE = (48, 64)
EVERY = FrameConfig(fps=1000.0)


def write(
    path: Path,
    count: int,
    *,
    fps=10,
    stamps=None,
    options=(),
    movflags="",
    muxing=None,
    size=SIZE,
    suffix="mp4",
) -> str:
    """A file, by default H.264 in mp4, whose frame i is grey of level i * STEP; `stamps` in ms."""
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = path.with_suffix("." + suffix)
    moov = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", options=muxing or moov) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "12", "g": "8", "threads": "1", **dict(options)}
        for index in range(count):
            grey = np.full((*size, 3), index * STEP, np.uint8)
            grey[: size[0] // 2, ::7] ^= 3  # a texture, so that wrong frames cannot look right
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def shown(clip: Clip) -> list[int]:
    """The number of each frame, read from its grey."""
    levels = clip.frames[:, SIZE[0] // 2 :].mean((1, 2, 3)) / STEP
    assert np.abs(levels - levels.round()).max() < 0.35
    return levels.round().astype(int).tolist()


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("video") / "v.mp4", 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_frames_are_the_right_ones(video, backend):
    clip = read_clip(video, FrameConfig(num_frames=6), backend=backend)
    assert shown(clip) == [0, 8, 16, 23, 31, 39]
    assert clip.frames.shape == (6, *SIZE, 3) and clip.frames.dtype == np.uint8
    assert clip.frames.flags.c_contiguous
    np.testing.assert_allclose(clip.times, np.array(shown(clip)) / 10, atol=1e-6)
    assert clip.duration == pytest.approx(4.0) and clip.fps == pytest.approx(1.5)
    assert (clip.path, clip.start) == (video, 0.0)
    clip = read_clip(video, FrameConfig(num_frames=6, rule="hf"), backend=backend)
    assert shown(clip) == [0, 6, 13, 20, 26, 33]
    assert shown(read_clip(video, EVERY, backend=backend)) == list(range(40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_file(video, backend):
    clip = read_clip(video, EVERY, start=1.0, end=2.1, backend=backend)
    assert shown(clip) == list(range(10, 22))  # both ends are within
    assert clip.times[0] == pytest.approx(0, abs=1e-6) and clip.start == 1.0
    assert clip.duration == pytest.approx(1.1) and clip.fps == pytest.approx(10)
    clip = read_clip(video, EVERY, start=3.55, end=99, backend=backend)
    assert shown(clip) == [36, 37, 38, 39]
    np.testing.assert_allclose(clip.times, [0.05, 0.15, 0.25, 0.35], atol=1e-6)
    assert clip.duration == pytest.approx(0.45)
    assert shown(read_clip(video, EVERY, end=0.3, backend=backend)) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_named_times_show_the_nearest_frames(video, backend):
    clip = read_clip(video, times=[0, 0.04, 0.06, 1.0, 1.0, 0.2, 3.98, 4.0], backend=backend)
    assert shown(clip) == [0, 0, 1, 10, 10, 2, 39, 39]
    np.testing.assert_allclose(clip.times, [0, 0, 0.1, 1, 1, 0.2, 3.9, 3.9], atol=1e-6)
    clip = read_clip(
        video, start=1.0, end=3.0, times=lambda length: [0, length / 2, length], backend=backend
    )
    assert shown(clip) == [10, 20, 30]
    for times in ([4.1], [-0.5, 1], [], [float("nan")]):
        with pytest.raises(VideoError, match=r"v\.mp4: .*sample times"):
            read_clip(video, times=times, backend=backend)


RATES = {
    "film": {"fps": 23.976},
    "NTSC": {"fps": Fraction(30000, 1001)},
    "slow": {"fps": 2},
    "no B-frames": {"options": {"bf": "0"}},
    "many B-frames": {"options": {"bf": "8", "b-adapt": "0"}},
    "open GOP": {"options": {"x264-params": "open-gop=1:scenecut=0", "bf": "3"}},
    "one key frame": {"options": {"g": "250"}},
    "index first": {"movflags": "faststart"},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "Matroska": {"suffix": "mkv"},
    "AVI": {"suffix": "avi", "options": {"b": "4000000", "bf": "0"}},
    "uneven": {"stamps": [0, 33, 133, 150, 400, 500, 533, 900, 1000, 1033, 2000, 2100]},
    "late start": {"stamps": list(range(500, 1700, 100))},
    "no edit list": {"options": {"bf": "3"}, "muxing": {"use_editlist": "0"}},
}


@pytest.mark.parametrize("name", RATES)
def test_decoders_agree_to_the_pixel(tmp_path, name):
    count = 12 if "stamps" in RATES[name] else 30
    path = write(tmp_path / "v.mp4", count, **RATES[name])
    assert count_frames(path) == (count, count)
    for config in (EVERY, FrameConfig(num_frames=4), FrameConfig(num_frames=10, rule="hf")):
        first, second = (read_clip(path, config, backend=backend) for backend in BACKENDS)
        assert np.array_equal(first.frames, second.frames)
        np.testing.assert_allclose(first.times, second.times, atol=1e-5)
        assert first.duration == pytest.approx(second.duration)
        assert first.fps == pytest.approx(second.fps)
    assert shown(read_clip(path, EVERY)) == list(range(count))
    times = probe(path).duration * np.arange(count) / count if "stamps" not in RATES[name] else ()
    for backend in BACKENDS:
        for index, time_shown in enumerate(times):  # every frame can be jumped to
            assert shown(read_clip(path, times=[time_shown], backend=backend)) == [index]
    if stamps := RATES[name].get("stamps"):
        expected = (np.array(stamps) - stamps[0]) / 1000
        np.testing.assert_allclose(read_clip(path, EVERY).times, expected, atol=1e-3)


def test_decord_refuses_what_it_would_show_wrong(tmp_path):
    path = write(tmp_path / "v.ts", 30, suffix="ts")
    assert shown(read_clip(path, EVERY, backend="pyav")) == list(range(30))
    with pytest.raises(VideoError, match=r'v\.ts: .*not exact for mpegts .*backend="pyav"'):
        read_clip(path, EVERY, backend="decord")
    with ClipReader(backend="decord", workers=0) as reader:
        (clip,) = reader.read([ClipRequest(path, EVERY)])
    assert shown(clip) == list(range(30))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_decoders_agree_on_rotated_files(tmp_path, turn):
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    matrix = [cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 14]
    # Turned frames of a width that is no multiple of 32 are more than decord can copy.
    data = bytearray(Path(write(tmp_path / "v.mp4", 12, size=(64, 96))).read_bytes())
    place = data.find(b"tkhd") + 44  # the display matrix of the track header, 16.16 fixed point
    data[place : place + 36] = b"".join((v << 16).to_bytes(4, "big", signed=True) for v in matrix)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    clips = [read_clip(str(path), FrameConfig(num_frames=4), backend=b) for b in BACKENDS]
    assert np.array_equal(clips[0].frames, clips[1].frames)
    assert clips[0].frames.shape[1:3] == ((64, 96) if turn == 180 else (96, 64))


def test_probe_tells_length_without_decoding(video):
    for backend in BACKENDS:
        info = probe(video, backend=backend)
        assert (info.frames, info.fps) == (40, pytest.approx(10))
        assert info.duration == pytest.approx(4.0)


def remux(source: str, target: Path, keep) -> str:
    with av.open(source) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (p for p in old.demux(video=0) if p.dts is not None)
        new.start_encoding()
        for index, packet in enumerate(packets):
            if keep(index):
                packet.stream = stream
                new.mux(packet)
    return str(target)


def bad_files(video: str, folder: Path) -> dict[str, tuple[str, str]]:
    """name -> (path, what the error must say)."""
    data = Path(video).read_bytes()
    ready = Path(write(folder / "ready.mp4", 40, movflags="faststart")).read_bytes()
    damaged = bytearray(ready)
    middle = (ready.find(b"mdat") + len(ready)) // 2
    damaged[middle:] = np.random.default_rng(0).bytes(len(ready) - middle)
    contents = {
        "empty": (b"", "the file is empty"),
        "text": (b"not a video" * 50, "cannot open it"),
        "page": (b"<!DOCTYPE html><html>404</html>", "cannot open it"),
        "cut": (data[: len(data) // 2], "cut off"),
        "cut behind the index": (ready[: len(ready) - 200], "cut off"),
        "header only": (ready[:32], "cut off"),
        "damaged": (bytes(damaged), "cannot decode frames|could not be decoded"),
        "zeros": (ready[: ready.find(b"mdat") + 4].ljust(len(ready), b"\0"), "cannot"),
    }
    files = {}
    for name, (content, reason) in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
        files[name] = (str(folder / f"{name}.mp4"), reason)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    files["sound only"] = (str(folder / "sound.mp4"), "holds no video frames")
    files["no frames"] = (remux(video, folder / "none.mp4", lambda i: False), "no video frames")
    files["no key frame"] = (
        remux(video, folder / "headless.mp4", lambda i: i > 0),
        "lie before the first key frame",
    )
    files["missing"] = (str(folder / "missing.mp4"), "no such file")
    files["folder"] = (str(folder), "holds no video frames")
    files["one frame"] = (write(folder / "one.mp4", 1), "too short")
    return files


def test_bad_files_give_errors_that_name_them(video, tmp_path):
    files = bad_files(video, tmp_path)
    for backend in BACKENDS:
        for name, (path, reason) in files.items():
            with pytest.raises(VideoError, match=reason) as caught:
                read_clip(path, EVERY, backend=backend)
            assert caught.value.path == path and str(caught.value).startswith(f"{path}: "), name
            assert "\n" not in str(caught.value)


def test_a_folder_of_images_is_a_video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (8, *SIZE, 3), np.uint8)
    for i in (3, 0, 6, 1, 7, 5, 2, 4):  # the names give the order, not the directory
        Image.fromarray(frames[i]).save(tmp_path / f"{i:08d}.png")
    (tmp_path / "groundtruth.txt").write_text("1,2,3,4")
    clip = read_clip(str(tmp_path), EVERY)
    assert np.array_equal(clip.frames, frames)
    assert clip.times.tolist() == pytest.approx([i / 10 for i in range(8)])
    assert probe(str(tmp_path)).frames == 8

    Image.fromarray(frames[0, :-4]).save(tmp_path / "00000003.png")
    with pytest.raises(VideoError, match=r"00000003\.png: frames of a clip differ in size"):
        read_clip(str(tmp_path), EVERY)
    (tmp_path / "00000002.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"00000002\.png: not a picture"):
        read_clip(str(tmp_path), EVERY)


def test_frames_that_decode_are_counted_against_the_container(video, tmp_path):
    assert count_frames(video) == (40, 40)
    path, _ = bad_files(video, tmp_path)["damaged"]
    claimed, decoded = count_frames(path)
    assert claimed == 40 and 0 < decoded < 40


def test_parts_outside_the_file_are_errors(video):
    for backend in BACKENDS:
        for start, end, reason in (
            (4.0, None, r"start 4 s is beyond its end at 4\.000 s"),
            (100, 110, "start 100 s is beyond"),
            (2.0, 2.0, r"start 2 s is not before end 2\.0 s"),
            (2.0, 1.0, "not before end"),
            (-1.0, 2.0, "start -1"),
            (float("nan"), None, "start nan"),
            (1.02, 1.08, "no frame lies between"),
            (1.0, 1.05, "too short"),
        ):
            with pytest.raises(VideoError, match=rf"v\.mp4: .*{reason}"):
                read_clip(video, start=start, end=end, backend=backend)
        with pytest.raises(VideoError, match=r"v\.mp4: cannot take 50 frames of 40"):
            read_clip(video, FrameConfig(num_frames=50), backend=backend)
    with pytest.raises(ValueError, match="unknown video backend 'opencv'"):
        read_clip(video, backend="opencv")
    with pytest.raises(ValueError, match="unknown video backend 'opencv'"):
        ClipReader(backend="opencv")


def test_files_are_closed(video):
    before = len(os.listdir("/proc/self/fd"))
    for backend in BACKENDS:
        for _ in range(5):
            read_clip(video, EVERY, backend=backend)
    assert len(os.listdir("/proc/self/fd")) <= before


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, though an orphan may wait for its new parent to notice


def requests(*names: str) -> list[ClipRequest]:
    return [ClipRequest(name) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_come_in_order_with_errors_in_place(video, tmp_path, workers):
    asked = [
        ClipRequest(video, FrameConfig(num_frames=4)),
        ClipRequest(str(tmp_path / "missing.mp4")),
        ClipRequest(video, start=1.0, end=2.0, times=(0.0, 0.5)),
        ClipRequest(video, start=9.0),
        ClipRequest(video, EVERY),
    ]
    for backend in BACKENDS:
        with ClipReader(workers=workers, backend=backend) as reader:
            got = list(reader.read(asked))
        assert shown(got[0]) == [0, 13, 26, 39]
        assert isinstance(got[1], VideoError) and "missing.mp4: no such file" in str(got[1])
        assert shown(got[2]) == [10, 15] and got[2].start == 1.0
        assert isinstance(got[3], VideoError) and got[3].path == video
        assert shown(got[4]) == list(range(40))
        got[4].frames[0] = 0  # the caller owns the memory


def test_a_hanging_decoder_is_killed_and_replaced():
    names = ["ok-1", "hang-2", "ok-3", "ok-4", "hang-5", "ok-6"]
    began = time.monotonic()
    with ClipReader(workers=1, timeout=1.0, reader=fake_readers.by_name) as reader:
        got = list(reader.read(requests(*names)))
        assert not alive(int(got[0].fps))  # at once, not when the reader is closed
    assert time.monotonic() - began < 30
    for name, result in zip(names, got, strict=True):
        if name.startswith("hang"):
            assert isinstance(result, VideoError)
            assert str(result) == f"{name}: not done within 1 s, its worker was killed"
        else:
            assert (result.frames == int(name[-1])).all()
    pids = {int(clip.fps) for clip in got if isinstance(clip, Clip)}
    assert len(pids) == 3  # a new worker after each hang, and one worker in between
    assert not any(map(alive, pids))


def test_a_crash_costs_one_clip_and_a_bug_stops_the_run():
    with ClipReader(workers=2, timeout=30, reader=fake_readers.by_name) as reader:
        got = list(reader.read(requests("ok-1", "crash-2", "bad-3", "ok-4")))
        assert [type(result) for result in got] == [Clip, VideoError, VideoError, Clip]
        assert str(got[1]) == "crash-2: its worker died (signal 11, SIGSEGV)"
        assert str(got[2]) == "bad-3: is bad"
        with pytest.raises(TypeError, match="a fault of the program") as caught:
            list(reader.read(requests("ok-1", "bug-2")))
        assert "fake_readers.py" in str(caught.value.__cause__)
        with pytest.raises(RuntimeError, match="Local: cannot travel"):
            list(reader.read(requests("local")))
        with pytest.raises(AttributeError, match="lambda"):  # cannot be sent to a worker
            list(reader.read([ClipRequest("ok-1", times=lambda length: [0.0])]))
        assert (next(reader.read(requests("ok-9"))).frames == 9).all()


def test_a_worker_that_is_killed_from_outside_costs_no_clip(tmp_path):
    asked = requests(f"once-{tmp_path / 'first'}", "ok-2", f"once-{tmp_path / 'second'}")
    with ClipReader(workers=2, timeout=60, reader=fake_readers.by_name) as reader:
        got = list(reader.read(asked))
    assert [type(clip) for clip in got] == [Clip, Clip, Clip]
    assert (tmp_path / "first").exists() and (tmp_path / "second").exists()


def test_a_worker_that_starts_too_slowly_is_started_once_more(monkeypatch):
    waits = iter([0.0, 120.0])
    ask = workers._Worker.ask

    def impatient(self, item, timeout, *lend):
        return ask(self, item, next(waits) if timeout == workers.START_TIMEOUT else timeout, *lend)

    monkeypatch.setattr(workers._Worker, "ask", impatient)
    with ClipReader(workers=1, timeout=60, reader=fake_readers.by_name) as reader:
        assert isinstance(next(reader.read(requests("ok-1"))), Clip)
    waits = iter([0.0, 0.0])
    with ClipReader(workers=1, timeout=60, reader=fake_readers.by_name) as reader:
        (error,) = reader.read(requests("ok-1"))
    assert str(error) == "ok-1: its worker did not start within 120 s"


def not_importable(path, config, **arguments):
    raise AssertionError


def test_a_reader_that_workers_cannot_import_is_a_fault_of_the_program(monkeypatch):
    monkeypatch.setattr(not_importable, "__module__", "no_such_module")
    monkeypatch.setitem(sys.modules, "no_such_module", sys.modules[__name__])
    with (
        ClipReader(workers=1, reader=not_importable) as reader,
        pytest.raises(RuntimeError, match=r"cannot import what.*no_such_module"),
    ):
        list(reader.read(requests("ok-1")))
    with ClipReader(workers=1, reader=fake_readers.by_name) as reader:
        with pytest.raises(RuntimeError, match=r"cannot import what.*no_such_module"):
            list(reader.read([ClipRequest("ok-1", times=not_importable)]))
        assert isinstance(next(reader.read(requests("ok-1"))), Clip)


def test_reading_runs_ahead_within_bounds_and_ends_when_left():
    taken = []

    def endless():
        for index in range(10**9):
            taken.append(index)
            yield ClipRequest(f"ok-{index % 100}")

    before = threading.active_count()
    with ClipReader(workers=2, prefetch=5, reader=fake_readers.by_name) as reader:
        clips = reader.read(endless())
        pids = {int(next(clips).fps) for _ in range(12)}
        assert 12 <= len(taken) <= 12 + 5
        clips.close()
        assert len(list(reader.read(requests("ok-1", "ok-2")))) == 2
    assert 1 <= len(pids) <= 2 and not any(map(alive, pids))
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(reader.read(requests("ok-1")))
    reader.close()


def test_a_slow_consumer_is_no_timeout():
    with ClipReader(workers=2, timeout=1.0, reader=fake_readers.by_name) as reader:
        for index, clip in enumerate(reader.read(requests(*["ok-1"] * 6))):
            if index == 0:
                time.sleep(1.5)
            assert isinstance(clip, Clip)


INTERRUPTED = """
import sys, time
sys.path[:0] = {paths!r}
import fake_readers
from vcr1_fast.data.video import ClipReader, ClipRequest
reader = ClipReader(workers=2, timeout=300, reader=fake_readers.by_name)
names = ["ok-1", "ok-2", "{third}", "ok-4"]
try:
    for clip in reader.read(ClipRequest(name) for name in names):
        print(int(clip.fps), flush=True)
finally:
    print("left", flush=True)
"""


@pytest.mark.parametrize(("blow", "third"), [("SIGINT", "hang-3"), ("SIGKILL", "slow-3")])
def test_an_end_from_outside_ends_everything(tmp_path, blow, third):
    # A script without `if __name__ == "__main__"` and without `with`: both are allowed.
    paths = [os.path.dirname(__file__), os.getcwd()]
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(paths=paths, third=third))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores SIGINT, and so would all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        time.sleep(0.1)  # now it waits for the third clip
        os.killpg(process.pid, getattr(signal, blow))
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    if blow == "SIGINT":
        assert output == "left\n" and process.returncode != 0
        assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    "arguments", [{"workers": -1}, {"timeout": 0}, {"timeout": float("nan")}, {"prefetch": 0}]
)
def test_impossible_readers_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ClipReader(**arguments)
