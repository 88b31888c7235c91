"""Averages and metrics that the PPO-style losses of verl, OpenRLHF and EasyR1 share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops import GRPOLossConfig, grpo_loss

Fields = dict[str, Any]


def over_tokens(tokens: Tensor | float | None) -> Fields:
    """Config fields of a sum over tokens divided by `tokens`; None: by those of the call."""
    if tokens is None:
        return {"aggregation": "token_mean"}
    return {"aggregation": "num_items", "num_items": tokens}


def over_sequences(aggregation: str, sequences: Tensor | float | None) -> Fields:
    """Config fields of a mean over `sequences`; None: over those of the call with a token."""
    return {
        "aggregation": aggregation,
        "num_sequences": sequences,
        "exclude_empty": sequences is None,
    }


def dual_clip(constant: float | None, eps_high: float) -> float | None:
    """PPO's dual clip as our `delta`: both bound the loss of a token with A < 0 by -constant A.

    ValueError if the constant cuts into the clip range, where the two differ.
    """
    if constant is not None and constant < 1 + eps_high:
        raise ValueError(f"dual clip {constant} must be at least 1 + the upper clip {eps_high}")
    return constant


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    config: GRPOLossConfig,
    *,
    kl_reference_logps: Tensor | None = None,
    **tokens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` without KL term; its metrics hold "ppo_kl", the mean of
    kl_reference_logps - logps.

    kl_reference_logps: None means `old_logps`. The config's kl_input_clamp bounds the difference.
    The same kernel computes it, as the k1 estimator with the opposite sign.
    """
    loss, metrics = grpo_loss(
        logps,
        old_logps,
        advantages,
        mask,
        ref_logps=old_logps if kl_reference_logps is None else kl_reference_logps,
        config=replace(config, kl="k1"),
        **tokens,
    )
    return loss, {**metrics, "ppo_kl": -metrics["kl"]}


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` over tokens, for metrics; NaN outside the mask is ignored."""
    if mask is None:
        return values.mean()
    valid = mask != 0
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as Python floats, with one synchronisation of the device."""
    values = torch.stack([value.detach().to(torch.float64) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))
