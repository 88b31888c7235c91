"""Reading frames of a video by number: PyAV, or decord where it gives the same frames.

The timeline says which frames there are, for both. A file is opened, read and closed for each clip:
a decord reader that is kept decodes ahead into memory and cannot be used after a fork.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vcr1_fast.data.frame_folder import FOLDER_FPS, frame_names
from vcr1_fast.data.media_file import NeedsPyav, VideoError, open_picture
from vcr1_fast.data.timeline import (
    NO_FRAMES,
    Timeline,
    decoder_faults,
    message,
    open_container,
    read_timeline,
)
from vcr1_fast.data.workers import result_array

BACKENDS = ("decord", "pyav")
Shrink = Callable[[np.ndarray], np.ndarray]
_LOG = logging.getLogger(__name__)
_BATCH = 8
"""Frames that decord decodes at a time."""
_SKIPS_EXACTLY = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}
"""Codecs whose unreferenced frames nothing depends on. In HEVC a frame that is unreferenced in its
own temporal layer may be referred to by another one; VP9's hold the state of the entropy coder."""
_DECORD_FORMATS = {"mp4", "matroska", "avi"}
_DECORD_CODECS = {"h264", "hevc", "mpeg4", "vp8", "vp9"}
_DECORD_LACKS = {"av1", "vvc", "evc"}
_DECORD_PIXELS = {"yuv420p", "yuvj420p"}
_SEEK_GAIN = 12
"""Packets that a seek must save: below that decoding on is cheaper than entering the file again."""


@dataclass(frozen=True)
class Source:
    """An open video.

    `timestamps` (n,) float64, ascending, when each frame is shown, in seconds of the file; `fps`
    the average rate; `end` when the last frame ends; `read(indices, shrink)` decodes frame numbers,
    which may repeat, to (len(indices), h, w, 3) uint8 RGB in memory of `result_array`. Each frame
    (H, W, 3) is handed to `shrink` as soon as it is decoded: a few at most are held beside the
    result.
    """

    timestamps: np.ndarray
    fps: float
    end: float
    read: Callable[[np.ndarray, Shrink], np.ndarray]


