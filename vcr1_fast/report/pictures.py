"""A record as the viewer draws it: thumbnails of its frames, and the spans and boxes that an answer
or a prediction holds.

The shape of an answer decides which of its numbers are seconds: [s, e], a list of such, or an
object's `spans`, `glue` or `time` are spans; four numbers, a list of such, or an object's `boxes`
(of frames, or by seconds), `box` or `glue` are boxes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from vcr1_fast.data.requests import clip_key, clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import ClipReader, VideoError
from vcr1_fast.tasks.record import duration_of

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record

FRAMES = FrameConfig(fps=1000.0, min_frames=2, max_frames=8)  # eight, or all of a shorter clip
HEIGHT = 110
"""Pixels of a thumbnail; its width follows, up to three times as much."""
MAX_BYTES = 16 << 20
"""Bytes of all thumbnails of a page; later records have none."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5ac2", "#888888")


@dataclass(frozen=True)
class Picture:
    """Thumbnails of a clip as data URIs, their seconds, width by height of one; `duration`: seconds
    of the clip, None for an image. `fault`: why there are none."""

    frames: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    ratio: float = 1.0
    duration: float | None = None
    fault: str = ""

    def as_json(self) -> dict[str, Any]:
        """What the page needs to draw it."""
        return {"frames": self.frames, "times": self.times, "ratio": self.ratio}


def pictures_of(
    records: Iterable[Record], reader: ClipReader | None = None, *, max_bytes: int = MAX_BYTES
) -> dict[Hashable, Picture]:
    """Pictures of the records' clips by `clip_key`, each clip once, until they take `max_bytes`.

    reader: reads the clips; None reads them in this process.
    """
    distinct = {clip_key(record): record for record in records}
    reader = reader or ClipReader(workers=0)
    found: dict[Hashable, Picture] = {}
    left = max_bytes
    clips = reader.read(clip_request(record, FRAMES) for record in distinct.values())
    for (key, record), clip in zip(distinct.items(), clips, strict=True):
        if isinstance(clip, VideoError):
            found[key] = Picture(duration=duration_of(record), fault=f"no frames: {clip}")
            continue
        frames = tuple(thumbnail(frame) for frame in clip.frames)
        left -= sum(map(len, frames))
        height, width = clip.frames.shape[1:3]
        times = tuple(round(time, 3) for time in clip.times.tolist())
        found[key] = Picture(frames, times, round(width / height, 4), clip.duration)
        if left <= 0:
            break
    return found


def thumbnail(frame: Any) -> str:
    """A frame (H, W, 3) uint8 as the data URI of a small JPEG."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((3 * HEIGHT, HEIGHT))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def spans_of(answer: Any) -> list[list[float]]:
    """Spans in seconds that an answer or a parsed prediction holds; [] where it holds none."""
    if isinstance(answer, Mapping):
        return spans_of(answer.get("spans") or answer.get("glue") or answer.get("time") or [])
    if _numbers(answer, 2):
        return [list(answer)]
    return [list(span) for span in answer] if _rows(answer, 2) else []


def boxes_at(answer: Any, times: Sequence[float]) -> list[list[float] | None]:
    """The box [x0, y0, x1, y1] in 0..1 that an answer or a parsed prediction holds for the frame at
    each of `times`, None where it holds none: one for all, one for each, or those by seconds,
    which are shown within half a second."""
    none: list[list[float] | None] = [None] * len(times)
    if isinstance(answer, Mapping):
        named = (answer.get(name) for name in ("boxes", "box", "glue"))
        inner = next((value for value in named if value), None)
        return _by_seconds(inner, times) if isinstance(inner, Mapping) else boxes_at(inner, times)
    if _numbers(answer, 4):
        return [list(answer)] * len(times)
    if _rows(answer, 4):
        return [*map(list, answer), *none][: len(times)]
    return none


def _by_seconds(boxes: Mapping[Any, Any], times: Sequence[float]) -> list[list[float] | None]:
    known = {float(second): box for second, box in boxes.items() if _numbers(box, 4)}
    nearest = (min(known, key=lambda second: abs(second - time), default=None) for time in times)
    return [
        None if second is None or abs(second - time) > 0.5 else list(known[second])
        for second, time in zip(nearest, times, strict=True)
    ]


def plain(value: Any) -> Any:
    """A prediction's dataclass as a mapping."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == count
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    )


def _rows(value: Any, count: int) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(_numbers(row, count) for row in value)
    )
