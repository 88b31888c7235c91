"""The record: one question about one video or image, and the checks that tasks make of one.

All times, in answers too, are seconds counted from `start` (from the beginning of the file where
there is no `start`), since that is the part the model sees.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from vcr1_fast.rewards.answer import MAX_SPANS


@dataclass(frozen=True)
class Record:
    """One sample.

    `video` is a path, or `image` is and `video` is None; `prompt` holds the task's texts, e.g.
    {"event": "..."}; `options` are the texts of a choice without their letters; `start` and `end`
    (seconds) are the part of the file to watch; `boxes` are given boxes [x0, y0, x1, y1],
    normalised to 0..1. Of `metadata`, `duration` (seconds of the file) and `fps` (of a folder of
    images) are used. What `answer` holds is the task's affair: its `check` says it.
    """

    id: str
    task: str
    video: str | None
    prompt: dict[str, str]
    answer: Any
    image: str | None = None
    options: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> str:
        """Path of the video or image."""
        return self.video or self.image or ""


def duration_of(record: Record) -> float | None:
    """Seconds of the part to watch, from start/end or `metadata["duration"]`, the length of the
    file; None if unknown."""
    if record.end is not None:
        return record.end - (record.start or 0.0)
    duration = record.metadata.get("duration")
    return None if duration is None else float(duration) - (record.start or 0.0)


class FieldError(ValueError):
    """Error of a check: the field at fault (e.g. "answer.glue") and the fault."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.field, self.reason = name, reason

    def __str__(self) -> str:
        return f"field {self.field!r}: {self.reason}"


def check_prompt(record: Record, *names: str) -> None:
    """FieldError unless the prompt holds each of `names`, not empty."""
    for name in names:
        if not record.prompt.get(name, "").strip():
            raise FieldError(f"prompt.{name}", f"missing; task {record.task} needs it")


def check_video(record: Record) -> None:
    """FieldError unless the record shows a video."""
    if record.video is None:
        raise FieldError("image", f"task {record.task} asks for times: it needs a video")


def check_span(name: str, value: Any, *, empty: bool = False) -> None:
    """FieldError unless `value` is [start, end], seconds, 0 <= start < end (or = with `empty`)."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_number, value)):
        raise FieldError(name, f"expected [start, end] in seconds, got {describe(value)}")
    start, end = value
    if start < 0:
        raise FieldError(name, f"start {start:g} is negative")
    if start > end or (start == end and not empty):
        raise FieldError(name, f"start {start:g} is not before end {end:g}")


def check_spans(name: str, value: Any, *, empty: bool = False) -> None:
    """FieldError unless `value` is a list of at least one span."""
    if not isinstance(value, list | tuple) or not value:
        raise FieldError(name, f"expected a list of spans, got {describe(value)}")
    if len(value) > MAX_SPANS:  # a completion with more is unreadable
        raise FieldError(name, f"expected at most {MAX_SPANS} spans, got {len(value)}")
    for index, span in enumerate(value):
        check_span(f"{name}[{index}]", span, empty=empty)


def check_keys(name: str, value: Any, keys: Mapping[str, str]) -> None:
    """FieldError unless `value` is an object of just these keys; key -> what it holds, in words."""
    if not isinstance(value, dict) or set(value) != set(keys):
        expected = ", ".join(f'"{key}": {what}' for key, what in keys.items())
        raise FieldError(name, f"expected {{{expected}}}, got {describe(value)}")


def check_letter(name: str, value: Any, options: tuple[str, ...]) -> None:
    """FieldError unless `value` is the capital letter of one of at least two `options`."""
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise FieldError("options", f"expected 2 to 26 options, got {len(options)}")
    letters = ascii_uppercase[: len(options)]
    if not isinstance(value, str) or len(value) != 1 or value not in letters:
        raise FieldError(name, f"expected a letter A to {letters[-1]}, got {describe(value)}")


def check_boxes(name: str, value: Any) -> None:
    """FieldError unless `value` is a list of boxes [x0, y0, x1, y1] within 0..1, with extent."""
    if not isinstance(value, list | tuple):
        raise FieldError(name, f"expected a list of boxes, got {describe(value)}")
    for index, box in enumerate(value):
        check_box(f"{name}[{index}]", box)


def check_box(name: str, box: Any) -> None:
    """FieldError unless `box` is [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1, and y alike."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise FieldError(name, f"expected [x0, y0, x1, y1], got {describe(box)}")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise FieldError(name, f"expected 0 <= x0 < x1 <= 1, and y alike, got {describe(box)}")


def is_number(value: Any) -> bool:
    """A finite number of a size that seconds, pixels and counts have; not a truth value."""
    # The comparison also refuses NaN, infinities and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12


def is_text(value: Any) -> bool:
    """A text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def describe(value: Any) -> str:
    """Type and beginning of a value, on one line, for messages."""
    text = re.sub(r"\s+", " ", repr(value))
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
