"""Reading clips: which frames, decoded to uint8, one at a time or by worker processes.

An image is read like a clip: one frame, without a rate or a length.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from vcr1_fast.data.clip_cache import ClipCache
from vcr1_fast.data.decode import BACKENDS, Source, count_frames, open_source
from vcr1_fast.data.media_file import NeedsPyav, VideoError, open_picture
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.timeline import is_even
from vcr1_fast.data.workers import (
    PREFETCH_BYTES,
    Stage,
    WorkerDied,
    WorkerPool,
    WorkerTimeout,
    result_array,
)

__all__ = [
    "BACKENDS",
    "Clip",
    "ClipReader",
    "ClipRequest",
    "VideoError",
    "VideoInfo",
    "count_frames",
    "probe",
    "probe_all",
    "read_clip",
    "read_image",
    "thinned",
]

# Time stamps of some containers are rounded to milliseconds.
TIME_TOLERANCE = 1e-3
DECODER = "pyav"
"""The decoder of a ClipReader, of training, evaluation and chat; docs/data.md has the reasons."""
_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Fit = Callable[[np.ndarray, int | None], np.ndarray]
Times = Sequence[float] | Callable[[float], Sequence[float]]


@dataclass(frozen=True)
class Clip:
    """Decoded frames of (a part of) a video, or an image.

    `frames` (T, H, W, 3) uint8 RGB; `times` (T,) float64, seconds from the beginning of the part
    at which the frames are on screen: their time stamps, or for frames sampled in time the moments
    at which they were taken; `fps` the rate of the sampled frames. By model family, the model is
    given i / fps as the time of frame i, or `times` as text. `duration` the length of the part in
    seconds; both None for an image;
    `start` where the part begins, in seconds of the file; `fitted` whether the frames already have
    the size at which the model sees them; `staged` what a reader's `stage` made of them: for
    training (patches, grid_thw) on the model's device, else None.
    """

    frames: np.ndarray
    times: np.ndarray
    fps: float | None
    duration: float | None
    path: str
    start: float = 0.0
    fitted: bool = False
    staged: Any = None


def thinned(clip: Clip, count: int = 8) -> Clip:
    """At most `count` of a clip's frames at even distances, first and last included; a copy."""
    last = len(clip.frames) - 1
    chosen = np.unique(np.linspace(0, last, count).round().astype(int))
    return replace(clip, frames=clip.frames[chosen], times=clip.times[chosen])


@dataclass(frozen=True)
class VideoInfo:
    """A file's timeline in short: number of frames shown, average rate, and length in seconds."""

    frames: int
    fps: float
    duration: float


@dataclass(frozen=True)
class ClipRequest:
    """The arguments of one `read_clip`, or an image to read."""

    path: str
    config: FrameConfig = field(default_factory=FrameConfig)
    start: float | None = None
    end: float | None = None
    times: Times | None = None
    is_image: bool = False
    folder_fps: float | None = None


def probe(path: str, *, backend: str | None = None, folder_fps: float | None = None) -> VideoInfo:
    """Frames shown, rate and length of a video; `folder_fps` as in `read_clip`.

    Decodes only files whose packets do not say when frames are shown. VideoError names the file.
    """
    with open_source(path, backend or _installed(), folder_fps) as source:
        return VideoInfo(len(source.timestamps), source.fps, source.end)


def read_clip(
    path: str,
    config: FrameConfig | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    times: Times | None = None,
    backend: str | None = None,
    folder_fps: float | None = None,
    fit: Fit | None = None,
) -> Clip:
    """Sample and decode a clip.

    `start` and `end` (seconds in the file) choose the part to watch; an `end` behind the last frame
    means the last frame. Of that part `config` takes frames at even distances in number. Where
    frames do not come at an even rate, they are taken at even distances in time, so that i / fps
    is when frame i is shown; a frame that stands still repeats. An uneven part of which every frame
    is asked for (a rate above its highest one) keeps its frames and their own stamps. `times` names
    the times instead: seconds from the beginning of the part, or a function from the part's length
    to such seconds; the nearest frame is taken, so frames may repeat.

    `folder_fps` is the rate of a folder of images, which does not state one. `fit(frame, count)`
    resizes each frame (H, W, 3) of the `count` as it is decoded, so that they are never all held
    in their full size. `backend` as in `open_source`; None: decord where it is installed, else
    PyAV, without a hand-over between them (`ClipReader` has one). Raises VideoError, naming the
    file, for one that is missing, empty, cut off, damaged, shorter than asked for, or of a shape
    that `fit` refuses.
    """
    config = config or FrameConfig()
    with open_source(path, backend or _installed(), folder_fps) as source:
        part = _part(path, source, start, end)
        if times is None:
            indices, fps, shown = _sample(path, source, part, config)
        else:
            wanted = np.asarray(times(part.length) if callable(times) else times, np.float64)
            _check_times(path, wanted, part.length)
            stamps = source.timestamps[part.first : part.stop] - part.begin
            indices, fps = part.first + _nearest(stamps, wanted), _rate(wanted, part.length)
            shown = source.timestamps[indices] - part.begin
        frames = source.read(indices, _shrink(path, fit, len(indices)))
        is_fitted = fit is not None
        return Clip(frames, shown, fps, part.length, path, part.begin, fitted=is_fitted)