@contextmanager
def open_source(path: str, backend: str, folder_fps: float | None = None) -> Iterator[Source]:
    """Open a file, or a folder of images at `folder_fps` (None: FOLDER_FPS), and close it again.

    Whatever a decoder reports becomes a VideoError. For `backend` decord a file whose codec or
    container it cannot read is an error, NeedsPyav. A file that it reads but shows otherwise than
    the timeline says is read by PyAV, and the log says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown video backend {backend!r}, expected one of {BACKENDS}")
    if os.path.isdir(path):
        yield _open_folder(path, FOLDER_FPS if folder_fps is None else folder_fps)
        return
    timeline = read_timeline(path)
    read = _decord_reader(path, timeline) if backend == "decord" else None
    if read is None:
        read = _PyavReader(path, timeline).read
    yield Source(timeline.seconds, timeline.fps, timeline.end, read)


def _open_folder(path: str, fps: float) -> Source:
    names = frame_names(path)
    if not names:
        raise VideoError(path, NO_FRAMES)

    def read(indices: np.ndarray, shrink: Shrink) -> np.ndarray:
        gather = _Gather(path, shrink, indices)
        for number in gather.numbers:
            file = os.path.join(path, names[number])
            gather.add(number, open_picture(file), file)
        return gather.frames

    return Source(np.arange(len(names)) / fps, fps, len(names) / fps, read)


class _Gather:
    """Frames of a clip, shrunk as they come and written to their places in the result.

    `indices`: numbers of the frames in the clip's order; a number may repeat. A frame of another
    size than the first one is refused.
    """

    def __init__(self, path: str, shrink: Shrink, indices: np.ndarray) -> None:
        self.path, self.shrink = path, shrink
        self.places: dict[int, list[int]] = {}
        for place, number in enumerate(indices.tolist()):
            self.places.setdefault(number, []).append(place)
        self.count = len(indices)
        self.missing = set(self.places)
        self.shape: tuple[int, ...] | None = None
        self.is_damaged = False
        self._frames: np.ndarray | None = None

    @property
    def numbers(self) -> list[int]:
        """The distinct numbers, ascending."""
        return sorted(self.places)

    @property
    def frames(self) -> np.ndarray:
        """(count, h, w, 3) uint8, once no frame is missing."""
        assert self._frames is not None and not self.missing
        return self._frames

    def trusts(self, frame: Any) -> bool:
        """Whether a PyAV frame is whole; to be asked of every frame, in the order of output.

        A damaged frame is concealed by what was there before, and the frames up to the next key
        frame refer to it, though the decoder calls them sound.
        """
        self.is_damaged = frame.is_corrupt or (self.is_damaged and not frame.key_frame)
        return not self.is_damaged

    def add(self, number: int, frame: np.ndarray, file: str | None = None) -> None:
        self.shape = self.shape or frame.shape
        if frame.shape != self.shape:
            sizes = f"{frame.shape[:2]}, the first one {self.shape[:2]}"
            raise VideoError(file or self.path, f"frames of a clip differ in size: {sizes}")
        frame = self.shrink(frame)
        if self._frames is None:
            self._frames = result_array((self.count, *frame.shape))
        for place in self.places[number]:
            self._frames[place] = frame
        self.missing.discard(number)


class MissingDecoder(ImportError):
    """A decoder that was asked for and is not installed; the message says what to do."""


class _Astray(Exception):
    """A seek ended behind the packet that was looked for."""


class _PyavReader:
    """Reads frames of one file by PyAV; a frame is recognised by its time stamp, or counted."""

    def __init__(self, path: str, timeline: Timeline) -> None:
        self.path, self.timeline = path, timeline

    def read(self, indices: np.ndarray, shrink: Shrink) -> np.ndarray:
        """Frames (len(indices), h, w, 3) uint8 RGB of numbers that may repeat."""
        gather, faults = _Gather(self.path, shrink, indices), decoder_faults()
        recoverable: tuple[type[BaseException], ...] = (*faults, _Astray)
        try:
            if self.timeline.packets is None:
                self._count_through(gather)
            else:
                try:
                    self._enter_midway(gather)
                except recoverable as error:
                    if isinstance(error, VideoError):
                        raise
                if gather.missing:
                    # Some files cannot be entered midway: no recovery points, a wrong index.
                    self._read_through(gather)
        except VideoError:
            raise
        except faults as error:
            reason = f"PyAV cannot decode frames {_span(gather.numbers)} of {len(self.timeline)}"
            raise VideoError(self.path, f"{reason}: {message(error)}") from error
        if missing := gather.missing:
            reason = f"{len(missing)} of {len(gather.places)} frames could not be decoded"
            raise VideoError(self.path, f"{reason}, the first is frame {min(missing)}")
        return gather.frames

    def _count_through(self, gather: _Gather) -> None:
        last = gather.numbers[-1]
        with open_container(self.path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if gather.trusts(frame) and number in gather.places:
                    gather.add(number, upright(frame))
                if number == last:
                    return

    def _read_through(self, gather: _Gather) -> None:
        numbers = {int(self.timeline.ticks[i]): i for i in gather.numbers}
        gather.is_damaged = False
        with open_container(self.path) as (container, stream):
            for frame in container.decode(stream):
                _keep(frame, numbers, gather)
                if not gather.missing:
                    return

    def _enter_midway(self, gather: _Gather) -> None:
        packets = self.timeline.packets
        assert packets is not None
        places = packets.places()[gather.numbers]
        entries = [packets.entry(int(place)) for place in places]
        numbers = {int(packets.pts[p]): i for p, i in zip(places, gather.numbers, strict=True)}
        # FFmpeg compares a seek's target with showing times in these files, with decoding times in
        # others. The smaller one would land a key frame too early: measured, twice the decoding.
        by_pts = self.timeline.formats & {"mp4", "matroska"}
        targets = packets.pts if by_pts else packets.dts
        skips = self.timeline.codec in _SKIPS_EXACTLY and not self.timeline.interlaced
        with open_container(self.path) as (container, stream):
            for begin, group in _groups(entries, places.tolist()):
                wanted = {numbers[int(packets.pts[place])] for place in group}
                context = stream.codec_context
                container.seek(int(targets[begin]), stream=stream)
                gather.is_damaged = False
                last, is_first = int(packets.pts[max(group)]), True
                for packet in container.demux(stream):
                    if is_first and packet.pts is not None:
                        if packet.pts > packets.pts[begin]:
                            raise _Astray
                        is_first = False
                    if skips:
                        # Nothing depends on an unreferenced frame, so it need not be decoded.
                        is_wanted = packet.pts is None or packet.pts in numbers
                        context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
                    for frame in packet.decode():
                        if skips and frame.interlaced_frame:
                            # Its second field may be a packet that was skipped.
                            raise _Astray
                        _keep(frame, numbers, gather)
                    if packet.pts == last and packet.size:
                        for frame in context.decode(None):  # those that wait for their turn
                            _keep(frame, numbers, gather)
                        break
                if wanted & gather.missing:
                    return


def _groups(entries: list[int], places: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(key packet to begin at, wanted packets) of runs that are decoded in one go."""
    begin = reached = -1
    group: list[int] = []
    for entry, place in sorted(zip(entries, places, strict=True)):
        if group and entry > reached + _SEEK_GAIN:
            yield begin, group
            group = []
        if not group:
            begin = entry
        group.append(place)
        reached = max(reached, place)
    if group:
        yield begin, group


