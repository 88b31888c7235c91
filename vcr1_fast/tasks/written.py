"""Boxes and spans in the form in which prompts show them and completions write them."""

from collections.abc import Sequence


def written_box(box: Sequence[float]) -> str:
    """`[0.10, 0.20, 0.30, 0.40]`."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def written_spans(spans: Sequence[Sequence[float]]) -> str:
    """`[(1.0, 4.5), (7.0, 9.5)]`, in seconds."""
    return f"[{', '.join(f'({start:.1f}, {end:.1f})' for start, end in spans)}]"
