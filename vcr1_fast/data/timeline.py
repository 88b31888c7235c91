"""When each frame of a video file is shown: one model for both decoders and for `probe`.

A timeline is built from the packets of the file, without decoding them. Packets that an edit list
marks as discarded are decoded but not shown. Where packets cannot say when frames are shown (AVI
with B-frames, repeated or absent stamps), the file is decoded once and its frames are counted.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vcr1_fast.data.media_file import VideoError, check_file

NO_FRAMES = "holds no video frames"
NO_STREAM = f"{NO_FRAMES} (no video stream)"
REMUX = "rewrite it by `ffmpeg -i IN -c copy OUT.mp4`"
REENCODE = "re-encode it by `ffmpeg -i IN -c:v libx264 OUT.mp4`"

MAX_REORDER = 32
"""Places between the decoding and the showing order of a frame: H.264 and HEVC allow 16."""
EVEN_TOLERANCE = 1.5
"""Frame periods by which stamps may leave an even grid: one dropped frame, and rounding."""
MAX_OFF = 0.5
"""Most seconds by which they may leave it, however slow the rate."""
HELD_TAIL = (1.0, 0.05, 10.0)
"""How much may lie behind a file's last packet: at least these seconds, this share of the stated
length, at most these seconds."""
_LENGTH_IN_HEADER = {"matroska", "webm", "asf", "flv"}
_BROADCAST = {"mpegts", "mpeg"}
_VP8 = {"vp8", "libvpx"}
_HIDDEN_FRAMES = _VP8 | {"vp9", "libvpx-vp9"}
_NOT_A_VIDEO = {"tty": "a text", "txt": "a text", "ass": "subtitles", "srt": "subtitles"}


@dataclass(frozen=True, eq=False)
class Packets:
    """The packets of a video stream in decoding order, in its ticks; all arrays (n,).

    `pts` and `dts` int64, showing and decoding time; `key` bool, decoding can begin here; `shown`
    bool, the frame is part of the presentation.
    """

    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    shown: np.ndarray

    def places(self) -> np.ndarray:
        """(number of shown frames,) int64: decoding place of each, in the order of showing."""
        shown = np.flatnonzero(self.shown)
        return shown[np.argsort(self.pts[shown], kind="stable")]

    def entry(self, place: int) -> int:
        """Decoding place of the key packet from which the packet at `place` decodes.

        The last key packet that comes no later in decoding order and in time: the leading frames
        of an open GOP are decoded after a key packet but refer to the one before it.
        """
        keys = np.flatnonzero(self.key[: place + 1])
        keys = keys[self.pts[keys] <= self.pts[place]]
        return int(keys[-1]) if len(keys) else 0


@dataclass(frozen=True, eq=False)
class Timeline:
    """When the frames of a file are shown, and how to find them again.

    `seconds` (n,) float64, ascending, in the file: 0 is where a player starts to count. `fps` the
    average rate; `end` when the last frame ends, in seconds. `ticks` (n,) int64, the presentation
    time stamps. `packets` are the stream's packets; None where they are no guide: then frames are
    found by counting from the beginning. `codec`, `pix_fmt`, `size` (width, height), `formats`
    (names of the container), `videos` (number of video streams) describe the file.
    """

    seconds: np.ndarray
    fps: float
    end: float
    ticks: np.ndarray
    packets: Packets | None
    codec: str
    pix_fmt: str
    size: tuple[int, int]
    formats: frozenset[str]
    videos: int
    interlaced: bool

    def __len__(self) -> int:
        return len(self.seconds)


def is_even(seconds: np.ndarray, fps: float, begin: float | None = None) -> bool:
    """Whether stamps (n,) lie on a grid of rate `fps`, and start within its tolerance of `begin`.

    The grid may start anywhere; it is fitted by its middle, which halves the largest distance.
    """
    if len(seconds) < 2:
        return True
    off = seconds - np.arange(len(seconds)) / fps
    tolerance = min(EVEN_TOLERANCE / fps, MAX_OFF)
    late = 0.0 if begin is None else seconds[0] - begin
    return float(off.max() - off.min()) <= 2 * tolerance and late <= tolerance


def decoder_faults() -> tuple[type[BaseException], ...]:
    """What PyAV raises for a bad file."""
    import av

    return (av.FFmpegError, OSError, ValueError, IndexError)


@contextmanager
def open_container(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file, by PyAV; VideoError where there is none.

    Texts in any encoding are accepted: nothing here reads them.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("PyAV is not installed: pip install av") from error

    faults = decoder_faults()
    try:
        container = av.open(path, metadata_errors="replace")
    except faults as error:
        raise VideoError(path, f"PyAV cannot open it: {message(error)}") from error
    with container:
        for name in container.format.name.split(","):
            if name in _NOT_A_VIDEO:
                raise VideoError(path, f"cannot open it: it is {_NOT_A_VIDEO[name]}, not a video")
        yield container, _video_stream(path, container)


def _video_stream(path: str, container: Any) -> Any:
    from av.stream import Disposition

    if not container.streams.video:
        text = container.dumps_format() if hasattr(container, "dumps_format") else ""
        if unknown := re.search(r"Video: ([^,\n]+)", text or ""):
            reason = f"no decoder for its codec ({unknown[1].strip()})"
            raise VideoError(path, f"{reason}; {REENCODE}")
        raise VideoError(path, NO_STREAM)
    covers = Disposition.attached_pic
    moving = [s for s in container.streams.video if not s.disposition & covers]
    if not moving:
        raise VideoError(path, f"{NO_FRAMES} (only a cover picture)")
    best = container.streams.best("video")
    stream = best if best is not None and not best.disposition & covers else moving[0]
    if stream.codec_context is None:
        raise VideoError(path, f"no decoder for its codec; {REENCODE}")
    stream.codec_context.thread_count = 1  # workers run side by side, one on each core
    return stream


def read_timeline(path: str) -> Timeline:
    """The timeline of a video file.

    VideoError for a file that is cut off, holds no frames, or whose frames have no order in time.
    """
    check_file(path)
    faults = decoder_faults()
    with open_container(path) as (container, stream):
        can_hide = stream.codec_context.name in _HIDDEN_FRAMES
        try:
            rows = [
                _Row(
                    packet.pts,
                    packet.dts,
                    packet.is_keyframe,
                    bool(packet.size)
                    and not packet.is_discard
                    and not (can_hide and _is_hidden(packet)),
                    packet.is_corrupt,
                    packet.size,
                )
                for packet in container.demux(stream)
                if packet.size or packet.dts is not None  # all but the flushing packet
            ]
        except faults as error:
            raise VideoError(path, f"PyAV cannot read it: {message(error)}") from error
        if not any(row.shown for row in rows):
            raise VideoError(path, NO_FRAMES)
        _check_whole(path, container, stream, rows)
        return _assemble(path, container, stream, [row for row in rows if row.size])


class _Row(NamedTuple):
    pts: int | None
    dts: int | None
    key: bool
    shown: bool
    corrupt: bool
    size: int


def _assemble(path: str, container: Any, stream: Any, rows: list[_Row]) -> Timeline:
    formats = frozenset(container.format.name.split(","))
    shown = [row for row in rows if row.shown]
    first_key = next((i for i, row in enumerate(rows) if row.key), len(rows))
    if formats & _BROADCAST and first_key < len(rows):
        # A recording of a broadcast begins anywhere; a player shows it from the first key frame.
        rows, first_key = rows[first_key:], 0
        shown = [row for row in rows if row.shown]
    if lost := sum(row.shown for row in rows[:first_key]):
        reason = f"{lost} of its {len(shown)} frames lie before the first key frame"
        raise VideoError(path, f"{reason} and cannot be decoded")
    # FFmpeg guesses the showing times of AVI; they are right only where frames keep their order.
    is_avi = "avi" in formats
    is_guess = is_avi and any(row.pts != row.dts for row in rows)
    stamps = {row.pts for row in shown}
    packets = None
    if is_guess or None in stamps or len(stamps) < len(shown):
        ticks = _slots(path, shown) if is_avi else _output_ticks(path)
    else:
        packets = _packets(path, rows)
        ticks = np.sort(packets.pts[packets.shown])
    base = float(stream.time_base)
    fps = _rate(path, ticks * base, float(stream.average_rate or 0))
    seconds = ticks * base - _zero(container, 1 / fps)
    context = stream.codec_context
    return Timeline(
        seconds=seconds,
        fps=fps,
        end=_end(seconds, fps),
        ticks=ticks,
        packets=packets,
        codec=getattr(context.codec, "canonical_name", context.name),
        pix_fmt=context.pix_fmt or "",
        size=(context.width, context.height),
        formats=formats,
        videos=len(container.streams.video),
        interlaced=int(getattr(context, "field_order", 0) or 0) > 1,
    )


def _packets(path: str, rows: list[_Row]) -> Packets:
    """The packets in order; VideoError where their stamps run backwards, as after a wrap."""
    pts = np.array([row.pts or 0 for row in rows], np.int64)
    # Matroska stores no decoding times; it is searched by showing times.
    dts = np.array([row.pts or 0 if row.dts is None else row.dts for row in rows], np.int64)
    key = np.array([row.key for row in rows], bool)
    shown = np.array([row.shown for row in rows], bool)
    order = np.argsort(pts[shown], kind="stable")
    moved = np.abs(order - np.arange(len(order)))
    known = [row.dts for row in rows if row.shown and row.dts is not None]
    backwards = any(later < earlier for earlier, later in pairwise(known))
    if moved.max() > MAX_REORDER or backwards:
        raise VideoError(path, f"its time stamps run backwards; {REMUX}")
    leaders = shown & (pts < pts[np.argmax(key)])
    if leaders.any():  # of an open GOP whose beginning was cut away, or decodable without it
        decoded = _decoded_before(path, int(pts[np.argmax(key)]))
        shown &= ~leaders | np.isin(pts, decoded)
    return Packets(pts, dts, key, shown)


def _decoded_before(path: str, tick: int) -> list[int]:
    """Stamps of the frames that a decoder gives from the beginning to the first at `tick`."""
    found = []
    for frame in _frames(path):
        if frame.pts is None or frame.pts >= tick:
            break
        if not frame.is_corrupt:
            found.append(frame.pts)
    return found


def _slots(path: str, shown: list[_Row]) -> np.ndarray:
    """Ticks of an AVI file's frames, in output order: its chunks have places in time, not stamps.

    Frames take the places of the chunks that hold one, whatever their decoding order.
    """
    ticks = sorted(row.dts for row in shown if row.dts is not None)
    decoded = sum(1 for _ in _frames(path))
    if not len(ticks) == len(shown) == decoded:
        reason = f"{len(shown)} chunks of it decode to {decoded} frames without time stamps"
        raise VideoError(path, f"{reason}; {REENCODE}")
    return np.array(ticks, np.int64)


def _output_ticks(path: str) -> np.ndarray:
    """Ticks of all frames in output order, by decoding; VideoError where they have no order."""
    ticks = [frame.pts for frame in _frames(path)]
    if not ticks:
        raise VideoError(path, NO_FRAMES)
    if None in ticks:
        raise VideoError(path, f"its packets carry no time stamps; {REMUX}")
    if any(later < earlier for earlier, later in pairwise(ticks)):
        raise VideoError(path, f"its time stamps run backwards; {REMUX}")
    return np.array(ticks, np.int64)


def _frames(path: str) -> Iterator[Any]:
    with open_container(path) as (container, stream):
        try:
            yield from container.decode(stream)
        except decoder_faults() as error:
            raise VideoError(path, f"PyAV cannot decode it: {message(error)}") from error


def _is_hidden(packet: Any) -> bool:
    """Whether a VP8 or VP9 packet holds only a frame that is referred to but never shown."""
    data = memoryview(packet)
    if packet.stream.codec_context.name in _VP8:
        return not data[0] >> 4 & 1  # show_frame
    is_superframe = data[len(data) - 1] & 0xE0 == 0xC0  # it ends with its index
    shows_existing, show_frame = data[0] & 8, data[0] & 2
    return not (is_superframe or shows_existing or show_frame)


def _check_whole(path: str, container: Any, stream: Any, rows: list[_Row]) -> None:
    """VideoError for a file whose end is missing, as far as its index or its header says so."""
    formats = set(container.format.name.split(","))
    entries = len(stream.index_entries) if "mp4" in formats else 0
    if entries > len(rows):
        reason = f"{len(rows)} of {entries} samples could be read"
        raise VideoError(path, f"the file is cut off or damaged: {reason}")
    if "avi" in formats:  # lost chunks would make later frames early
        slots = np.unique([row.dts for row in rows if row.dts is not None])
        reached = int(slots[-1] + np.diff(slots).max(initial=1)) if len(slots) else 0
        if stream.frames > reached:
            reason = f"{reached} of {stream.frames} chunks could be read"
            raise VideoError(path, f"the file is cut off or damaged: {reason}")
    if rows[-1].corrupt:
        raise VideoError(path, "the file is cut off: its last packet is incomplete")
    if not formats & _LENGTH_IN_HEADER or container.duration is None:
        return
    claimed = container.duration / 1e6
    least, share, most = HELD_TAIL
    allowed = min(max(least, share * claimed), most)
    last = max(row.pts or 0 for row in rows) * float(stream.time_base)
    if claimed - last > allowed and (last := _last_second(path)) < claimed - allowed:
        reason = f"its header says {claimed:.1f} s, its last packet is at {last:.1f} s"
        raise VideoError(path, f"the file is cut off: {reason}")


def _last_second(path: str) -> float:
    """When the last packet of any stream ends: sound may be longer than the picture."""
    with open_container(path) as (container, _):
        ends = [
            (packet.pts + (packet.duration or 0)) * float(packet.time_base)
            for packet in container.demux()
            if packet.pts is not None
        ]
    return max(ends, default=0.0)


def _zero(container: Any, period: float) -> float:
    """Second at which a player starts to count: where the first stream starts.

    A start within a frame (`period` seconds) of 0 is sound that does not fit the grid of frames.
    """
    streams = [*container.streams.video, *container.streams.audio]
    starts = [s.start_time * float(s.time_base) for s in streams if s.start_time is not None]
    start = min(starts, default=0.0)
    return 0.0 if abs(start) < period else start


def _rate(path: str, seconds: np.ndarray, nominal: float) -> float:
    """Frames a second: the container's rate, or the measured one where the two disagree by more
    than half a frame over the whole file."""
    steps, span = len(seconds) - 1, float(seconds[-1] - seconds[0])
    if steps and span <= 0:
        raise VideoError(path, f"all of its {len(seconds)} frames have the same time stamp")
    if not (math.isfinite(nominal) and nominal > 0):
        if not steps:
            raise VideoError(path, f"its frame rate is unknown ({nominal})")
        return steps / span
    return nominal if abs(steps - span * nominal) <= 0.5 else steps / span


def _end(seconds: np.ndarray, fps: float) -> float:
    """When the last frame ends: one period, or the median one of uneven stamps, after it starts."""
    if is_even(seconds, fps):
        first = float(seconds[0])
        return max(first + len(seconds) / fps, float(seconds[-1]))
    return float(seconds[-1] + np.median(np.diff(seconds)))


def message(error: BaseException) -> str:
    """One line of an exception's text, without the decoder's source positions."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r".*\.(cc|h):\d+: ", "", text)[:300]
