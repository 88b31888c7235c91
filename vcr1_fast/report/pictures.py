"""Renders a record as HTML: thumbnails of its frames with boxes on them, and time bars below, the
annotated answer's beside predicted ones.

The shape of an answer decides which of its numbers are seconds: [s, e], a list of such, or an
object's `spans`, `glue` or `time` are spans; four numbers, a list of such, or an object's `boxes`
(of frames, or by seconds), `box` or `glue` are boxes.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader, VideoError
from vcr1_fast.tasks.record import duration_of

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record

FRAMES = FrameConfig(fps=1000.0, min_frames=2, max_frames=8)  # eight, or all of a shorter clip
HEIGHT = 110
"""Pixels of a thumbnail; its width follows, up to three times as much."""
MAX_BYTES = 16 << 20
"""Bytes of all thumbnails of a page; later records have none."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5ac2", "#888888")
TARGET = "#ffffff"

STYLE = """
.frames { display: flex; gap: 4px; overflow-x: auto; margin: .4rem 0; }
.frames figure { margin: 0; flex: none; font-size: 11px; text-align: center; }
.frames div { position: relative; line-height: 0; }
.frames svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.frames rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.frames .under { stroke: #000; stroke-width: 4px; }
.bar { display: grid; grid-template-columns: 7em 1fr; align-items: center; font-size: 12px; }
.bar div { position: relative; height: 9px; background: var(--line); margin: 2px 0; }
.bar i { position: absolute; top: 0; bottom: 0; min-width: 2px; }
.key { font-size: 12px; }
"""


class Pictures:
    """Frames of records, read in the order of the calls of `next`, up to `max_bytes`.

    reader: reads the clips; None reads them in this process.
    """

    def __init__(
        self,
        records: Sequence[Record],
        reader: ClipReader | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        reader = reader or ClipReader(workers=0)
        self._clips: Iterator[Clip | VideoError] = reader.read(
            clip_request(record, FRAMES) for record in records
        )
        self.left = max_bytes

    def next(
        self, record: Record, predictions: Mapping[str, Any], aims: Mapping[str, Any] | None = None
    ) -> str:
        """HTML of the next record: its frames, and the answer beside `predictions` (label ->
        the parsed prediction, or None); `aims` are other spans to show, by label."""
        if self.left <= 0:
            return ""
        clip = next(self._clips)
        shown = {label: _plain(value) for label, value in predictions.items()}
        if isinstance(clip, VideoError):
            duration = duration_of(record)
            parts = [f'<p class="key">no frames: {html.escape(str(clip))}</p>']
        else:
            duration = clip.duration
            images = [thumbnail(frame) for frame in clip.frames]
            self.left -= sum(map(len, images))
            parts = [_frames(clip, images, record.answer, shown), _key(clip, record.answer, shown)]
        if duration:
            parts.append(_bars(duration, record.answer, {**shown, **(aims or {})}))
        return "".join(parts)


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


def _frames(clip: Clip, images: Sequence[str], answer: Any, predictions: Mapping[str, Any]) -> str:
    figures, times = [], clip.times.tolist()
    layers = [(boxes_at(answer, times), TARGET)]
    for value, colour in zip(predictions.values(), cycle(COLOURS), strict=False):
        layers.append((boxes_at(value, times), colour))
    for index, image in enumerate(images):
        shapes = [_box(boxes[index], colour) for boxes, colour in layers]
        svg = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        time = "" if clip.duration is None else f"{times[index]:.1f} s"
        figures.append(f'<figure><div><img src="{image}" alt="">{svg}</div>{time}</figure>')
    return f'<div class="frames">{"".join(figures)}</div>'


def _box(box: Sequence[float] | None, colour: str) -> str:
    """The SVG of a box over a frame, clipped at its edges; empty without a box."""
    if box is None:
        return ""
    x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in box)
    width, height = max(x1 - x0, 0.0), max(y1 - y0, 0.0)
    place = f'x="{x0:.4f}" y="{y0:.4f}" width="{width:.4f}" height="{height:.4f}"'
    return f'<rect class="under" {place}/><rect {place} stroke="{colour}"/>'


def _key(clip: Clip, answer: Any, predictions: Mapping[str, Any]) -> str:
    """Which colour is whose box."""
    times = clip.times.tolist()
    if not any(boxes_at(answer, times)):
        return ""
    names = ["annotated: white"]
    for (label, value), colour in zip(predictions.items(), cycle(COLOURS), strict=False):
        none = "" if any(boxes_at(value, times)) else " (no boxes)"
        names.append(f'<span style="color:{colour}">{html.escape(label)}{none}</span>')
    return f'<p class="key">{", ".join(names)}</p>'


def _bars(duration: float, answer: Any, predictions: Mapping[str, Any]) -> str:
    """A line of time for the answer and each prediction, from the beginning of the part shown to
    its end; nothing for answers without spans."""
    if not spans_of(answer):
        return ""
    lines = [_bar("annotated", spans_of(answer), duration, "currentColor")]
    for (label, value), colour in zip(predictions.items(), cycle(COLOURS), strict=False):
        lines.append(_bar(label, spans_of(value), duration, colour))
    return "".join(lines)


def _bar(label: str, spans: Sequence[Sequence[float]], duration: float, colour: str) -> str:
    parts = []
    for start, end in spans:
        left, right = (100 * min(max(v / duration, 0.0), 1.0) for v in (start, end))
        width = max(right - left, 0.0)
        parts.append(
            f'<i style="left:{left:.2f}%;width:{width:.2f}%;background:{colour}" '
            f'title="{start:g} to {end:g} s"></i>'
        )
    return f'<div class="bar">{html.escape(label)}<div>{"".join(parts)}</div></div>'


def _plain(value: Any) -> Any:
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
