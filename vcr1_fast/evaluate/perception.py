"""Iterative perception: where the model saw its evidence, frames are taken more densely next time.

As VideoChat-R1.5 does (arXiv 2509.21100), in the same number of frames. With K the evidence (a set
of spans of a clip of D seconds) and r the density, let C(t) be t with the seconds inside K counted
r times. The clip is played along

    real(s) = C^-1(s C(D) / D),        0 <= s <= D,

which maps 0 to 0 and D to D, is linear between the borders of K, and passes the evidence r times as
slowly as the rest. Frames that the plain rule takes at times s are taken at real(s) instead, so
there are exactly as many, and r times as many a second inside K as outside.

The model gets the plain times: it knows time by position alone, and positions are even. Seconds in
its answers are therefore of the slowed clip, and real() converts them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vcr1_fast.rewards.answer import parse_spans
from vcr1_fast.tasks import TASKS

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record

Span = tuple[float, float]

LETTERED = ("grounded_qa", "multiple_choice")
"""Tasks that are asked again: evidence is asked for in the words of the first."""

_GLUE = re.compile(r"(<glue>)((?:(?!<glue>).)*?)(</glue>)", re.DOTALL)


@dataclass(frozen=True)
class Zoom:
    """How a clip is played: knots of the piecewise linear map from shown to real seconds."""

    shown: tuple[float, ...]
    real: tuple[float, ...]

    def real_times(self, shown: Sequence[float]) -> list[float]:
        """Seconds of the clip at these seconds of the shown frames; clipped to the clip."""
        return np.interp(shown, self.shown, self.real).tolist()

    def real_spans(self, spans: Iterable[Span]) -> list[Span]:
        return [(start, end) for start, end in map(self.real_times, spans)]


def zoom(spans: Sequence[Span], duration: float, density: float) -> Zoom:
    """The map above. `spans`: disjoint, ascending, within [0, duration] (see `key_spans`)."""
    borders = sorted({0.0, duration, *(border for span in spans for border in span)})
    counted = [0.0]
    for start, end in pairwise(borders):
        inside = any(first <= start and end <= last for first, last in spans)
        counted.append(counted[-1] + (end - start) * (density if inside else 1.0))
    scale = duration / counted[-1]
    return Zoom(tuple(c * scale for c in counted), tuple(borders))


def key_spans(spans: Sequence[Span] | None, duration: float, limit: int) -> tuple[Span, ...]:
    """Evidence that can be shown: spans clipped to [0, duration], those without extent (inverted,
    outside, not finite) dropped, of the others the first `limit` as the model names them, sorted,
    overlapping and touching ones made one."""
    kept = []
    for start, end in spans or ():
        if math.isfinite(start) and math.isfinite(end):
            start, end = max(float(start), 0.0), min(float(end), duration)
            if start < end:
                kept.append((start, end))
    merged: list[Span] = []
    for start, end in sorted(kept[:limit]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def same_spans(a: Sequence[Span], b: Sequence[Span], tolerance: float) -> bool:
    """Whether two sets of spans have the same borders to `tolerance` seconds."""
    return len(a) == len(b) and all(
        abs(x - y) <= tolerance
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def evidence_prompt(record: Record, think: bool) -> str:
    """The question, asked with its evidence."""
    return TASKS["grounded_qa"].prompt(record, think)


def read_evidence(completion: str, record: Record) -> Sequence[Span] | None:
    """Spans that a completion gives, in seconds of the shown frames; None if it gives none."""
    answer = TASKS["grounded_qa"].parse(completion, record)
    return None if answer is None else answer.spans


def in_real_time(completion: str, played: Zoom) -> str:
    """The completion with the spans of its `<glue>` blocks in seconds of the clip; blocks without
    readable spans, and the rest of the text, stay."""

    def rewrite(match: re.Match[str]) -> str:
        spans = parse_spans(match[2])
        if not spans:
            return match[0]
        real = played.real_spans(spans)
        listed = ", ".join(f"({start:.2f}, {end:.2f})" for start, end in real)
        return f"{match[1]}[{listed}]{match[3]}"

    return _GLUE.sub(rewrite, completion)
