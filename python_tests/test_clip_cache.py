"""The disk cache of decoded clips: the same clip, never a stale one, bounded, shared."""

import logging
import os
import pickle
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tiny_run import configure, write_inputs

from vcr1_fast.data import clip_cache
from vcr1_fast.data.clip_cache import ClipCache, open_cache
from vcr1_fast.data.records import load_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, read_clip
from vcr1_fast.train.loop import train

COUNT = "reads.txt"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def video(inputs, tmp_path):
    """A copy of a clip, old enough that its hash is kept."""
    path = tmp_path / "clip.mp4"
    shutil.copy(load_records(inputs[1])[0].media, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_cache, "_ADDED", {})
    monkeypatch.setattr(clip_cache, "_WARNED", set())
    return open_cache(str(tmp_path / "cache"), 1.0)


class Counting:
    """`read_clip` that counts its calls in a file, over processes."""

    def __init__(self, folder):
        self.path = folder / COUNT

    def __call__(self, path, *arguments, **options):
        with self.path.open("a") as file:
            file.write("x")
        return read_clip(path, *arguments, **options)

    @property
    def calls(self):
        return len(self.path.read_text()) if self.path.exists() else 0


def halved(frame, count):
    return np.ascontiguousarray(frame[::2, ::2])


def same(one, two):
    return (
        np.array_equal(one.frames, two.frames)
        and np.array_equal(one.times, two.times)
        and one.frames.dtype == np.uint8
        and one.times.dtype == two.times.dtype
        and replace(one, frames=0, times=0) == replace(two, frames=0, times=0)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fit", [None, halved])
def test_a_clip_is_decoded_once_and_is_the_same(video, cache, tmp_path, workers, fit):
    reader = Counting(tmp_path)
    request = ClipRequest(str(video), FrameConfig(num_frames=4), start=0.5)
    plain = read_clip(str(video), request.config, start=0.5, backend="pyav", fit=fit)
    for _ in range(2):  # another reader, hence other processes
        with ClipReader(workers=workers, cache=cache, fit=fit, reader=reader) as one:
            first, second = one.read([request, request])
        assert same(first, plain) and same(second, plain)
        assert first.frames.flags.writeable and first.fitted == (fit is not None)
    assert reader.calls == 1 if workers == 0 else reader.calls <= 2  # both may begin together


def late(shift, length):
    return [shift, length / 2]


def test_every_setting_has_a_clip_to_itself(video, cache, tmp_path):
    other = tmp_path / "other.mp4"
    other.write_bytes(video.read_bytes() + b"\0")  # another content, hence another file
    base = ClipRequest(str(video), FrameConfig(num_frames=4))
    requests = [
        (base, "pyav", None),
        (base, "decord", None),
        (base, "pyav", halved),
        (base, "pyav", partial(halved, 3)),
        (replace(base, path=str(other)), "pyav", None),
        (replace(base, start=0.5), "pyav", None),
        (replace(base, end=1.5), "pyav", None),
        (replace(base, folder_fps=2.0), "pyav", None),
        (replace(base, times=[0.0, 1.0]), "pyav", None),
        (replace(base, times=partial(late, 0.0)), "pyav", None),
        (replace(base, times=partial(late, 0.5)), "pyav", None),
        *[(replace(base, config=config), "pyav", None) for config in (
            FrameConfig(num_frames=6), FrameConfig(num_frames=4, rule="hf"), FrameConfig(fps=1.0),
            FrameConfig(num_frames=4, max_pixels=100_000))],
    ]  # fmt: skip
    keys = [cache.key(*request) for request in requests]
    assert None not in keys and len(set(keys)) == len(keys)
    # And keys say nothing of where the file lies, or of this process.
    moved = tmp_path / "elsewhere" / "b.mp4"
    moved.parent.mkdir()
    shutil.copy(video, moved)
    assert cache.key(replace(base, path=str(moved)), "pyav", None) == keys[0]
    again = pickle.loads(pickle.dumps(requests[9]))
    assert cache.key(*again) == keys[9]


def test_a_video_that_changes_is_read_again(inputs, video, cache, tmp_path):
    request = ClipRequest(str(video), FrameConfig(num_frames=4))
    old = os.stat(video)
    with ClipReader(workers=0, cache=cache) as reader:
        (first,) = reader.read([request])
        others = {record.media for record in load_records(inputs[1])}
        other = next(path for path in sorted(others) if os.path.getsize(path) != old.st_size)
        shutil.copyfile(other, video)
        os.utime(video, ns=(old.st_atime_ns, old.st_mtime_ns))  # as rsync and cp -p set it
        (second,) = reader.read([request])
    assert same(second, read_clip(str(video), request.config, backend="pyav"))
    assert not np.array_equal(first.frames, second.frames)


def test_a_change_of_the_same_size_and_date_is_noticed(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_cache, "_SETTLED", -1e9)  # hashes are kept at once
    file = tmp_path / "v.mp4"
    file.write_bytes(b"a" * 100)
    status = os.stat(file)
    before = cache.content_hash(str(file))
    assert cache.content_hash(str(file)) == before
    time.sleep(0.02)  # a clock tick of the file system
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.content_hash(str(file)) != before


def test_a_file_of_this_moment_is_hashed_again(cache, tmp_path):
    file = tmp_path / "v.mp4"
    file.write_bytes(b"a")
    cache.content_hash(str(file))
    assert not (cache.folder / "files").exists()  # it may change under the same time stamp


def clip(size, value=0):
    frames = np.full((2, size // 6, 1, 3), value, np.uint8)
    return Clip(frames, np.array([0.0, 1.0]), 1.0, 2.0, "x.mp4")


def test_the_clips_used_last_stay_within_the_limit(tmp_path):
    cache = ClipCache(tmp_path, 100_000)
    clip_cache._ADDED.pop(tmp_path, None)
    for number in range(30):
        cache.put(f"{number:064d}", clip(9_000, number))
        os.utime(cache._file(f"{number:064d}"), (number, number))
        cache.get(f"{0:064d}", "x.mp4")  # the first one is in use all the time
    kept = sorted(int(file.stem) for file in tmp_path.rglob("*.clip"))
    total = sum(file.stat().st_size for file in tmp_path.rglob("*.clip"))
    assert total <= 100_000 * 1.1 and len(kept) >= 10
    assert kept[0] == 0 and kept[1:] == list(range(kept[1], 30))
    cache.put("f" * 64, clip(60_000))  # more than a quarter of the limit
    assert cache.get("f" * 64, "x.mp4") is None
    left = tmp_path / "clips" / "00" / ".left.clip.1"
    left.write_bytes(b"half a clip")
    os.utime(left, (0, 0))
    cache.evict()
    assert not left.exists()


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "other"])
def test_a_damaged_file_is_read_from_the_video_again(video, cache, harm, caplog):
    request = ClipRequest(str(video), FrameConfig(num_frames=4))
    with ClipReader(workers=0, cache=cache) as reader, caplog.at_level(logging.WARNING):
        (first,) = reader.read([request])
        (file,) = cache.folder.rglob("*.clip")
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        harmed = {"cut": data[:-7], "bit": data, "empty": b"", "other": b"[]\n" + data}[harm]
        file.write_bytes(harmed)
        (again,) = reader.read([request])
    assert same(first, again) and "damaged, removed" in caplog.text
    (file,) = cache.folder.rglob("*.clip")
    assert len(file.read_bytes()) > len(data) - 1


def test_a_disk_that_cannot_be_written_costs_the_cache_alone(video, cache, caplog, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clip_cache.Path, "write_bytes", full)
    request = ClipRequest(str(video), FrameConfig(num_frames=4))
    with ClipReader(workers=0, cache=cache) as reader, caplog.at_level(logging.WARNING):
        one, two = reader.read([request, request])
    assert same(one, two) and caplog.text.count("No space left") == 1


def test_a_run_with_a_cache_is_the_run_without_it(inputs, tmp_path):
    train(configure(*inputs, tmp_path / "plain"))
    cached = f"data.cache_dir={tmp_path / 'cache'}"
    train(configure(*inputs, tmp_path / "first", cached))
    files = list((tmp_path / "cache").rglob("*.clip"))
    assert files
    stamps = {file: file.stat().st_mtime_ns for file in files}
    train(configure(*inputs, tmp_path / "second", cached))
    assert sorted((tmp_path / "cache").rglob("*.clip")) == sorted(files)
    assert any(file.stat().st_mtime_ns > stamps[file] for file in files)  # used
    weights = {
        (tmp_path / name / "model/model.safetensors").read_bytes()
        for name in ("plain", "first", "second")
    }
    assert len(weights) == 1
