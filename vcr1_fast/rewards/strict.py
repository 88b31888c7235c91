"""The default rewards: VideoChat-R1's, with the faults of the released ones mended.

Each reads one kind of answer. All return 0 to 1, raise on no completion whatever it holds, take
time linear in it, and count the last answer after the reasoning. Spans are clipped to the clip
(`duration`, in seconds) together with their target, unions are true unions, impossible boxes and
inverted spans score 0, and a box that the prompt gave earns nothing.

`think`: whether reasoning must be there (True), must not (False), or may (None).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vcr1_fast.rewards.answer import (
    Box,
    Span,
    parse_boxes,
    parse_label,
    parse_letter,
    parse_span,
    parse_spans,
)
from vcr1_fast.rewards.format import last_block, well_formed
from vcr1_fast.rewards.overlap import interval_set_iou, temporal_iou, track_iou


@dataclass(frozen=True)
class GroundedAnswer:
    """A letter, its evidence in seconds, or one of the two where the other cannot be read."""

    letter: str | None
    spans: tuple[Span, ...] | None


def read_span(completion: str) -> Span | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_span(answer)


def read_boxes(completion: str, count: int) -> tuple[Box, ...] | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_boxes(answer, count)


def read_letter(completion: str, options: Sequence[str] = ()) -> str | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_letter(answer, options)


def read_grounded(completion: str, options: Sequence[str] = ()) -> GroundedAnswer | None:
    glue = last_block(completion, "glue")
    letter, spans = read_letter(completion, options), None if glue is None else parse_spans(glue)
    return None if letter is None and spans is None else GroundedAnswer(letter, spans)


def read_label(completion: str) -> str | None:
    answer = last_block(completion, "answer")
    return None if answer is None else parse_label(answer)


def _format(completion: str, readable: bool, think: bool | None, *tags: str) -> float:
    """1 for exactly the tags asked for, in order, around a readable answer; else 0."""
    if not readable:
        return 0.0
    return float(
        (think is not True and well_formed(completion, tags))
        or (think is not False and well_formed(completion, ("think", *tags)))
    )


def span_format(completion: str, think: bool | None = None) -> float:
    return _format(completion, read_span(completion) is not None, think, "answer")


def boxes_format(completion: str, count: int, think: bool | None = None) -> float:
    return _format(completion, read_boxes(completion, count) is not None, think, "answer")


def letter_format(completion: str, options: Sequence[str] = (), think: bool | None = None) -> float:
    return _format(completion, read_letter(completion, options) is not None, think, "answer")


def grounded_format(
    completion: str, options: Sequence[str] = (), think: bool | None = None
) -> float:
    answer = read_grounded(completion, options)
    readable = bool(answer and answer.letter and answer.spans)
    return _format(completion, readable, think, "answer", "glue")


def label_format(completion: str, think: bool | None = None) -> float:
    return _format(completion, read_label(completion) is not None, think, "answer")


def span_iou(completion: str, target: Span, duration: float | None = None) -> float:
    """IoU of the span given and `target`, both in seconds."""
    span = read_span(completion)
    return 0.0 if span is None else temporal_iou(span, target, duration)


def evidence_iou(completion: str, target: Sequence[Span], duration: float | None = None) -> float:
    """IoU of the unions of the evidence given and annotated; 0 where either has no extent."""
    grounded = read_grounded(completion)
    if grounded is None or grounded.spans is None:
        return 0.0
    return interval_set_iou(grounded.spans, target, duration)


def boxes_iou(completion: str, target: Sequence[Box]) -> float:
    """Mean IoU over the boxes after the first, which the prompt gave."""
    boxes = read_boxes(completion, len(target))
    return 0.0 if boxes is None else track_iou(boxes[1:], target[1:])


def letter_accuracy(completion: str, target: str, options: Sequence[str] = ()) -> float:
    """1 for the right letter, `target` being "B" or "(B)"."""
    truth = parse_letter(target, options)
    return float(truth is not None and read_letter(completion, options) == truth)


def label_accuracy(completion: str, target: str) -> float:
    """1 for the label, whatever its case, markup, quotes and final full stop."""
    label = read_label(completion)
    return float(label is not None and label == parse_label(target))
