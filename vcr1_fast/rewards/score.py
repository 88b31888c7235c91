"""Scoring a batch of completions by task, in the default or in the released way."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcr1_fast.rewards import legacy, strict
from vcr1_fast.rewards.answer import parse_letter
from vcr1_fast.rewards.caption import Judge, Match, caption_scores, mentions
from vcr1_fast.rewards.format import last_block

MODES = ("strict", "legacy")


@dataclass(frozen=True)
class _Sample:
    completion: str
    target: Any
    duration: float | None
    think: bool | None


_Term = Callable[[_Sample], float]


_STRICT: dict[str, dict[str, _Term]] = {
    "temporal_grounding": {
        "format": lambda s: strict.span_format(s.completion, s.think),
        "iou": lambda s: strict.span_iou(s.completion, s.target, s.duration),
    },
    "tracking": {
        "format": lambda s: strict.boxes_format(s.completion, len(s.target), s.think),
        "iou": lambda s: strict.boxes_iou(s.completion, s.target),
    },
    "grounded_qa": {
        "format": lambda s: strict.grounded_format(s.completion, (), s.think),
        "iou": lambda s: strict.evidence_iou(s.completion, s.target["glue"], s.duration),
        "accuracy": lambda s: strict.letter_accuracy(s.completion, s.target["answer"]),
    },
    "multiple_choice": {
        "format": lambda s: strict.letter_format(s.completion, (), s.think),
        "accuracy": lambda s: strict.letter_accuracy(s.completion, s.target),
    },
    "classification": {
        "format": lambda s: strict.label_format(s.completion, s.think),
        "accuracy": lambda s: strict.label_accuracy(s.completion, s.target),
    },
    "caption": {"format": lambda s: strict.label_format(s.completion, s.think)},
}

# As released: multiple choice was scored by the grounded question's format, which demands evidence
# that its prompt never asks for, and captions by code that was not released.
_LEGACY: dict[str, dict[str, _Term]] = {
    task: {name: lambda s, fn=fn: fn(s.completion, s.target) for name, fn in terms.items()}
    for task, terms in {
        "temporal_grounding": {"format": legacy.think_answer_format, "iou": legacy.span_iou},
        "tracking": {"format": legacy.boxes_format, "iou": legacy.boxes_iou},
        "grounded_qa": {
            "format": legacy.glue_format,
            "iou": legacy.glue_iou,
            "accuracy": legacy.letter_accuracy,
        },
        "multiple_choice": {"format": legacy.glue_format, "accuracy": legacy.letter_accuracy},
        "classification": {
            "format": legacy.think_answer_format,
            "accuracy": legacy.label_accuracy,
        },
        "caption": {"format": legacy.think_answer_format},
    }.items()
}

TERMS: Mapping[str, tuple[str, ...]] = {
    task: (*terms, "recall") if task == "caption" else tuple(terms)
    for task, terms in _STRICT.items()
}
"""Names of the rewards of each task."""


def score(
    task: str,
    completions: Sequence[str],
    targets: Sequence[Any],
    *,
    mode: str = "strict",
    durations: Sequence[float | None] | None = None,
    think: bool | None = None,
    judge: Judge | Match = mentions,
) -> dict[str, list[float]]:
    """The rewards of a batch of completions: name -> one float a completion.

    task: temporal_grounding (format, iou), tracking (format, iou), grounded_qa (format, iou,
        accuracy), multiple_choice (format, accuracy), classification (format, accuracy), caption
        (format, recall).
    targets: [start, end] in seconds; a list of boxes [x0, y0, x1, y1]; {"answer": "B",
        "glue": [[start, end], ...]}; a letter, "B" or "(B)"; a label; a list of events. A letter,
        label or list of events may also stand as {"answer": ...}.
    mode: "strict", or "legacy" for the released functions with their faults.
    durations: of the clips in seconds, None where unknown; strict spans are clipped to them.
    think: whether the format demands reasoning (True), forbids it (False) or allows it (None);
        "legacy" always demands it.
    judge: of caption recall: a `Judge`, asked once for the whole batch, or a function
        (caption, event) -> bool.

    No completion makes it raise. ValueError for an unknown task or mode, lengths that differ, or a
    target of another shape, or in "strict" without one letter to read, with its index.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if task not in TERMS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TERMS)}")
    clips = [None] * len(completions) if durations is None else durations
    if not len(completions) == len(targets) == len(clips):
        raise ValueError(
            f"got {len(completions)} completions, {len(targets)} targets, {len(clips)} durations"
        )
    samples = [
        _Sample(completion, _checked(task, target, index, mode), duration, think)
        for index, (completion, target, duration) in enumerate(
            zip(completions, targets, clips, strict=True)
        )
    ]
    terms = (_STRICT if mode == "strict" else _LEGACY)[task]
    scores = {name: [float(term(sample)) for sample in samples] for name, term in terms.items()}
    if task == "caption":
        captions = [last_block(sample.completion, "answer") or "" for sample in samples]
        judged = caption_scores(captions, [sample.target for sample in samples], judge)
        scores["recall"] = [one.recall for one in judged]
    return scores


def _checked(task: str, target: Any, index: int, mode: str) -> Any:
    """The target in the one shape that the terms read."""
    if task == "grounded_qa":
        good = isinstance(target, Mapping) and _is_text(target.get("answer"))
        good = good and _is_table(target.get("glue"), 2)
    elif task == "tracking":
        good = _is_table(target, 4)
    elif task == "temporal_grounding":
        good = _is_table([target], 2)
    else:
        target = target["answer"] if isinstance(target, Mapping) and "answer" in target else target
        if task == "caption":
            good = isinstance(target, list | tuple) and all(map(_is_text, target))
        else:
            good = _is_text(target)
    if good and mode == "strict" and task in ("multiple_choice", "grounded_qa"):
        # A target that cannot be read would score every completion 0.
        good = parse_letter(target if task == "multiple_choice" else target["answer"]) is not None
    if not good:
        raise ValueError(f"targets[{index}] is no target of {task}: {repr(target)[:200]}")
    return target


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_table(rows: Any, length: int) -> bool:
    return isinstance(rows, list | tuple) and all(
        isinstance(row, list | tuple)
        and len(row) == length
        and all(isinstance(v, int | float) and _is_finite(v) for v in row)
        for row in rows
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
