"""How an annotated answer is written: the texts that prompts show and that SFT trains on.

A written answer must earn its own reward, so rounding has a bound: numbers keep the fewest decimals
with which the written spans or boxes overlap the annotated ones by `LEAST_OVERLAP`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

from vcr1_fast.rewards.overlap import box_ious, span_set_ious

LEAST_OVERLAP = 0.95
"""IoU of the written with the annotated span or box. Below it a right answer loses reward visibly;
above it the model learns digits that no viewer can see."""

_MOST_DECIMALS = 17  # as many as a float of 0 to 1 has


def number_text(value: float) -> str:
    """A number in digits that reads back as the same float: 1234567, 0.1, no exponent where 12
    decimals suffice."""
    if value == int(value):
        return str(int(value))
    plain = format(Decimal(repr(value)), "f")
    return plain if len(plain) <= 24 else repr(value)


def span_texts(spans: Sequence[Sequence[float]]) -> list[tuple[str, str]]:
    """(start, end) of each span as texts, with one number of decimals for all, at least 1."""
    return [
        (start, end)
        for start, end in _rounded(spans, 1, lambda got: span_set_ious([got], [spans])[0])
    ]


def spans_text(spans: Sequence[Sequence[float]]) -> str:
    """Spans as a completion writes them: `[(1.0, 4.5), (7.0, 9.5)]`."""
    return f"[{', '.join(f'({start}, {end})' for start, end in span_texts(spans))}]"


def box_text(box: Sequence[float]) -> str:
    """A box as a completion writes it, with at least 2 decimals: `[0.10, 0.20, 0.30, 0.40]`."""
    (sides,) = _rounded([box], 2, lambda got: box_ious(got[:1], [box])[0])
    return f"[{', '.join(sides)}]"


def _rounded(
    rows: Sequence[Sequence[float]],
    decimals: int,
    overlap: Callable[[Sequence[Sequence[float]]], float],
) -> list[list[str]]:
    # Rows without any extent overlap nothing, not even themselves: they keep the fewest decimals.
    most = _MOST_DECIMALS if overlap(rows) > 0 else decimals
    while True:
        texts = [[f"{value:.{decimals}f}" for value in row] for row in rows]
        if decimals >= most or overlap([list(map(float, row)) for row in texts]) >= LEAST_OVERLAP:
            return texts
        decimals += 1