def _keep(frame: Any, numbers: dict[int, int], gather: _Gather) -> None:
    number, is_whole = numbers.get(frame.pts), gather.trusts(frame)
    if number in gather.missing and is_whole:
        gather.add(number, upright(frame))


def upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a PyAV frame, turned and mirrored as its display matrix says.

    The matrix maps column x and row y to x' = a x + c y, y' = b x + d y (ISO 14496-12, 16.16 fixed
    point). Angles between quarter turns are taken as the nearest one.
    """
    image = frame.to_ndarray(format="rgb24")
    matrix = display_matrix(frame)
    if matrix is None:
        return image
    a, b, c, d = matrix
    if abs(a) >= abs(b):
        down, right = d < 0, a < 0
    else:
        image, down, right = image.transpose(1, 0, 2), b < 0, c < 0
    return np.ascontiguousarray(image[:: -1 if down else 1, :: -1 if right else 1])


def display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of a frame's display matrix; None for a frame that is shown as it is stored."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32)
            a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
            if not any((a, b, c, d)) or (a > 0 and d > 0 and not b and not c):
                return None
            return a, b, c, d
    return None


def count_frames(path: str) -> tuple[int, int]:
    """(frames on the timeline, frames that decode), by decoding the whole file with PyAV.

    Slow; for checking a data set. A fault on the way ends the count. VideoError for a file that
    cannot be opened.
    """
    total, decoded = len(read_timeline(path)), 0
    with open_container(path) as (container, stream):
        try:
            for _ in container.decode(stream):
                decoded += 1
        except decoder_faults():
            return total, decoded
    return total, decoded


def _decord_reader(
    path: str, timeline: Timeline
) -> Callable[[np.ndarray, Shrink], np.ndarray] | None:
    """`read` of a Source by decord; None for a file that it would show otherwise than PyAV."""
    try:
        import decord
    except ImportError as error:
        raise MissingDecoder(
            'decord is not installed: pip install decord, or use backend="pyav" '
            "(data.decoder=pyav, the default)"
        ) from error
    if timeline.codec in _DECORD_LACKS:
        reason = f'decord has no decoder for {timeline.codec}; use backend="pyav"'
        raise NeedsPyav(path, f"{reason} (data.decoder=pyav)")
    if not timeline.formats & _DECORD_FORMATS:
        # Of an MPEG transport stream it shows the first frames wrong, even when read in order.
        reason = f"decord is not exact for {'/'.join(sorted(timeline.formats))} files"
        raise NeedsPyav(path, f'{reason}, read it by backend="pyav" or put it into an mp4')
    if (difference := _decord_differs(path, timeline)) is not None:
        _hand_over(difference)
        return None
    decord.logging.set_level(decord.logging.QUIET)  # its faults come back as exceptions
    faults = (decord.DECORDError, RuntimeError, IndexError, OSError, StopIteration)
    try:
        # More threads do not speed up the reading of a few frames, and workers run side by side.
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        total = len(reader)
        stamps = np.asarray(reader.get_frame_timestamp(np.arange(total)), np.float64)[:, 0]
        keys = list(reader.get_key_indices())
    except faults as error:
        if "cannot find video stream" in str(error):
            reason = f'decord cannot read its codec, {timeline.codec}; use backend="pyav"'
            raise NeedsPyav(path, f"{reason} (data.decoder=pyav)") from error
        _hand_over(f"it cannot open them: {message(error).removeprefix(f'[{path}] ')}")
        return None
    # decord's stamps are float32, and it counts seconds from another zero.
    tolerance = 1e-3 + 1e-6 * timeline.end
    off = stamps - timeline.seconds if total == len(timeline) else np.full(1, np.inf)
    if total != len(timeline) or np.ptp(off) > tolerance:
        _hand_over("its frames are not those of the timeline")
        return None
    jumps = _decord_jumps_right(timeline, keys)

    def read(indices: np.ndarray, shrink: Shrink) -> np.ndarray:
        gather = _Gather(path, shrink, indices)
        numbers = gather.numbers
        try:
            if jumps:
                for i in range(0, len(numbers), _BATCH):
                    part = numbers[i : i + _BATCH]
                    for number, frame in zip(part, reader.get_batch(part).asnumpy(), strict=True):
                        gather.add(number, frame)
            else:
                for number in range(numbers[-1] + 1):
                    frame = reader.next()  # next() alone never jumps, skip_frames() does
                    if number in gather.places:
                        gather.add(number, frame.asnumpy())
            return gather.frames
        except faults as error:
            reason = f"decord cannot decode frames {_span(gather.numbers)} of {total}"
            advice = 'backend="pyav" may'
            raise VideoError(path, f"{reason} ({advice}): {message(error)}") from error

    return read  # decord closes the file when the last reference goes


def _decord_differs(path: str, timeline: Timeline) -> str | None:
    """Why decord may show a file otherwise than the timeline says; None where it does not."""
    packets = timeline.packets
    if packets is None or "avi" in timeline.formats:
        return "its packets do not say when frames are shown"
    if not packets.shown.all():
        return "an edit list leaves frames out"
    if timeline.ticks[0] != 0:
        return "its time stamps do not begin at 0"  # it would show every frame a few places off
    if timeline.codec not in _DECORD_CODECS or timeline.pix_fmt not in _DECORD_PIXELS:
        return f"it is not exact for {timeline.codec} in {timeline.pix_fmt or 'no'} pixels"
    if timeline.videos > 1:
        return "the file holds several video streams"
    if timeline.interlaced:
        return "its frames are interlaced"
    if timeline.size[0] % 2 or timeline.size[1] % 2:
        return "its frames have an odd size"
    with open_container(path) as (container, stream):
        try:
            first = next(container.decode(stream), None)
        except decoder_faults():
            return None  # the reading finds the fault
    if first is not None and display_matrix(first) is not None:
        return "its frames are turned or mirrored"
    return None


def _decord_jumps_right(timeline: Timeline, keys: list[int]) -> bool:
    """Whether decord finds the frames it jumps to; if not, it must read from the beginning.

    It takes a key frame's place in the file for its place on screen, and jumps to the last key
    frame that is decoded before the time it wants. With open GOPs (usual in HEVC) or in fragmented
    files it would silently show frames a few places off.
    """
    packets = timeline.packets
    assert packets is not None
    key_pts, key_dts = packets.pts[packets.key], packets.dts[packets.key]
    places = np.searchsorted(timeline.ticks, key_pts)
    return places.tolist() == keys and bool((key_dts[1:] > key_pts[:-1]).all())


@lru_cache(maxsize=64)  # a set of a thousand such files needs one line
def _hand_over(reason: str) -> None:
    _LOG.warning("decord hands files over to PyAV: %s", reason)


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}"
