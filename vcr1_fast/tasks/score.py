"""Score a batch of completions by task, with the default or the released rewards.

Reached as `vcr1_fast.rewards.score`; it lives here because it needs the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vcr1_fast.rewards import legacy
from vcr1_fast.rewards.answer import parse_label, parse_letter
from vcr1_fast.rewards.caption import Judge, Match, caption_scores, mentions
from vcr1_fast.rewards.format import last_block
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.base import Columns
from vcr1_fast.tasks.record import Record

MODES = ("strict", "legacy")


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
    if task not in legacy.REWARDS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(legacy.REWARDS)}")
    clips = [None] * len(completions) if durations is None else durations
    if not len(completions) == len(targets) == len(clips):
        raise ValueError(
            f"got {len(completions)} completions, {len(targets)} targets, {len(clips)} durations"
        )
    answers = [_checked(task, target, index, mode) for index, target in enumerate(targets)]
    if mode == "legacy":
        return _released(task, completions, answers, judge)
    return _strict(task, completions, answers, clips, think, judge)


def _strict(
    name: str,
    completions: Sequence[str],
    answers: Sequence[Any],
    durations: Sequence[float | None],
    think: bool | None,
    judge: Judge | Match,
) -> Columns:
    """The rewards of the task itself, on records that hold nothing but the answer."""
    task = TASKS[name]
    if name == "caption":
        # As ever, a caption of punctuation alone is not well formed here; in training it is.
        task = replace(task, complete=lambda caption: parse_label(caption) is not None)
    records = [Record("", name, None, {}, answer) for answer in answers]
    parsed = task.answers(completions, records)
    judged = None
    if name == "caption":
        captions = [answer.prediction or "" for answer in parsed]
        judged = {"recall": _recalls(captions, answers, judge)}
    return task.score_batch(parsed, records, durations, think=think, judged=judged)


def _released(
    name: str, completions: Sequence[str], answers: Sequence[Any], judge: Judge | Match
) -> Columns:
    pairs = list(zip(completions, answers, strict=True))
    columns = {
        term: [reward(completion, answer) for completion, answer in pairs]
        for term, reward in legacy.REWARDS[name].items()
    }
    if name == "caption":
        captions = [last_block(completion, "answer") or "" for completion in completions]
        columns["recall"] = _recalls(captions, answers, judge)
    return columns


def _recalls(
    captions: Sequence[str], events: Sequence[Sequence[str]], judge: Judge | Match
) -> list[float]:
    return [one.recall for one in caption_scores(captions, events, judge)]


def _checked(task: str, target: Any, index: int, mode: str) -> Any:
    """The target in the form of a record's answer: letters without brackets, no {"answer": ...}
    around a letter, label or list of events."""
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
    letter = None
    if good and mode == "strict" and task in ("multiple_choice", "grounded_qa"):
        # A target that cannot be read would score every completion 0.
        letter = parse_letter(target if task == "multiple_choice" else target["answer"])
        good = letter is not None
    if not good:
        raise ValueError(f"targets[{index}] is no target of {task}: {repr(target)[:200]}")
    if letter is None:
        return target
    return letter if task == "multiple_choice" else {**target, "answer": letter}


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
