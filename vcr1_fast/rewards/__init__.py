"""Rewards: reading a completion, and how well its answer agrees with the target.

`score(task, completions, targets)` rewards a batch of completions by task. It needs the tasks,
which are above this package, so it lives in `vcr1_fast.tasks.score` and is looked up at first use.
"""

from importlib import import_module
from typing import Any

from vcr1_fast.rewards.answer import (
    parse_boxes,
    parse_label,
    parse_letter,
    parse_span,
    parse_spans,
)
from vcr1_fast.rewards.caption import (
    CaptionScore,
    Judge,
    MatchingJudge,
    caption_scores,
    event_recall,
    mentions,
)
from vcr1_fast.rewards.format import Scan, last_block, scan, well_formed
from vcr1_fast.rewards.overlap import (
    box_ious,
    span_ious,
    span_set_iops,
    span_set_ious,
    track_ious,
)

__all__ = [
    "CaptionScore",
    "Judge",
    "MatchingJudge",
    "Scan",
    "box_ious",
    "caption_scores",
    "event_recall",
    "last_block",
    "mentions",
    "parse_boxes",
    "parse_label",
    "parse_letter",
    "parse_span",
    "parse_spans",
    "scan",
    "span_ious",
    "span_set_iops",
    "span_set_ious",
    "track_ious",
    "well_formed",
]


def __getattr__(name: str) -> Any:
    # Importing the tasks above would make a circle: they import this package.
    if name == "score":
        return import_module("vcr1_fast.tasks.score").score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
