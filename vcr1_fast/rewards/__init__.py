"""Rewards: what a completion says and how well it overlaps the target. No torch in here."""

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
from vcr1_fast.rewards.format import last_block, well_formed
from vcr1_fast.rewards.overlap import (
    box_iou,
    interval_set_iop,
    interval_set_iou,
    temporal_iou,
    track_iou,
)
from vcr1_fast.rewards.score import TERMS, score

__all__ = [
    "TERMS",
    "CaptionScore",
    "Judge",
    "MatchingJudge",
    "box_iou",
    "caption_scores",
    "event_recall",
    "interval_set_iop",
    "interval_set_iou",
    "last_block",
    "mentions",
    "parse_boxes",
    "parse_label",
    "parse_letter",
    "parse_span",
    "parse_spans",
    "score",
    "temporal_iou",
    "track_iou",
    "well_formed",
]
