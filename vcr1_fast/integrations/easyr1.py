"""EasyR1 on our ops: its log-probs and its policy loss. EasyR1 is installed under the name verl.

    from vcr1_fast.integrations.easyr1 import patch_easyr1
    patch_easyr1()

EasyR1 trains in Ray workers: start Ray with `patch_easyr1` as the hook of every worker, as
examples/easyr1_grpo.py does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.integrations.ppo import as_floats, dual_clip, policy_loss, token_mean
from vcr1_fast.integrations.rows import row_logprobs
from vcr1_fast.ops import GRPOLossConfig

LEVELS = {"gspo": "sequence", "gspo_token": "sequence_token"}


# A compiled graph would drop the in-place write. EasyR1 excludes its own kernel too.
_eager_row_logprobs = torch.compiler.disable(row_logprobs)


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs (...) of `labels` under softmax of `logits` (..., V), in float32. The backward pass
    writes over the logits, as the flash-attn kernel does that EasyR1 takes on GPUs, compiled or
    not."""
    return _eager_row_logprobs(logits, labels, inplace_backward=True)


def compute_policy_loss(
    old_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    tau_positive: float,
    tau_negative: float,
    loss_type: str,
    loss_avg_mode: str,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    """EasyR1's policy loss: (loss, {"ppo_kl", "entropy_loss"} and for the clipped types
    {"pg_clipfrac_higher", "pg_clipfrac_lower"}). Tensors (B, T).

    loss_type: default, gspo, gspo_token, cispo (bounded on both sides) or sapo. loss_avg_mode:
    "token" or "seq" (the mean over all B of means). ValueError for another one of either, and for a
    dual clip inside the clip range.
    """
    if loss_type not in ("default", "gspo", "gspo_token", "cispo", "sapo"):
        raise ValueError(f"unknown loss_type {loss_type!r}")
    if loss_avg_mode not in ("token", "seq"):
        raise ValueError(f"loss_avg_mode must be 'token' or 'seq', got {loss_avg_mode!r}")
    clipped = loss_type not in ("cispo", "sapo")
    config = GRPOLossConfig(
        loss_type="grpo" if clipped else loss_type,
        level=LEVELS.get(loss_type, "token"),
        eps_low=clip_ratio_low,
        eps_high=clip_ratio_high,
        delta=dual_clip(clip_ratio_dual, clip_ratio_high) if clipped else None,
        cispo_bounds="relative",
        sapo_tau_pos=tau_positive,
        sapo_tau_neg=tau_negative,
        log_ratio_clamp=None if loss_type in LEVELS else 20.0,
        kl_input_clamp=None,
        aggregation="token_mean" if loss_avg_mode == "token" else "sequence_mean",
    )
    loss, metrics = policy_loss(log_probs, old_log_probs, advantages, response_mask, config)
    report = {"ppo_kl": metrics["ppo_kl"]}
    if loss_avg_mode == "token":
        report["entropy_loss"] = token_mean(-log_probs.detach(), response_mask)
    else:
        rows = zip(-log_probs.detach(), response_mask, strict=True)
        report["entropy_loss"] = torch.stack([token_mean(*row) for row in rows]).mean()
    if clipped:
        report["pg_clipfrac_higher"] = metrics["clip_region"]
        report["pg_clipfrac_lower"] = metrics["clip_delta"]
    return loss, as_floats(report)


patch_easyr1 = Patch(
    "verl",
    ("0.3.3.dev0",),
    {
        "logprobs": [
            Swap(
                "verl.utils.torch_functional",
                "log_probs_from_logits",
                lambda _: log_probs_from_logits,
                ("logits", "labels"),
            ),
        ],
        "policy_loss": [
            Swap(
                "verl.trainer.core_algos",
                "compute_policy_loss",
                lambda _: compute_policy_loss,
                (
                    "old_log_probs",
                    "log_probs",
                    "advantages",
                    "response_mask",
                    "clip_ratio_low",
                    "clip_ratio_high",
                    "clip_ratio_dual",
                    "tau_positive",
                    "tau_negative",
                    "loss_type",
                    "loss_avg_mode",
                    "kwargs",
                ),
            ),
        ],
    },
)
"""Replaces EasyR1's functions at every by-value import."""
