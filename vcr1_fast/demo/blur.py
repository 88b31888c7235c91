"""Imprecise labels: right about the events of a clip, noisy about their time, place and letter.

The demo fine-tunes on these alone, so any precision after GRPO comes from the rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vcr1_fast.data.records import Record
from vcr1_fast.data.scenes import DIRECTIONS


@dataclass(frozen=True)
class BlurConfig:
    """Noise of the labels, in seconds, fractions of the frame and probabilities."""

    seconds: float = 3.0
    """A span is widened by up to this much at either end."""
    step: float = 0.5
    """Times are rounded to multiples of this."""
    offset: float = 0.1
    """Every coordinate of a box that is not given moves by up to this much."""
    grid: float = 0.05
    """Coordinates are rounded to multiples of this."""
    wrong_letter: float = 0.4
    """Probability that a letter, a label or a caption's direction is sampled at random."""
    missed_event: float = 0.4
    """Probability that a caption leaves out an event."""


def blur_records(records: Iterable[Record], seed: int, config: BlurConfig) -> list[Record]:
    """The records with imprecise answers; the noise of a record depends on `seed` and its index."""
    return [
        dataclasses.replace(
            record, answer=_blurred(record, np.random.default_rng((seed, i)), config)
        )
        for i, record in enumerate(records)
    ]


def _blurred(record: Record, rng: np.random.Generator, config: BlurConfig) -> object:
    if record.task == "temporal_grounding":
        return _span(record.answer, record, rng, config)
    if record.task == "tracking":
        first, *rest = record.answer
        return [_box(first, 0.0, rng, config), *(_box(b, config.offset, rng, config) for b in rest)]
    if record.task == "multiple_choice":
        return _letter(record.answer, record, rng, config)
    if record.task == "grounded_qa":
        spans = [_span(span, record, rng, config) for span in record.answer["glue"]]
        return {"answer": _letter(record.answer["answer"], record, rng, config), "glue": spans}
    if record.task == "classification":
        return _sampled(record.answer, record.options, rng, config)
    if record.task == "caption":
        moves, *comings = record.answer
        color, way = moves.removesuffix("wards.").split()
        moves = f"{color} {_sampled(way, list(DIRECTIONS), rng, config)}wards."
        return [moves, *(event for event in comings if rng.random() >= config.missed_event)]
    raise ValueError(f"no imprecise label for answers of task {record.task!r}")


def _span(
    span: Sequence[float], record: Record, rng: np.random.Generator, config: BlurConfig
) -> list[float]:
    early, late = rng.uniform(0.0, config.seconds, 2)
    ends = (max(0.0, span[0] - early), min(record.metadata["duration"], span[1] + late))
    return [round(t / config.step) * config.step for t in ends]


def _box(
    box: Sequence[float], offset: float, rng: np.random.Generator, config: BlurConfig
) -> list[float]:
    moved = np.asarray(box) + rng.uniform(-offset, offset, 4)
    x0, y0, x1, y1 = np.clip(np.round(moved / config.grid) * config.grid, 0.0, 1.0)
    # A box keeps an extent, inside the frame.
    x0, y0 = min(x0, 1.0 - config.grid), min(y0, 1.0 - config.grid)
    x1, y1 = max(x1, x0 + config.grid), max(y1, y0 + config.grid)
    return [round(float(value), 3) for value in (x0, y0, x1, y1)]


def _letter(right: str, record: Record, rng: np.random.Generator, config: BlurConfig) -> str:
    return _sampled(right, "ABCD"[: len(record.options)], rng, config)


def _sampled(right: str, among: Sequence[str], rng: np.random.Generator, config: BlurConfig) -> str:
    if rng.random() >= config.wrong_letter:
        return right
    return among[int(rng.integers(len(among)))]
