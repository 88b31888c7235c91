"""The two video decoders behind `read_clip`: decord, and PyAV. Both give the same pixels.

A folder of images, in the order of their names, is a video too (GOT-10k has nothing else); images
are read by Pillow.

A file is opened, read and closed for each clip: a decord reader that is kept decodes ahead into
memory and cannot be used after a fork.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vcr1_fast.data.media_file import VideoError, check_file, open_picture

BACKENDS = ("decord", "pyav")
IMAGES = (".jpg", ".jpeg", ".png")
FOLDER_FPS = 10.0
"""Frames a second of a folder of images, which says nothing about time: GOT-10k's rate."""
_BATCH = 8
"""Frames that decord decodes at a time."""
Shrink = Callable[[np.ndarray], np.ndarray]
NO_FRAMES = "holds no video frames"
NO_STREAM = f"{NO_FRAMES} (no video stream)"


@dataclass(frozen=True)
class Source:
    """An open video.

    `timestamps` (n,) float64, seconds from the first frame, ascending, one a frame of the
    container; `fps` its average rate; `read(indices, shrink)` decodes distinct ascending frame
    numbers to (len(indices), h, w, 3) uint8 RGB, each frame (H, W, 3) being handed to `shrink` as
    soon as it is there: no more than a few are ever held in their full size.
    """

    timestamps: np.ndarray
    fps: float
    read: Callable[[np.ndarray, Shrink], np.ndarray]


