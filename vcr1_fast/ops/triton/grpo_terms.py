"""The terms of the GRPO loss as Triton functions, on one token or a block of them.

The maths, with these names, is in vcr1_fast/ops/grpo_terms.py and grpo_reference.py. Bounds are
applied by selection, which unlike a hardware minimum keeps NaN.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from vcr1_fast.ops.grpo_config import (
    AGGREGATIONS,
    CLIPPED_LOSSES,
    KL_KINDS,
    LEVELS,
    LOSS_TYPES,
    ROLLOUT_CORRECTIONS,
    VALUES,
    LossParameters,
)
from vcr1_fast.ops.grpo_terms import VESPO_LOG_CEILING, VESPO_LOG_FLOOR

Values = namedtuple("Values", VALUES)  # run-time arguments: no value compiles another kernel

FLOOR = tl.constexpr(VESPO_LOG_FLOOR)
CEILING = tl.constexpr(VESPO_LOG_CEILING)


class Options(NamedTuple):
    """What a kernel is compiled for; names as in `GRPOLossConfig`."""

    loss_type: str  # "clipped" for all of `CLIPPED_LOSSES`
    level: str
    kl: str
    kl_bias_correction: bool
    kl_straight_through: bool
    aggregation: str
    exclude_empty: bool
    rollout_scope: str  # "none", "token" or "sequence"
    rollout_action: str  # "", "truncate", "mask" or "icepop"
    rollout_after_kl: bool
    off_policy: bool
    entropy_token_mean: bool
    token_advantages: bool


def encode(p: LossParameters, token_advantages: bool) -> tuple[Options, Values]:
    """`p` as the kernels take it."""
    loss_type = LOSS_TYPES[p.kind("loss_type")]
    scope, _, action = ROLLOUT_CORRECTIONS[p.kind("rollout_correction")].partition("_")
    options = Options(
        loss_type="clipped" if loss_type in CLIPPED_LOSSES else loss_type,
        level=LEVELS[p.kind("level")],
        kl=KL_KINDS[p.kind("kl")],
        kl_bias_correction=bool(p.kind("kl_bias_correction")),
        kl_straight_through=bool(p.kind("kl_straight_through")),
        aggregation=AGGREGATIONS[p.kind("aggregation")],
        exclude_empty=bool(p.kind("exclude_empty")),
        rollout_scope=scope,
        rollout_action=action,
        rollout_after_kl=bool(p.kind("rollout_after_kl")) and loss_type != "vespo",
        off_policy=math.isfinite(p.value("off_policy_threshold")),
        entropy_token_mean=bool(p.kind("entropy_token_mean")),
        token_advantages=token_advantages,
    )
    return options, Values(*p.values)


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def token_correction(gap, values, OPTIONS: tl.constexpr):
    """(weight, whether it is outside the bounds) of a rollout correction by token."""
    weight = tl.exp(gap)
    clipped = (weight < values.rollout_min) | (weight > values.rollout_max)
    if OPTIONS.rollout_action == "truncate":
        weight = clamp(weight, values.rollout_min, values.rollout_max)
    else:
        weight = tl.where(clipped, 0.0, weight)
    return weight, clipped


@triton.jit
def policy_term(ratio, logp, advantage, phi_pos, phi_neg, values, OPTIONS: tl.constexpr):
    """(policy term, its derivative in the ratio, its direct derivative in logp, vespo's phi)."""
    zero = tl.full(ratio.shape, 0.0, tl.float32)
    low, high = values.ratio_low, values.ratio_high
    if OPTIONS.loss_type == "vespo":
        phi = tl.where(advantage >= 0.0, phi_pos, phi_neg)
        return -phi * advantage * logp, zero, -phi * advantage, phi
    elif OPTIONS.loss_type == "cispo":
        phi = clamp(ratio, low, high)
        return -phi * advantage * logp, zero, -phi * advantage, zero
    elif OPTIONS.loss_type == "sapo":
        tau = tl.where(advantage > 0.0, values.sapo_tau_pos, values.sapo_tau_neg)
        gate = 1.0 / (1.0 + tl.exp(tau * (1.0 - ratio)))
        step = -4.0 * advantage * gate
        return step / tau, step * (1.0 - gate), zero, zero
    else:
        free = tl.where(ratio > values.delta, values.delta, ratio) * advantage
        clipped = clamp(ratio, low, high) * advantage
        d_free = tl.where(ratio <= values.delta, -advantage, 0.0)
        d_clipped = tl.where((ratio >= low) & (ratio <= high), -advantage, 0.0)
        # Where both are equal, half of each: the full gradient inside the range.
        tie = 0.5 * (d_free + d_clipped)
        slope = tl.where(free < clipped, d_free, tl.where(free > clipped, d_clipped, tie))
        return -tl.where(free < clipped, free, clipped), slope, zero, zero


@triton.jit
def kl_term(raw, values, OPTIONS: tl.constexpr):
    """(estimator, its derivative in logp); `raw` is ref - logp."""
    limit, bound = values.kl_input_clamp, values.kl_output_clamp
    d = clamp(raw, -limit, limit)
    if OPTIONS.kl == "k1":
        value, slope = -d, tl.full(d.shape, -1.0, tl.float32)
    elif OPTIONS.kl == "k2":
        value, slope = 0.5 * d * d, d
    elif OPTIONS.kl == "k3":
        value, slope = tl.exp(d) - d - 1.0, tl.exp(d) - 1.0
    else:
        value, slope = tl.abs(d), tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    inside = tl.abs(raw) <= limit
    if OPTIONS.kl_straight_through:
        slope = d
    else:
        inside = inside & (tl.abs(value) <= bound)
    return clamp(value, -bound, bound), tl.where(inside, -slope, 0.0)