def _installed() -> str:
    """Backend of a direct call that names none: decord where it is installed, else PyAV."""
    try:
        import decord  # noqa: F401 - a broken install counts as none
    except ImportError:
        return "pyav"
    return "decord"


def read_image(path: str, fit: Fit | None = None) -> Clip:
    """An image, upright, as a clip of one frame. VideoError names the file that is none."""
    picture = _shrink(path, fit, None)(open_picture(path))
    frames = result_array((1, *picture.shape))
    frames[0] = picture
    return Clip(frames, np.zeros(1), None, None, path, fitted=fit is not None)


def _shrink(path: str, fit: Fit | None, count: int | None) -> Callable[[np.ndarray], np.ndarray]:
    if fit is None:
        return lambda frame: frame

    def shrink(frame: np.ndarray) -> np.ndarray:
        try:
            return fit(frame, count)
        except ValueError as error:
            raise VideoError(path, str(error)) from error

    return shrink


class ClipReader:
    """Reads clips and images in worker processes; one that hangs or crashes costs that clip only.

    `timeout` seconds a clip (None: no limit), after which its worker is killed and replaced. A
    worker that dies is replaced and asked once more: its end may have come from outside.
    `backend` decord hands a file whose codec or container it lacks over to PyAV. `workers=0` reads
    in this process, where nothing can be killed. `prefetch` clips, read or being read, are held
    ahead of the consumer (default 2 a worker), of which decoded frames and what `stage` makes of
    them take at most `prefetch_bytes`, and the clip that is waited for. `fit(frame, count)` resizes
    every frame where it is decoded (`count`: frames of the clip, None for an image); `stage(clip)`
    finishes a clip in a thread of this process, ahead of the consumer. `cache` keeps what was
    decoded, and resized by `fit`, on the disk. `reader` replaces `read_clip`; it must be importable
    by name, as `fit` must. Use it in a `with` statement, or call `close`.
    """

    def __init__(
        self,
        *,
        backend: str = DECODER,
        timeout: float | None = 60.0,
        workers: int = 2,
        prefetch: int | None = None,
        prefetch_bytes: int = PREFETCH_BYTES,
        fit: Fit | None = None,
        stage: Stage | None = None,
        cache: ClipCache | None = None,
        reader: Callable[..., Clip] = read_clip,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown video backend {backend!r}, expected one of {BACKENDS}")
        read = partial(_read_request, reader, backend, fit)
        if cache is not None:
            read = partial(_read_cached, cache, read, backend, fit)
        self._pool = WorkerPool(
            read,
            workers=workers,
            timeout=timeout,
            prefetch=prefetch,
            prefetch_bytes=prefetch_bytes,
            stage=stage,
        )

    def read(self, requests: Iterable[ClipRequest]) -> Iterator[Clip | VideoError]:
        """A Clip, or the VideoError that explains its absence, for each request, in order.

        Reading runs ahead of the consumer, over the borders of batches. Any other exception of the
        reader is a fault of the program, not of a video, and is raised.
        """
        for request, result in self._pool.map(requests):
            yield _answer(request.path, result)

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._pool.close()

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def probe_all(
    paths: Iterable[tuple[str, float | None]],
    *,
    backend: str = DECODER,
    timeout: float | None = 60.0,
    workers: int = 2,
) -> Generator[VideoInfo | VideoError, None, None]:
    """`probe` of each (path, folder_fps) in worker processes: a decoder that crashes costs that
    file only. In order; `backend`, `timeout` and `workers` as for ClipReader."""
    pool = WorkerPool(partial(_probe, backend), workers=workers, timeout=timeout)
    try:
        for (path, _), result in pool.map(paths):
            yield _answer(path, result)
    finally:
        pool.close()


def _probe(backend: str, medium: tuple[str, float | None]) -> VideoInfo:
    path, folder_fps = medium
    return _with_other_decoder(partial(probe, path, folder_fps=folder_fps), backend)


def _answer(path: str, result: T | BaseException) -> T | VideoError:
    """A worker's result for a file; raises errors of the program, as opposed to the file's."""
    if isinstance(result, WorkerTimeout | WorkerDied):
        return VideoError(path, str(result))
    if isinstance(result, BaseException) and not isinstance(result, VideoError):
        raise result
    return result


def _read_request(
    reader: Callable[..., Clip], backend: str, fit: Fit | None, request: ClipRequest
) -> Clip:
    if request.is_image:
        return read_image(request.path, fit)
    read = partial(
        reader,
        request.path,
        request.config,
        start=request.start,
        end=request.end,
        times=request.times,
        folder_fps=request.folder_fps,
        fit=fit,
    )
    return _with_other_decoder(read, backend)


def _read_cached(
    cache: ClipCache,
    read: Callable[[ClipRequest], Clip],
    backend: str,
    fit: Fit | None,
    request: ClipRequest,
) -> Clip:
    key = cache.key(request, backend, fit)
    if key is None:
        return read(request)
    clip = cache.get(key, request.path)
    if clip is None:
        clip = read(request)
        # A file that was replaced while it was read would be kept under the former content.
        if cache.key(request, backend, fit) == key:
            cache.put(key, clip)
    return clip


def _with_other_decoder(read: Callable[..., T], backend: str) -> T:
    """`read(backend=backend)`; by PyAV, which the log says, where decord lacks the codec."""
    try:
        return read(backend=backend)
    except NeedsPyav as error:
        _LOG.warning("%s; read by PyAV", error)
        return read(backend="pyav")


@dataclass(frozen=True)
class _Part:
    """Frames first .. stop - 1, shown from second `begin` of the file for `length` seconds."""

    first: int
    stop: int
    begin: float
    length: float


def _part(path: str, source: Source, start: float | None, end: float | None) -> _Part:
    stamps, length = source.timestamps, source.end
    begin = 0.0 if start is None else float(start)
    finish = length if end is None else min(float(end), length)
    if not (math.isfinite(begin) and begin >= 0):
        raise VideoError(path, f"start {start} is not a time in seconds")
    if begin >= length:
        raise VideoError(path, f"start {begin:g} s is beyond its end at {length:.3f} s")
    if not begin < finish:
        raise VideoError(path, f"start {begin:g} s is not before end {end} s")
    first = int(np.searchsorted(stamps, begin - TIME_TOLERANCE, side="left"))
    stop = int(np.searchsorted(stamps, finish + TIME_TOLERANCE, side="right"))
    if stop <= first:
        raise VideoError(path, f"no frame lies between {begin:g} s and {finish:g} s")
    return _Part(first, stop, begin, finish - begin)


def _sample(
    path: str, source: Source, part: _Part, config: FrameConfig
) -> tuple[np.ndarray, float, np.ndarray]:
    """(frame numbers, their rate, seconds of the part at which they are on screen).

    Even steps in number, or in time where frames come unevenly.
    """
    total = part.stop - part.first
    stamps = source.timestamps[part.first : part.stop]
    rate = source.fps
    if not is_even(stamps, rate) and stamps[-1] > stamps[0]:
        rate = (total - 1) / float(stamps[-1] - stamps[0])  # this part may have another rate
    even = is_even(stamps, rate, part.begin)
    try:
        count = config.count(total, rate if even else total / part.length)
    except ValueError as error:
        raise VideoError(path, str(error)) from error
    if even or (config.num_frames is None and _takes_every_frame(stamps, config.fps, count)):
        indices = part.first + config.indices(total, count)
        return indices, count / total * rate, source.timestamps[indices] - part.begin
    if config.rule == "linspace":
        fps = (count - 1) / max(float(stamps[-1]) - part.begin, TIME_TOLERANCE)
    else:
        fps = count / part.length
    moments = np.arange(count) / fps
    # A player shows the last frame that has come, which may have come before the part began. Before
    # the first frame of the file it shows nothing; the first frame stands for that, at its stamp.
    ticks = part.begin + moments + TIME_TOLERANCE
    indices = np.maximum(np.searchsorted(source.timestamps, ticks, side="right") - 1, 0)
    return indices, fps, np.maximum(moments, source.timestamps[indices] - part.begin)


def _takes_every_frame(stamps: np.ndarray, fps: float, count: int) -> bool:
    steps = np.diff(stamps)
    return count == len(stamps) and bool(fps * steps[steps > 0].min(initial=np.inf) >= 1)


def _check_times(path: str, wanted: np.ndarray, duration: float) -> None:
    if wanted.ndim != 1 or len(wanted) == 0 or not np.isfinite(wanted).all():
        raise VideoError(path, f"expected sample times in seconds, got {wanted.tolist()}")
    if wanted.min() < -TIME_TOLERANCE or wanted.max() > duration + TIME_TOLERANCE:
        reason = f"sample times from {wanted.min():g} to {wanted.max():g} s"
        raise VideoError(path, f"{reason} leave the part of {duration:.3f} s")


def _nearest(stamps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The frame nearest to each wanted time; the earlier one where two are equally near."""
    right = np.searchsorted(stamps, wanted).clip(1, max(len(stamps) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(stamps) - 1)
    return np.where(wanted - stamps[left] <= stamps[right] - wanted, left, right)


def _rate(wanted: np.ndarray, duration: float) -> float:
    span = float(wanted.max() - wanted.min())
    return (len(wanted) - 1) / span if span > 0 else len(wanted) / duration
