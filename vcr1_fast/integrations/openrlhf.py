"""OpenRLHF on our ops: its log-probs, its entropy, and its policy loss.

    from vcr1_fast.integrations.openrlhf import patch_openrlhf
    patch_openrlhf()

OpenRLHF trains in Ray workers: start Ray with `patch_openrlhf` as the hook of every worker, as
examples/openrlhf_grpo.py does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.integrations.ppo import (
    Fields,
    dual_clip,
    over_sequences,
    over_tokens,
    policy_loss,
    token_mean,
)
from vcr1_fast.integrations.rows import row_entropy, row_logprobs
from vcr1_fast.ops import GRPOLossConfig

# (level, mode) of OpenRLHF's correction, gated by the ratio itself -> ours.
ROLLOUT_CORRECTIONS = {
    ("token", "clip"): "token_truncate",
    ("token", "mask"): "token_mask",
    ("seq", "mask"): "sequence_icepop",
}


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs (...) of `labels` under softmax of `logits` (..., V), in the logits' dtype. Another
    temperature than 1 divides the logits in place, as OpenRLHF's callers expect."""
    if temperature != 1.0:
        logits.div_(temperature)
    return row_logprobs(logits, labels, out_dtype=logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy (...) in nats, in the logits' dtype; differentiable."""
    return row_entropy(logits)


def fused_policy_loss(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """OpenRLHF's `PolicyLoss` with its forward on `grpo_loss`.

    Gates by a divergence (binary_kl, tv) run OpenRLHF's own forward: there is no such correction
    here. ValueError for a dual clip inside the clip range.
    """

    class PolicyLoss(original):  # type: ignore[misc, valid-type]
        def forward(
            self,
            log_probs: Tensor,
            old_log_probs: Tensor,
            advantages: Tensor,
            action_mask: Tensor | None = None,
            rollout_log_probs: Tensor | None = None,
            dp_size: int = 1,
            batch_num_tokens: float | None = None,
            global_batch_size: float | None = None,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
            """(loss, share of clipped tokens, mean of old - new, mean of rollout - old, share
            filtered), the last two None without a rollout correction. Tensors (B, T)."""
            corrected = self.is_correction_level != "off"
            ppo = self.policy_loss_type == "ppo"
            if corrected and ppo and self.is_correction_gating != "ratio":
                return super().forward(
                    log_probs, old_log_probs, advantages, action_mask, rollout_log_probs,
                    dp_size, batch_num_tokens, global_batch_size,
                )  # fmt: skip
            if corrected and rollout_log_probs is None:
                raise ValueError("the rollout correction needs rollout_log_probs, got None")
            rollout = rollout_log_probs if corrected else None
            averaged = (
                over_tokens(batch_num_tokens)
                if self.token_level_loss
                else over_sequences("sequence_mean", global_batch_size)
            )
            shared = batch_num_tokens if self.token_level_loss else global_batch_size
            loss, metrics = policy_loss(
                log_probs,
                old_log_probs if ppo or rollout is None else rollout,
                advantages,
                action_mask,
                GRPOLossConfig(**averaged, **_options(self)),
                kl_reference_logps=old_log_probs,
                rollout_logps=rollout if ppo else None,
            )
            gap = filtered = None
            if rollout is not None and ppo:
                gap = token_mean(rollout - old_log_probs, action_mask)
                filtered = metrics["rollout_clipped"]
                if self.is_correction_level == "seq":
                    filtered = _filtered_sequences(self, old_log_probs - rollout, action_mask)
            loss = loss if shared is None else loss * dp_size
            return loss, metrics["clip_region"], metrics["ppo_kl"], gap, filtered

    PolicyLoss.__module__, PolicyLoss.__qualname__ = original.__module__, original.__qualname__
    return PolicyLoss


def _options(loss: Any) -> Fields:
    options = {
        "loss_type": "grpo",
        "eps_low": loss.clip_eps_low,
        "eps_high": loss.clip_eps_high,
        "delta": dual_clip(loss.dual_clip, loss.clip_eps_high),
        "kl_input_clamp": None,
    }
    if loss.policy_loss_type == "gspo":
        return {**options, "level": "sequence", "log_ratio_clamp": None}
    if loss.policy_loss_type != "ppo":
        raise ValueError(f"Invalid policy loss type: {loss.policy_loss_type}")
    if loss.is_correction_level == "off":
        return options
    kind = ROLLOUT_CORRECTIONS[loss.is_correction_level, loss.is_correction_mode]
    low, high = loss.is_correction_threshold
    return {**options, "rollout_correction": kind, "rollout_min": low, "rollout_max": high}


def _filtered_sequences(loss: Any, gap: Tensor, mask: Tensor | None) -> Tensor:
    """Share of sequences whose geometric mean ratio is outside the thresholds."""
    low, high = loss.is_correction_threshold
    valid = torch.ones_like(gap, dtype=torch.bool) if mask is None else mask != 0
    mean = torch.where(valid, gap, 0.0).sum(-1) / valid.sum(-1)
    return ((mean.exp() < low) | (mean.exp() > high) | mean.isnan()).float().mean()


_FUNCTIONS = "openrlhf.models.utils"
patch_openrlhf = Patch(
    "openrlhf",
    ("0.11.2",),
    {
        "logprobs": [
            Swap(
                _FUNCTIONS,
                "log_probs_from_logits",
                lambda _: log_probs_from_logits,
                ("logits", "labels", "temperature"),
            ),
            Swap(_FUNCTIONS, "compute_entropy", lambda _: compute_entropy, ("logits",)),
        ],
        "policy_loss": [
            Swap(
                "openrlhf.models.loss",
                "PolicyLoss",
                fused_policy_loss,
                (
                    "self",
                    "log_probs",
                    "old_log_probs",
                    "advantages",
                    "action_mask",
                    "rollout_log_probs",
                    "dp_size",
                    "batch_num_tokens",
                    "global_batch_size",
                ),
            ),
        ],
    },
)
"""Replaces OpenRLHF's functions and its loss class at every by-value import."""
