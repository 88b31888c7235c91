"""Rewards: what a completion says and how well it overlaps the target. No torch in here."""

from vcr1_fast.rewards.answer import parse_boxes, parse_letter, parse_span, parse_spans
from vcr1_fast.rewards.format import last_block, well_formed
from vcr1_fast.rewards.overlap import (
    box_iou,
    interval_set_iop,
    interval_set_iou,
    temporal_iou,
    track_iou,
)

__all__ = [
    "box_iou",
    "interval_set_iop",
    "interval_set_iou",
    "last_block",
    "parse_boxes",
    "parse_letter",
    "parse_span",
    "parse_spans",
    "temporal_iou",
    "track_iou",
    "well_formed",
]
