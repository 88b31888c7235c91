"""Reading clips: which frames, decoded to uint8, one at a time or by worker processes.

An image is read like a clip: it is one of a single frame, without a rate or a length.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np

from vcr1_fast.data.decode import (
    BACKENDS,
    Source,
    VideoError,
    count_frames,
    open_picture,
    open_source,
)
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.workers import WorkerDied, WorkerPool, WorkerTimeout

__all__ = [
    "BACKENDS",
    "Clip",
    "ClipReader",
    "ClipRequest",
    "VideoError",
    "VideoInfo",
    "count_frames",
    "probe",
    "read_clip",
    "read_image",
]

# Time stamps of some containers are rounded to milliseconds, and decord's are float32.
TIME_TOLERANCE = 1e-3

Fit = Callable[[np.ndarray, int | None], np.ndarray]
Times = Sequence[float] | Callable[[float], Sequence[float]]


@dataclass(frozen=True)
class Clip:
    """Decoded frames of (a part of) a video, or an image.

    `frames` (T, H, W, 3) uint8 RGB; `times` (T,) float64, seconds from the beginning of the part,
    from the file's time stamps; `fps` the rate of the sampled frames; `duration` the length of the
    part in seconds; both None for an image; `start` where the part begins in the file; `fitted`
    whether the frames have the size already at which the model sees them.
    """

    frames: np.ndarray
    times: np.ndarray
    fps: float | None
    duration: float | None
    path: str
    start: float = 0.0
    fitted: bool = False


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: number of frames, average rate, and length in seconds."""

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


def probe(path: str, *, backend: str = "decord", folder_fps: float | None = None) -> VideoInfo:
    """Frames, rate and length of a video without decoding it; `folder_fps` as in `read_clip`.
    VideoError names the file."""
    with open_source(path, backend, folder_fps) as source:
        return VideoInfo(len(source.timestamps), source.fps, _length(source))


def read_clip(
    path: str,
    config: FrameConfig | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    times: Times | None = None,
    backend: str = "decord",
    folder_fps: float | None = None,
    fit: Fit | None = None,
) -> Clip:
    """Sample and decode a clip.

    `start` and `end` (seconds in the file) choose the part to watch; an `end` behind the last frame
    means the last frame. Of that part `config` takes frames at even distances, or `times` names
    them: seconds from the beginning of the part, or a function from the part's length to such
    seconds; the frame shown is the nearest one, so frames may repeat. `folder_fps` is the rate of a
    folder of images, which does not tell it. `fit(frame, count)` resizes each frame (H, W, 3) of
    the `count` as it is decoded, so that they are never all held in their full size. Raises
    VideoError, naming the file, for one that is missing, empty, cut off, damaged, shorter than
    asked for, or of a shape that `fit` refuses.
    """
    config = config or FrameConfig()
    with open_source(path, backend, folder_fps) as source:
        stamps = source.timestamps
        first, stop, begin, duration = _part(path, source, start, end)
        if times is None:
            try:
                count = config.count(stop - first, source.fps)
            except ValueError as error:
                raise VideoError(path, str(error)) from error
            indices = first + config.indices(stop - first, count)
            fps = count / (stop - first) * source.fps
        else:
            wanted = np.asarray(times(duration) if callable(times) else times, np.float64)
            indices = first + _nearest(path, stamps[first:stop] - begin, wanted, duration)
            fps = _rate(wanted, duration)
        distinct, expand = np.unique(indices, return_inverse=True)
        frames = source.read(distinct, _shrink(path, fit, len(indices)))
        if len(distinct) != len(indices):
            frames = frames[expand]
        times = stamps[indices] - begin
        return Clip(frames, times, fps, duration, path, begin, fitted=fit is not None)


def read_image(path: str, fit: Fit | None = None) -> Clip:
    """An image, upright, as a clip of one frame. VideoError names the file that is none."""
    picture = _shrink(path, fit, None)(open_picture(path))
    return Clip(picture[None], np.zeros(1), None, None, path, fitted=fit is not None)


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

    `timeout` seconds a clip (None: no limit), after which its worker is killed and replaced;
    `workers=0` reads in this process, where nothing can be killed. `prefetch` clips, read or being
    read, are held ahead of the consumer (default 2 a worker). `fit(frame, count)` resizes every
    frame where it is decoded (`count`: frames of the clip, None for an image). `reader` replaces
    `read_clip`; it must be importable by name, as `fit` must. Use it in a `with` statement, or call
    `close`.
    """

    def __init__(
        self,
        *,
        backend: str = "decord",
        timeout: float | None = 60.0,
        workers: int = 2,
        prefetch: int | None = None,
        fit: Fit | None = None,
        reader: Callable[..., Clip] = read_clip,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown video backend {backend!r}, expected one of {BACKENDS}")
        read = partial(_read_request, reader, backend, fit)
        self._pool = WorkerPool(read, workers=workers, timeout=timeout, prefetch=prefetch)

    def read(self, requests: Iterable[ClipRequest]) -> Iterator[Clip | VideoError]:
        """A Clip, or the VideoError that explains its absence, for each request, in order.

        Reading runs ahead of the consumer, over the borders of batches. Any other exception of the
        reader is a fault of the program, not of a video, and is raised.
        """
        for request, result in self._pool.map(requests):
            if isinstance(result, WorkerTimeout | WorkerDied):
                yield VideoError(request.path, str(result))
            elif isinstance(result, BaseException) and not isinstance(result, VideoError):
                raise result
            else:
                yield result

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


def _read_request(
    reader: Callable[..., Clip], backend: str, fit: Fit | None, request: ClipRequest
) -> Clip:
    if request.is_image:
        return read_image(request.path, fit)
    return reader(
        request.path,
        request.config,
        start=request.start,
        end=request.end,
        times=request.times,
        backend=backend,
        folder_fps=request.folder_fps,
        fit=fit,
    )


def _length(source: Source) -> float:
    # The container's average rate may be wrong; the last frame is shown in any case.
    return max(len(source.timestamps) / source.fps, float(source.timestamps[-1]))


def _part(
    path: str, source: Source, start: float | None, end: float | None
) -> tuple[int, int, float, float]:
    """(first frame, stop frame, start in seconds, length in seconds) of the part to watch."""
    stamps, length = source.timestamps, _length(source)
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
    return first, stop, begin, finish - begin


def _nearest(path: str, stamps: np.ndarray, wanted: np.ndarray, duration: float) -> np.ndarray:
    """The frame nearest to each wanted time; the earlier one where two are equally near."""
    if wanted.ndim != 1 or len(wanted) == 0 or not np.isfinite(wanted).all():
        raise VideoError(path, f"expected sample times in seconds, got {wanted.tolist()}")
    if wanted.min() < -TIME_TOLERANCE or wanted.max() > duration + TIME_TOLERANCE:
        reason = f"sample times from {wanted.min():g} to {wanted.max():g} s"
        raise VideoError(path, f"{reason} leave the part of {duration:.3f} s")
    right = np.searchsorted(stamps, wanted).clip(1, max(len(stamps) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(stamps) - 1)
    return np.where(wanted - stamps[left] <= stamps[right] - wanted, left, right)


def _rate(wanted: np.ndarray, duration: float) -> float:
    span = float(wanted.max() - wanted.min())
    return (len(wanted) - 1) / span if span > 0 else len(wanted) / duration
