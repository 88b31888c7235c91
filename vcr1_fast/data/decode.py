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

from vcr1_fast.data.picture import read_picture

BACKENDS = ("decord", "pyav")
IMAGES = (".jpg", ".jpeg", ".png")
FOLDER_FPS = 10.0
"""Frames a second of a folder of images, which says nothing about time: GOT-10k's rate."""
NO_FRAMES = "holds no video frames"
NO_STREAM = f"{NO_FRAMES} (no video stream)"


class VideoError(ValueError):
    """A video or image that cannot be read as asked; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """An open video.

    `timestamps` (n,) float64, seconds from the first frame, ascending, one a frame of the
    container; `fps` its average rate; `read(indices)` decodes distinct ascending frame numbers to
    (len(indices), H, W, 3) uint8 RGB.
    """

    timestamps: np.ndarray
    fps: float
    read: Callable[[np.ndarray], np.ndarray]


@contextmanager
def open_source(path: str, backend: str) -> Iterator[Source]:
    """Open `path`, close it on leaving. Whatever the decoder reports becomes a VideoError."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown video backend {backend!r}, expected one of {BACKENDS}")
    if os.path.isdir(path):
        opener = _open_folder
    else:
        _check_file(path)
        opener = _open_decord if backend == "decord" else _open_pyav
    with opener(path) as source:
        if len(source.timestamps) == 0:
            raise VideoError(path, NO_FRAMES)
        yield source


@contextmanager
def _open_folder(path: str) -> Iterator[Source]:
    names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGES))

    def read(indices: np.ndarray) -> np.ndarray:
        files = [os.path.join(path, names[i]) for i in indices]
        frames = [open_picture(file) for file in files]
        for file, frame in zip(files, frames, strict=True):
            if frame.shape != frames[0].shape:
                sizes = f"{frame.shape[:2]}, the first one {frames[0].shape[:2]}"
                raise VideoError(file, f"frames of a clip differ in size: {sizes}")
        return np.stack(frames)

    yield Source(np.arange(len(names)) / FOLDER_FPS, FOLDER_FPS, read)


def open_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image file; VideoError, naming it, where it cannot be read."""
    try:
        return read_picture(path)
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except OSError as error:
        raise VideoError(path, f"not a picture: {error}") from error


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

    def read(indices: np.ndarray) -> np.ndarray:
        try:
            if jumps:
                return reader.get_batch(indices).asnumpy()
            wanted = set(indices.tolist())  # next() alone never jumps, skip_frames() does
            everything = ((place, reader.next()) for place in range(int(indices[-1]) + 1))
            return np.stack([frame.asnumpy() for place, frame in everything if place in wanted])
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

        def decode(jump: int, slot: dict[int, int], frames: list[np.ndarray | None]) -> None:
            # A seek compares decoding times; frames are told by their own, so none can be wrong.
            container.seek(jump, stream=stream)
            last = max(slot)
            for frame in container.decode(stream):
                if frame.pts in slot and frames[slot[frame.pts]] is None:
                    frames[slot[frame.pts]] = _upright(frame)
                if frame.pts is not None and frame.pts >= last:
                    break

        def read(indices: np.ndarray) -> np.ndarray:
            pts = index.pts[indices]
            slot = {tick: number for number, tick in enumerate(pts.tolist())}
            frames: list[np.ndarray | None] = [None] * len(indices)
            key = max(int(np.searchsorted(index.key_pts, pts[0], side="right")) - 1, 0)
            start = int(min(index.pts[0], index.key_dts.min()))
            try:
                decode(int(index.key_dts[key]), slot, frames)
                if any(frame is None for frame in frames) and index.key_dts[key] > start:
                    decode(start, slot, frames)  # some containers cannot be entered midway
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


def _check_file(path: str) -> None:
    """VideoError for what is plain without a decoder, in words a user can act on."""
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if not os.path.isfile(path):
        raise VideoError(path, "not a file")
    size = os.path.getsize(path)
    if size == 0:
        raise VideoError(path, "the file is empty (0 bytes)")
    position, kinds = 0, []
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not kinds and kind != b"ftyp":
                return  # not an mp4: left to the decoder
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            length = length or size - position  # 0: up to the end of the file
            if length < 8:
                break
            kinds.append(kind)
            position += length
            if position > size:
                name = kind.decode("latin-1")
                reason = f"its {name!r} box needs {position} bytes, the file has {size}"
                raise VideoError(path, f"the file is cut off: {reason}")
    if kinds and b"moov" not in kinds:
        raise VideoError(path, "the file is cut off: it has no index ('moov' box)")


def _message(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r".*\.(cc|h):\d+: ", "", text)[:300]  # without decord's source positions


def _span(indices: np.ndarray) -> str:
    return f"{indices[0]} to {indices[-1]}"
