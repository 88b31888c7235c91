"""verl's policy losses on `grpo_loss`, with its arguments, averages and metric names.

`POLICY_LOSSES` maps the names under which `patch_verl` registers them to functions
(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) ->
(loss, metrics), all tensors (B, T). Options are read from verl's `ActorConfig` as verl does.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vcr1_fast.integrations.ppo import (
    Fields,
    as_floats,
    dual_clip,
    over_sequences,
    over_tokens,
    policy_loss,
    token_mean,
)
from vcr1_fast.ops import GRPOLossConfig

# verl clamps a sequence's log-ratio to this; above it there is no gradient.
GSPO_LOG_RATIO_CEILING = 10.0


def averaging(mode: str, length: int, info: dict[str, Any]) -> tuple[Fields, float]:
    """(config fields, factor of the loss) of verl's `agg_loss` with `mode`.

    length: T. info: `config.global_batch_info`, its counts of the global batch and `dp_size`, by
    which the loss is multiplied because gradients are averaged over so many processes. ValueError
    for an unknown mode, or a missing count with several processes.
    """
    processes = info.get("dp_size", 1)
    tokens, sequences = info.get("batch_num_tokens"), info.get("global_batch_size")
    if mode == "token-mean":
        if tokens is None and processes > 1:
            raise ValueError(f"batch_num_tokens is required when dp_size is {processes}")
        return over_tokens(tokens), processes
    if mode == "token-sum":
        return over_tokens(1), processes
    if sequences is None and processes > 1:
        raise ValueError(f"global_batch_size is required when dp_size is {processes}")
    if mode == "seq-mean-token-sum":
        return over_sequences("sequence_sum", sequences), processes
    if mode == "seq-mean-token-sum-norm":
        scale = info.get("loss_scale_factor")
        fields = over_sequences("max_length", sequences)
        return {**fields, "max_length": length if scale is None else scale}, processes
    if mode == "seq-mean-token-mean":
        return over_sequences("sequence_mean", sequences), processes
    raise ValueError(f"Invalid loss_agg_mode: {mode}")


def _clip_range(config: Any) -> Fields:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "eps_low": config.clip_ratio if low is None else low,
        "eps_high": config.clip_ratio if high is None else high,
    }


def _loss(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
    options: Fields,
) -> tuple[Tensor, dict[str, Tensor]]:
    old_log_prob, log_prob, advantages, response_mask = tensors
    fields, factor = averaging(loss_agg_mode, log_prob.shape[-1], config.global_batch_info)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        GRPOLossConfig(**fields, **options),
        token_weights=rollout_is_weights,
    )
    return loss * factor, metrics


def _report(metrics: dict[str, Tensor], clipped: Tensor | None, lower: str | None) -> Fields:
    zero = metrics["ppo_kl"] * 0
    return as_floats(
        {
            "actor/pg_clipfrac": zero if clipped is None else clipped,
            "actor/ppo_kl": metrics["ppo_kl"],
            "actor/pg_clipfrac_lower": zero if lower is None else metrics[lower],
        }
    )


def vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """PPO's clipped loss with dual clip `clip_ratio_c`. ValueError if that is below
    1 + clip_ratio_high."""
    clip = _clip_range(config)
    delta = dual_clip(config.get("clip_ratio_c", 3.0), clip["eps_high"])
    loss, metrics = _loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        {"loss_type": "grpo", "delta": delta, **clip},
    )
    return loss, _report(metrics, metrics["clip_region"], "clip_delta")


def gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GSPO, one ratio a sequence with each token's own gradient. Averaged as `loss_agg_mode` says,
    as verl does since 0.9.1; before, it always took seq-mean-token-mean."""
    options = {
        "loss_type": "grpo",
        "level": "sequence_token",
        "delta": math.exp(GSPO_LOG_RATIO_CEILING),
        "log_ratio_clamp": None,
        "kl_input_clamp": None,
        **_clip_range(config),
    }
    loss, metrics = _loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        options,
    )
    return loss, _report(metrics, metrics["clip_region"], None)


def sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """SAPO's soft gate; averaged seq-mean-token-mean whatever `loss_agg_mode` says, as in verl."""
    loss, metrics = _loss(
        (old_log_prob, log_prob, advantages, response_mask),
        "seq-mean-token-mean",
        config,
        rollout_is_weights,
        {"loss_type": "sapo", "sapo_tau_pos": config.tau_pos, "sapo_tau_neg": config.tau_neg},
    )
    return loss, _report(metrics, None, None)


def cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """CISPO with verl's bounds, [1 - clip_ratio_low, 1 + clip_ratio_high]; its clip share counts
    ratios outside them whatever the advantage's sign."""
    clip = _clip_range(config)
    loss, metrics = _loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        {"loss_type": "cispo", "cispo_bounds": "relative", **clip},
    )
    ratio = (log_prob - old_log_prob).detach().exp()
    outside = (ratio < 1 - clip["eps_low"]) | (ratio > 1 + clip["eps_high"])
    return loss, _report(metrics, token_mean(outside.to(ratio.dtype), response_mask), None)


POLICY_LOSSES = {
    "vcr1_vanilla": vanilla,
    "vcr1_gspo": gspo,
    "vcr1_sapo": sapo,
    "vcr1_cispo": cispo,
}