@contextmanager
def open_source(path: str, backend: str, folder_fps: float | None = None) -> Iterator[Source]:
    """Open `path`, close it on leaving. Whatever the decoder reports becomes a VideoError.

    `folder_fps`: rate of a folder of images; None: FOLDER_FPS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown video backend {backend!r}, expected one of {BACKENDS}")
    if os.path.isdir(path):
        opened = _open_folder(path, FOLDER_FPS if folder_fps is None else folder_fps)
    else:
        check_file(path)
        opened = _open_decord(path) if backend == "decord" else _open_pyav(path)
    with opened as source:
        if len(source.timestamps) == 0:
            raise VideoError(path, NO_FRAMES)
        yield source


@contextmanager
def _open_folder(path: str, fps: float) -> Iterator[Source]:
    names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGES))

    def read(indices: np.ndarray, shrink: Shrink) -> np.ndarray:
        frames, first = [], None
        for i in indices:
            frame = open_picture(file := os.path.join(path, names[i]))
            first = frame.shape if first is None else first
            if frame.shape != first:
                sizes = f"{frame.shape[:2]}, the first one {first[:2]}"
                raise VideoError(file, f"frames of a clip differ in size: {sizes}")
            frames.append(shrink(frame))
        return np.stack(frames)

    yield Source(np.arange(len(names)) / fps, fps, read)


@contextmanager
def _open_decord(path: str) -> Iterator[Source]:
    try:
        import decord
    except ImportError as error:
        raise ImportError('decord is not installed; install it or use backend="pyav"') from error
    decord.logging.set_level(decord.logging.QUIET)  # its faults come back as exceptions
    faults = (decord.DECORDError, RuntimeError, IndexError, OSError, StopIteration)

    try:
        # More threads do not speed up the reading of a few frames, and workers run side by side.
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        total = len(reader)
        if total == 0:
            raise VideoError(path, NO_FRAMES)
        keys = list(reader.get_key_indices())
        stamps = np.asarray(reader.get_frame_timestamp(np.arange(total)), np.float64)[:, 0]
        stamps, fps = _clock(path, stamps, reader.get_avg_fps())
    except faults as error:
        if "cannot find video stream" in str(error):
            raise VideoError(path, NO_STREAM) from error
        raise VideoError(path, f"decord cannot open it: {_message(error)}") from error
    jumps = _decord_jumps_right(path, keys, total)

    def read(indices: np.ndarray, shrink: Shrink) -> np.ndarray:
        try:
            if jumps:
                parts = (indices[i : i + _BATCH] for i in range(0, len(indices), _BATCH))
                batches = (reader.get_batch(part).asnumpy() for part in parts)
                return np.stack([shrink(frame) for batch in batches for frame in batch])
            wanted = set(indices.tolist())  # next() alone never jumps, skip_frames() does
            everything = ((place, reader.next()) for place in range(int(indices[-1]) + 1))
            kept = (frame.asnumpy() for place, frame in everything if place in wanted)
            return np.stack([shrink(frame) for frame in kept])
        except faults as error:
            reason = f"decord cannot decode frames {_span(indices)} of {total}"
            advice = 'backend="pyav" may'
            raise VideoError(path, f"{reason} ({advice}): {_message(error)}") from error

    yield Source(stamps, fps, read)  # decord closes the file when the last reference goes


def _decord_jumps_right(path: str, keys: list[int], total: int) -> bool:
    """Whether decord finds the frames it jumps to; if not, it must read from the beginning.

    It takes a key frame's place in the file for its place on screen, and jumps to the last key
    frame that is decoded before the time it wants. With open GOPs (usual in HEVC) or in fragmented
    files it would silently show frames a few places off.
    """
    try:
        import av
    except ImportError:
        return False
    try:
        with av.open(path) as container:
            index = _demux(path, container)
            kinds = set(container.format.name.split(","))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"PyAV cannot index it: {_message(error)}") from error
    if not kinds & {"mp4", "matroska", "avi"}:
        # Of an MPEG transport stream it shows the first frames wrong, even when read in order.
        reason = f"decord is not exact for {'/'.join(sorted(kinds))} files"
        raise VideoError(path, f'{reason}, read it by backend="pyav" or put it into an mp4')
    places = np.searchsorted(index.pts, index.key_pts)
    return (
        "avi" not in kinds
        and (len(index.pts), places.tolist()) == (total, keys)
        and bool((index.key_dts[1:] > index.key_pts[:-1]).all())
    )


@contextmanager
def _open_pyav(path: str) -> Iterator[Source]:
    try:
        import av
    except ImportError as error:
        raise ImportError('PyAV (package av) is not installed; or use backend="decord"') from error
    faults = (av.FFmpegError, OSError)

    try:
        container = av.open(path)
    except faults as error:
        raise VideoError(path, f"PyAV cannot open it: {_message(error)}") from error
    with container:
        try:
            index = _demux(path, container)
        except faults as error:
            raise VideoError(path, f"PyAV cannot read it: {_message(error)}") from error
        stream = container.streams.video[0]

        def decode(
            jump: int, slot: dict[int, int], frames: list[np.ndarray | None], shrink: Shrink
        ) -> None:
            # A seek compares decoding times; frames are told by their own, so none can be wrong.
            container.seek(jump, stream=stream)
            last = max(slot)
            for frame in container.decode(stream):
                if frame.pts in slot and frames[slot[frame.pts]] is None:
                    frames[slot[frame.pts]] = shrink(_upright(frame))
                if frame.pts is not None and frame.pts >= last:
                    break

        def read(indices: np.ndarray, shrink: Shrink) -> np.ndarray:
            pts = index.pts[indices]
            slot = {tick: number for number, tick in enumerate(pts.tolist())}
            frames: list[np.ndarray | None] = [None] * len(indices)
            key = max(int(np.searchsorted(index.key_pts, pts[0], side="right")) - 1, 0)
            start = int(min(index.pts[0], index.key_dts.min()))
            try:
                decode(int(index.key_dts[key]), slot, frames, shrink)
                if any(frame is None for frame in frames) and index.key_dts[key] > start:
                    decode(start, slot, frames, shrink)  # some containers cannot be entered midway
            except faults as error:
                reason = f"PyAV cannot decode frames {_span(indices)} of {len(index.pts)}"
                raise VideoError(path, f"{reason}: {_message(error)}") from error
            missing = [int(i) for i, frame in zip(indices, frames, strict=True) if frame is None]
            if missing:
                reason = f"{len(missing)} of {len(indices)} frames could not be decoded"
                raise VideoError(path, f"{reason}, the first is frame {missing[0]}")
            return np.stack(frames)

        stamps = index.pts * float(stream.time_base)
        stamps, fps = _clock(path, stamps, float(stream.average_rate or 0))
        yield Source(stamps, fps, read)


@dataclass(frozen=True)
class _Index:
    """A stream's packets, in its ticks: when each is shown (ascending), and the key frames'
    showing and decoding times, in the order in which they are shown."""

    pts: np.ndarray
    key_pts: np.ndarray
    key_dts: np.ndarray


def _demux(path: str, container: Any) -> _Index:
    if not container.streams.video:
        raise VideoError(path, NO_STREAM)
    packets = [  # Matroska stores no decoding times; it is searched by showing times
        (packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
        for packet in container.demux(container.streams.video[0])
        if packet.size and not packet.is_discard
    ]
    if not packets:
        raise VideoError(path, NO_FRAMES)
    if any(pts is None for pts, _, _ in packets):
        raise VideoError(path, "its packets carry no time stamps")
    packets.sort()
    keys = [packet for packet in packets if packet[2]]
    leading = packets.index(keys[0]) if keys else len(packets)
    if leading:  # decord silently repeats a neighbour for such frames
        reason = f"{leading} of its {len(packets)} frames lie before the first key frame"
        raise VideoError(path, f"{reason} and cannot be decoded")
    pts, key_pts, key_dts = (
        np.array(ticks, np.int64)
        for ticks in ([p[0] for p in packets], [k[0] for k in keys], [k[1] for k in keys])
    )
    return _Index(pts, key_pts, key_dts)


def count_frames(path: str) -> tuple[int, int]:
    """(frames that the container claims, frames that decode), by decoding the whole file (PyAV).

    Slow; for checking a data set. A fault on the way ends the count. VideoError where the file
    cannot be opened at all.
    """
    import av

    with open_source(path, "pyav") as source, av.open(path) as container:
        decoded = 0
        try:
            for _ in container.decode(video=0):
                decoded += 1
        except (av.FFmpegError, OSError):
            return len(source.timestamps), decoded
    return len(source.timestamps), decoded


def _upright(frame) -> np.ndarray:
    # Phones write the picture lying down and a rotation; decord applies it by itself.
    image = frame.to_ndarray(format="rgb24")
    return np.rot90(image, frame.rotation // 90 % 4) if frame.rotation else image


def _clock(path: str, stamps: np.ndarray, fps: float) -> tuple[np.ndarray, float]:
    stamps = stamps - stamps[0] if len(stamps) else stamps
    if not (math.isfinite(fps) and fps > 0):
        if len(stamps) < 2 or stamps[-1] <= 0:
            raise VideoError(path, f"its frame rate is unknown ({fps})")
        fps = (len(stamps) - 1) / stamps[-1]
    return stamps, float(fps)


def _message(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r".*\.(cc|h):\d+: ", "", text)[:300]  # without decord's source positions


def _span(indices: np.ndarray) -> str:
    return f"{indices[0]} to {indices[-1]}"
