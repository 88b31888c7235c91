"""Fuzz target: decoders on damaged videos and pictures.

Every file gives a clip of sound shape, or a VideoError that names it; a decoder may die in its
worker, never here. The clip that is whole is read right afterwards.
"""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError

CONTAINERS = {"mp4": "mpeg4", "mov": "mpeg4", "avi": "mpeg4", "mkv": "mpeg4", "ts": "mpeg2video"}
FRAMES = FrameConfig(num_frames=4)
BATCH = 8  # files of a case, read at once
TIMEOUT = 20.0
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 2**63 - 1)


def _video(container: str, codec: str) -> bytes:
    data = io.BytesIO()
    with av.open(
        data, "w", format={"ts": "mpegts", "mkv": "matroska"}.get(container, container)
    ) as f:
        stream = f.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            picture = np.full((48, 64, 3), 20 * number, np.uint8)
            f.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        f.mux(stream.encode())
    return data.getvalue()


def _picture(kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(data, kind)
    return data.getvalue()


class Decoders:
    """The target; it writes its files into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds = {name: _video(name, codec) for name, codec in CONTAINERS.items()}
        self.pictures = {"png": _picture("png"), "jpg": _picture("jpeg"), "webp": _picture("webp")}
        self.readers = {
            backend: ClipReader(backend=backend, workers=1, timeout=TIMEOUT)
            for backend in ("pyav", "decord")
        }

    def __call__(self, rng: random.Random) -> int:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        requests = []
        for number in range(BATCH):
            is_image = rng.random() < 0.2
            name, data = rng.choice(list((self.pictures if is_image else self.seeds).items()))
            path = self.folder / f"{number}.{name}"
            path.write_bytes(_damaged(rng, data))
            start, end = rng.choice(((None, None), (0.2, 0.9), (5.0, None)))
            if is_image:
                start = end = None
            requests.append(
                ClipRequest(path=str(path), config=FRAMES, start=start, end=end, is_image=is_image)
            )
        whole = self.folder / "whole.mp4"
        whole.write_bytes(self.seeds["mp4"])
        requests.append(ClipRequest(path=str(whole), config=FRAMES))
        results = list(self.readers[rng.choice(("pyav", "decord"))].read(requests))
        assert len(results) == len(requests)
        for request, result in zip(requests, results, strict=True):
            self._check(request, result)
        assert isinstance(results[-1], Clip), f"the whole file: {results[-1]}"
        shades = results[-1].frames.mean((1, 2, 3))
        assert (np.diff(shades) > 20).all(), f"the whole file's frames: {shades}"
        return len(requests)

    def _check(self, request: ClipRequest, result: Clip | VideoError) -> None:
        if isinstance(result, VideoError):
            assert request.path in str(result) and "\n" not in str(result), repr(str(result))
            return
        frames, times = result.frames, result.times
        assert frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
        assert len(frames) == len(times) == (1 if request.is_image else FRAMES.num_frames)
        assert np.isfinite(times).all() and (np.diff(times) >= 0).all(), times
        if not request.is_image:
            assert result.fps is not None and np.isfinite(result.fps) and result.fps > 0, result.fps
            assert result.duration is not None and 0 < result.duration < np.inf, result.duration


def _damaged(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        # Headers are short and stand at either end.
        at = rng.choice((rng.randrange(len(result)), rng.randrange(min(len(result), 400))))
        at = len(result) - 1 - at if rng.random() < 0.3 else at
        edit = rng.randrange(5)
        if edit == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif edit == 1:
            width = rng.choice((1, 2, 4, 8))
            value = (rng.choice(EXTREMES) % 256**width).to_bytes(
                width, rng.choice(("big", "little"))
            )
            result[at : at + width] = value
        elif edit == 2 and len(result) > 20:
            del result[at:]
        elif edit == 3:
            del result[at : at + rng.randrange(1, 64)]
        else:
            other = rng.randrange(len(result))
            result[at : at + 32] = result[other : other + 32]
        if not result:
            return b"\0"
    return bytes(result)
