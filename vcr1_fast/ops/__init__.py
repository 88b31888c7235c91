"""Fused operators: they need torch alone, and work in any trainer."""

from vcr1_fast.ops.backend import use
from vcr1_fast.ops.gather_logprobs import LogProbs, gather_logprobs
from vcr1_fast.ops.group_advantages import group_advantages
from vcr1_fast.ops.group_attention import group_attention
from vcr1_fast.ops.grpo.config import GRPOLossConfig
from vcr1_fast.ops.grpo.linear_loss import linear_grpo_loss
from vcr1_fast.ops.grpo.logits_loss import logits_grpo_loss
from vcr1_fast.ops.grpo.loss import grpo_loss
from vcr1_fast.ops.grpo.token_loss import TokenLosses, grpo_token_loss
from vcr1_fast.ops.iou import box_iou, interval_set_iou, temporal_iou, track_iou
from vcr1_fast.ops.linear_logprobs import linear_logprobs
from vcr1_fast.ops.resize_frames import resize_frames
from vcr1_fast.ops.video_patches import video_patches

grpo_loss_from_logits = logits_grpo_loss
"""Former name of `logits_grpo_loss`, kept for existing callers."""

__all__ = [
    "GRPOLossConfig",
    "LogProbs",
    "TokenLosses",
    "box_iou",
    "gather_logprobs",
    "group_advantages",
    "group_attention",
    "grpo_loss",
    "grpo_loss_from_logits",
    "grpo_token_loss",
    "interval_set_iou",
    "linear_grpo_loss",
    "linear_logprobs",
    "logits_grpo_loss",
    "resize_frames",
    "temporal_iou",
    "track_iou",
    "use",
    "video_patches",
]
