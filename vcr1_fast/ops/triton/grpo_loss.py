"""Triton kernels of `grpo_loss`: the loss, its gradient and its metrics in two launches.

The first has one program per completion, which reads its tokens at most twice (three times for
sequence-level ratios) and leaves its sums in a row of scratch memory. The second adds those rows in
order, writes the loss and the metrics and scales the gradient, whose weight depends on counts of
the whole call. No atomics: results repeat bit for bit.

The maths, with these names, is in vcr1_fast/ops/grpo/reference.py. Bounds are applied by selection,
which unlike a hardware minimum keeps NaN.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_fast.ops.grpo.config import CLIPPED_LOSSES, LossParameters, decode
from vcr1_fast.ops.grpo.reference import (
    METRICS,
    VESPO_LOG_CEILING,
    VESPO_LOG_FLOOR,
    LossInputs,
    check_offsets,
    map_tensors,
    reference,
)

_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
_FINISH = {"BLOCK": 4096, "ROWS": 64, "num_warps": 4, "enable_fp_fusion": True}

# Columns of a completion's row of sums: the metrics in their order, then what only we need.
_METRICS = tl.constexpr(len(METRICS))
_LOSS = tl.constexpr(len(METRICS))
_ENTROPY_LOSS = tl.constexpr(len(METRICS) + 1)
_ENTROPY_WEIGHT = tl.constexpr(len(METRICS) + 2)
# A power of two, as tl.arange demands; unused columns stay 0.
_COLUMNS = tl.constexpr(32)
_TOKENS = tl.constexpr(METRICS.index("num_tokens"))
_SEQUENCES = tl.constexpr(METRICS.index("num_sequences"))
_POLICY = tl.constexpr(METRICS.index("policy_loss"))
_KL = tl.constexpr(METRICS.index("kl"))
_ENTROPY = tl.constexpr(METRICS.index("entropy"))
_RATIO = tl.constexpr(METRICS.index("ratio_mean"))
_RATIO_MIN = tl.constexpr(METRICS.index("ratio_min"))
_RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))
_APPROX_KL = tl.constexpr(METRICS.index("approx_kl"))
_CLIP_LOW = tl.constexpr(METRICS.index("clip_low"))
_CLIP_HIGH = tl.constexpr(METRICS.index("clip_high"))
_CLIP_REGION = tl.constexpr(METRICS.index("clip_region"))
_CLIP_DELTA = tl.constexpr(METRICS.index("clip_delta"))
_PHI = tl.constexpr(METRICS.index("vespo_phi"))
_KEPT = tl.constexpr(METRICS.index("off_policy_kept"))
_GAP = tl.constexpr(METRICS.index("rollout_gap_mean"))
_GAP_MAX = tl.constexpr(METRICS.index("rollout_gap_max"))
_ROLLOUT_KL = tl.constexpr(METRICS.index("rollout_kl"))
_WEIGHT = tl.constexpr(METRICS.index("rollout_weight_mean"))
_CLIPPED = tl.constexpr(METRICS.index("rollout_clipped"))

# Numbers of `LossParameters` are run-time arguments: no value compiles another kernel.
_VALUES = tuple(name for name, kind in LossParameters.__annotations__.items() if kind == "float")
Values = namedtuple("Values", _VALUES)  # type: ignore[misc]

FLOOR = tl.constexpr(VESPO_LOG_FLOOR)
CEILING = tl.constexpr(VESPO_LOG_CEILING)


class Options(NamedTuple):
    """Compile-time options of the kernels; names as in `LossParameters`."""

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


def _split(p: LossParameters, token_advantages: bool) -> tuple[Options, Any]:
    """`p` as the kernels take it: (compile-time options, run-time values)."""
    scope, _, action = p.rollout_correction.partition("_")
    options = Options(
        # One kernel for all clipped losses, which differ in their aggregation only.
        loss_type="clipped" if p.loss_type in CLIPPED_LOSSES else p.loss_type,
        level=p.level,
        kl=p.kl,
        kl_bias_correction=p.kl_bias_correction,
        kl_straight_through=p.kl_straight_through,
        aggregation=p.aggregation,
        exclude_empty=p.exclude_empty,
        rollout_scope=scope,
        rollout_action=action,
        rollout_after_kl=p.rollout_after_kl and p.loss_type != "vespo",
        off_policy=math.isfinite(p.off_policy_threshold),
        entropy_token_mean=p.entropy_token_mean,
        token_advantages=token_advantages,
    )
    return options, Values(*[getattr(p, name) for name in _VALUES])


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def token_correction(gap, values, OPTIONS: tl.constexpr):
    """(weight, whether it is outside the bounds) of a rollout correction by token."""
    weight = tl.exp(gap)
    clipped = (weight < values.rollout_min) | (weight > values.rollout_max)
    # "truncate" keeps a token with a bounded weight; "mask" and "icepop" drop it.
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
        # CISPO clips the weight and keeps the token's gradient: the ratio is a constant.
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
    # A clamped difference has no gradient, as under torch.clamp.
    inside = tl.abs(raw) <= limit
    if OPTIONS.kl_straight_through:
        slope = d
    else:
        inside = inside & (tl.abs(value) <= bound)
    return clamp(value, -bound, bound), tl.where(inside, -slope, 0.0)


@triton.jit
def load_tokens(inputs, values, place, counts):
    """(logp, before, log-ratio, whether it was not cut, gap); 0 where the token does not count."""
    logp = tl.load(inputs.logps + place, mask=counts, other=0.0)
    before = logp
    if inputs.old_logps is not None:
        # Without old log-probs the policy is its own: the ratio is 1, its gradient is not 0.
        before = tl.load(inputs.old_logps + place, mask=counts, other=0.0)
    gap = tl.full(place.shape, 0.0, tl.float32)
    if inputs.rollout_logps is not None:
        gap = before - tl.load(inputs.rollout_logps + place, mask=counts, other=0.0)
        gap = tl.where(gap == gap, gap, 0.0)  # nan: the sampler gave no log-prob
    raw = logp - before
    limit = values.log_ratio_clamp
    return logp, before, clamp(raw, -limit, limit), tl.abs(raw) <= limit, gap


@triton.jit
def counts_of(inputs, place, end):
    counts = place < end
    if inputs.mask is not None:
        counts = counts & (tl.load(inputs.mask + place, mask=counts, other=0) != 0)
    return counts


@triton.jit
def statistics(inputs, values, begin, end, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics that a completion's tokens share: (tokens, entropy weight, mean log-ratio, rollout
    correction, dropped by it, off policy, phi for A >= 0, phi for A < 0)."""
    tokens, entropy_weight = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    log_ratio, bounded = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    gaps, drift = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    log_weight = tl.full([], 0.0, tl.float32)
    # The first of two passes over the tokens: the terms need sums over their whole completion.
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        counts = counts_of(inputs, place, end)
        tokens += tl.sum(counts.to(tl.float32), 0)
        if inputs.token_weights is not None:
            each = tl.load(inputs.token_weights + place, mask=counts, other=0.0)
            entropy_weight += tl.sum(each, 0)
        logp, before, x, _uncut, gap = load_tokens(inputs, values, place, counts)
        log_ratio += tl.sum(x, 0)
        gaps += tl.sum(gap, 0)
        if OPTIONS.off_policy:
            drift += tl.sum(before - gap - logp, 0)
        if OPTIONS.loss_type == "vespo":
            # VESPO's code bounds log-ratios at 20, whatever `log_ratio_clamp` is.
            bounded += tl.sum(clamp(x, -20.0, 20.0), 0)
            if OPTIONS.rollout_scope == "token":
                weight = token_correction(gap, values, OPTIONS)[0]
                each = clamp(tl.log(weight), FLOOR, CEILING)
                log_weight += tl.sum(tl.where(counts, each, 0.0), 0)
            if OPTIONS.rollout_scope == "sequence" and OPTIONS.rollout_action == "icepop":
                log_weight += tl.sum(clamp(gap, FLOOR, CEILING), 0)
    if inputs.token_weights is None:
        entropy_weight = tokens

    some = tl.maximum(tokens, 1.0)
    correction, dropped = tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
    if OPTIONS.rollout_scope == "sequence":
        if OPTIONS.rollout_action == "icepop":
            # icepop tests the mean, the other actions the whole sequence's ratio.
            gaps = gaps / some
        tested = tl.exp(gaps)
        outside = (tested < values.rollout_min) | (tested > values.rollout_max)
        dropped = outside.to(tl.float32)
        if OPTIONS.rollout_action == "truncate":
            correction = clamp(tested, values.rollout_min, values.rollout_max)
        else:
            correction = tl.where(outside, 0.0, tested)
        if OPTIONS.rollout_action == "icepop":
            log_weight = tl.where(outside, FLOOR * tokens, log_weight)
        else:
            log_weight = clamp(tl.log(correction), FLOOR, CEILING)
    phi_pos, phi_neg = tl.full([], 1.0, tl.float32), tl.full([], 1.0, tl.float32)
    if OPTIONS.loss_type == "vespo":
        log_w = clamp(bounded + log_weight, FLOOR, CEILING)
        # phi = w^k exp(lambda (1 - w)), in logarithms: w^k alone overflows.
        rise, lam_pos = tl.exp(log_w), tl.maximum(values.vespo_lambda_pos, 1e-4)
        lam_neg = tl.maximum(values.vespo_lambda_neg, 1e-4)
        phi_pos = tl.exp(lam_pos + values.vespo_k_pos * log_w - lam_pos * rise)
        phi_neg = tl.exp(lam_neg + values.vespo_k_neg * log_w - lam_neg * rise)
    off_policy = (drift / some > values.off_policy_threshold).to(tl.float32)
    mean = log_ratio / some
    return tokens, entropy_weight, mean, correction, dropped, off_policy, phi_pos, phi_neg


@triton.jit
def ratios(mean, x, counts, OPTIONS: tl.constexpr):
    """(r, e^x) of a block of tokens."""
    per_token = tl.exp(x)
    if OPTIONS.level == "token":
        return per_token, per_token
    else:
        return tl.where(counts, tl.exp(mean), 1.0), per_token


@triton.jit
def corrections(gap, counts, shared, values, OPTIONS: tl.constexpr):
    """(weight of a block of tokens, 1 where the rollout correction changed it)."""
    correction, dropped = shared[3], shared[4]
    if OPTIONS.rollout_scope == "none":
        return tl.full(gap.shape, 1.0, tl.float32), tl.full(gap.shape, 0.0, tl.float32)
    elif OPTIONS.rollout_scope == "token":
        weight, clipped = token_correction(gap, values, OPTIONS)
        return weight, clipped.to(tl.float32)
    elif OPTIONS.rollout_action == "icepop":
        return tl.where(dropped > 0.0, 0.0, tl.exp(gap)), tl.where(counts, dropped, 0.0)
    else:
        return tl.where(counts, correction, 1.0), tl.where(counts, dropped, 0.0)


@triton.jit
def token_terms(inputs, values, b, place, counts, shared, OPTIONS: tl.constexpr):
    """Terms of a block of tokens: (loss, policy, for the gradient, for the metrics, rollout)."""
    mean, off_policy, phi_pos, phi_neg = shared[2], shared[5], shared[6], shared[7]
    logp, _before, x, uncut, gap = load_tokens(inputs, values, place, counts)
    ratio, per_token = ratios(mean, x, counts, OPTIONS)
    if OPTIONS.token_advantages:
        advantage = tl.load(inputs.advantages + place, mask=counts, other=0.0)
    else:
        advantage = tl.where(counts, tl.load(inputs.advantages + b), 0.0)
    correction, clipped = corrections(gap, counts, shared, values, OPTIONS)
    kept = tl.where(advantage < 0.0, 1.0 - off_policy, 1.0)
    factor = kept
    if OPTIONS.loss_type != "vespo":
        factor = factor * correction
    if inputs.token_weights is not None:
        factor = factor * tl.load(inputs.token_weights + place, mask=counts, other=0.0)
    policy, d_ratio, d_logp, phi = policy_term(
        ratio, logp, advantage, phi_pos, phi_neg, values, OPTIONS
    )
    policy = factor * policy
    loss, through, direct = policy, factor * d_ratio, factor * d_logp
    kl = tl.full(place.shape, 0.0, tl.float32)
    if inputs.ref_logps is not None:
        raw = tl.load(inputs.ref_logps + place, mask=counts, other=0.0) - logp
        kl, d_kl = kl_term(raw, values, OPTIONS)
        kl_weight = values.beta
        if OPTIONS.rollout_after_kl:
            kl_weight = kl_weight * correction
        if OPTIONS.kl_bias_correction:
            through += kl_weight * kl
            kl_weight = kl_weight * ratio
        loss += kl_weight * kl
        direct += kl_weight * d_kl
    through_s = through * ratio  # the derivative in s = log r
    gradient = (direct, through_s, uncut.to(tl.float32))
    return (
        loss,
        policy,
        gradient,
        (advantage, ratio, per_token, x, kl, phi, kept),
        (
            gap,
            correction,
            clipped,
        ),
    )


class _Outputs(NamedTuple):
    """`sums` (B, 32) is scratch memory; gradients are as the first launch leaves them."""

    loss: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor | None
    metrics: Tensor
    sums: Tensor


@triton.jit
def _range(inputs, grads, b, columns, tokens, BLOCK: tl.constexpr):
    """(first, last + 1) token of a completion. If packed, the first and the last completion also
    write zeros for the tokens outside every segment."""
    if inputs.cu_seqlens is None:
        return b * columns, (b + 1) * columns
    else:
        begin = clamp(tl.load(inputs.cu_seqlens + b).to(tl.int64), 0, tokens)
        end = clamp(tl.load(inputs.cu_seqlens + b + 1).to(tl.int64), begin, tokens)
        zero = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, tl.where(b == 0, begin, 0), BLOCK):
            place = start + tl.arange(0, BLOCK)
            for grad in tl.static_range(len(grads)):
                tl.store(grads[grad] + place, zero, mask=place < begin)
        rest = tl.where(b == tl.num_programs(0) - 1, end, tokens)
        for start in range(rest, tokens, BLOCK):
            place = start + tl.arange(0, BLOCK)
            for grad in tl.static_range(len(grads)):
                tl.store(grads[grad] + place, zero, mask=place < tokens)
        return begin, end


@triton.jit(do_not_specialize=["columns", "tokens"])
def _completion_kernel(
    inputs,
    out,
    values,
    columns: tl.int64,
    tokens: tl.int64,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if out.grad_entropy is None:
        begin, end = _range(inputs, (out.grad_logps,), b, columns, tokens, BLOCK)
    else:
        grads = (out.grad_logps, out.grad_entropy)
        begin, end = _range(inputs, grads, b, columns, tokens, BLOCK)
    shared = statistics(inputs, values, begin, end, OPTIONS, BLOCK)
    counted, entropy_weight = shared[0], shared[1]
    some = tl.maximum(counted, 1.0)
    share = tl.full([], 1.0, tl.float32)  # of a token in the loss, but for the counts of the call
    if inputs.weights is not None:
        share = tl.load(inputs.weights + b)
    elif OPTIONS.aggregation == "sequence_mean":
        share = 1.0 / some

    slot = tl.arange(0, _COLUMNS)
    sums = tl.where(slot == _TOKENS, counted, 0.0)
    sums += tl.where(slot == _SEQUENCES, (counted > 0.0).to(tl.float32), 0.0)
    sums += tl.where(slot == _ENTROPY_WEIGHT, entropy_weight, 0.0)
    lowest, highest = tl.full([], float("inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    widest, d_mean = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        counts = counts_of(inputs, place, end)
        one = counts.to(tl.float32)
        loss, policy, gradient, terms, rollout = token_terms(
            inputs, values, b, place, counts, shared, OPTIONS
        )
        direct, through_s, uncut = gradient
        if OPTIONS.level == "sequence":
            d_mean += tl.sum(tl.where(counts, through_s, 0.0), 0)
        else:
            if OPTIONS.level == "token":
                through_s = through_s * uncut
            grad = tl.where(counts, share * (direct + through_s), 0.0)
            tl.store(out.grad_logps + place, grad, mask=place < end)

        advantage, ratio, per_token, x, kl, phi, kept = terms
        sums += tl.where(slot == _LOSS, share * tl.sum(tl.where(counts, loss, 0.0), 0), 0.0)
        sums += tl.where(slot == _POLICY, share * tl.sum(tl.where(counts, policy, 0.0), 0), 0.0)
        sums += tl.where(slot == _RATIO, tl.sum(tl.where(counts, ratio, 0.0), 0), 0.0)
        lowest = tl.minimum(lowest, tl.min(tl.where(counts, ratio, float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(counts, ratio, float("-inf")), 0))
        moved = tl.sum(tl.where(counts, per_token - 1.0 - x, 0.0), 0)
        sums += tl.where(slot == _APPROX_KL, moved, 0.0)
        sums += tl.where(slot == _KEPT, tl.sum(kept * one, 0), 0.0)
        # The advantage is 0 outside the mask.
        over = ((ratio > values.delta) & (advantage < 0.0)).to(tl.float32)
        sums += tl.where(slot == _CLIP_DELTA, tl.sum(over, 0), 0.0)
        if (OPTIONS.loss_type == "clipped") | (OPTIONS.loss_type == "cispo"):
            below = ((ratio < values.ratio_low) & (advantage < 0.0)).to(tl.float32)
            above = ((ratio > values.ratio_high) & (advantage > 0.0)).to(tl.float32)
            below, above = tl.sum(below, 0), tl.sum(above, 0)
            sums += tl.where(slot == _CLIP_LOW, below, 0.0)
            sums += tl.where(slot == _CLIP_HIGH, above, 0.0)
            sums += tl.where(slot == _CLIP_REGION, below + above, 0.0)
        if OPTIONS.loss_type == "vespo":
            sums += tl.where(slot == _PHI, tl.sum(tl.where(counts, phi, 0.0), 0), 0.0)
        if inputs.ref_logps is not None:
            sums += tl.where(slot == _KL, tl.sum(tl.where(counts, kl, 0.0), 0), 0.0)
        if inputs.rollout_logps is not None:
            gap, correction, clipped = rollout
            wide = tl.abs(gap)
            # 0 outside the mask, where `load_tokens` gives no gap: no second mask is needed.
            widest = tl.maximum(widest, tl.max(wide, 0))
            sums += tl.where(slot == _GAP, tl.sum(wide, 0), 0.0)
            sums += tl.where(slot == _ROLLOUT_KL, tl.sum(tl.exp(gap) - 1.0 - gap, 0), 0.0)
            weight = tl.sum(tl.where(counts, correction, 0.0), 0)
            sums += tl.where(slot == _WEIGHT, weight, 0.0)
            sums += tl.where(slot == _CLIPPED, tl.sum(clipped * one, 0), 0.0)
        if inputs.entropy is not None:
            entropy = tl.load(inputs.entropy + place, mask=counts, other=0.0)
            sums += tl.where(slot == _ENTROPY, tl.sum(entropy, 0), 0.0)
            if out.grad_entropy is not None:
                bonus = -values.entropy_coef * one
                if not OPTIONS.entropy_token_mean:
                    bonus = bonus * share
                if inputs.token_weights is not None:
                    bonus *= tl.load(inputs.token_weights + place, mask=counts, other=0.0)
                tl.store(out.grad_entropy + place, bonus, mask=place < end)
                sums += tl.where(slot == _ENTROPY_LOSS, tl.sum(bonus * entropy, 0), 0.0)

    if OPTIONS.level == "sequence":
        # Each token moves the mean log-ratio by 1 / n.
        for start in range(begin, end, BLOCK):
            place = start + tl.arange(0, BLOCK)
            counts = counts_of(inputs, place, end)
            gradient = token_terms(inputs, values, b, place, counts, shared, OPTIONS)[2]
            direct, uncut = gradient[0], gradient[2]
            grad = tl.where(counts, share * (direct + d_mean / some * uncut), 0.0)
            tl.store(out.grad_logps + place, grad, mask=place < end)

    sums = tl.where(slot == _RATIO_MIN, lowest, sums)
    sums = tl.where(slot == _RATIO_MAX, highest, sums)
    sums = tl.where(slot == _GAP_MAX, widest, sums)
    tl.store(out.sums + b * _COLUMNS + slot, sums)


@triton.jit
def _column(totals, slot, COLUMN: tl.constexpr):
    return tl.sum(tl.where(slot == COLUMN, totals, 0.0), 0)


@triton.jit
def _batch_share(inputs, totals, slot, count, values, OPTIONS: tl.constexpr):
    """The factor of every token's weight that depends on the whole call; `count` 0: count here."""
    if inputs.weights is not None:
        return tl.full([], 1.0, tl.float32)
    else:
        if inputs.denominator is not None:
            count = tl.load(inputs.denominator).to(tl.float32)
        elif (OPTIONS.aggregation == "token_mean") | (OPTIONS.aggregation == "num_items"):
            count = tl.where(count > 0.0, count, _column(totals, slot, _TOKENS))
        elif OPTIONS.exclude_empty:
            count = tl.where(count > 0.0, count, _column(totals, slot, _SEQUENCES))
        share = 1.0 / tl.maximum(count, 1.0)
        if OPTIONS.aggregation == "max_length":
            share = share / values.max_length
        return share


@triton.jit(do_not_specialize=["sequences", "tokens", "count"])
def _finish_kernel(
    inputs,
    out,
    values,
    sequences,
    tokens: tl.int64,
    count,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    slot = tl.arange(0, _COLUMNS)
    totals = tl.full([_COLUMNS], 0.0, tl.float32)
    lowest = tl.full([_COLUMNS], float("inf"), tl.float32)
    highest = tl.full([_COLUMNS], float("-inf"), tl.float32)
    # Every program sums all rows in the same order: no atomics, the same bits in every run.
    for first in range(0, sequences, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        there = row < sequences
        sums = tl.load(out.sums + row * _COLUMNS + slot[None, :], mask=there, other=0.0)
        totals += tl.sum(sums, 0)
        lowest = tl.minimum(lowest, tl.min(tl.where(there, sums, float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(there, sums, float("-inf")), 0))
    share = _batch_share(inputs, totals, slot, count, values, OPTIONS)
    entropy_share = share
    if OPTIONS.entropy_token_mean:
        weight = _column(totals, slot, _ENTROPY_WEIGHT)
        entropy_share = 1.0 / tl.where(weight > 0.0, weight, 1.0)

    if tl.program_id(0) == 0:
        loss = share * _column(totals, slot, _LOSS)
        loss += entropy_share * _column(totals, slot, _ENTROPY_LOSS)
        tl.store(out.loss, loss)
        counted = _column(totals, slot, _TOKENS)
        metrics = totals / tl.maximum(counted, 1.0)
        metrics = tl.where((slot == _TOKENS) | (slot == _SEQUENCES), totals, metrics)
        metrics = tl.where(slot == _POLICY, share * totals, metrics)
        metrics = tl.where(slot == _RATIO_MIN, lowest, metrics)
        metrics = tl.where((slot == _RATIO_MAX) | (slot == _GAP_MAX), highest, metrics)
        metrics = tl.where(counted > 0.0, metrics, 0.0)
        tl.store(out.metrics + slot, metrics, mask=slot < _METRICS)

    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if inputs.weights is None:
        grad = tl.load(out.grad_logps + place, mask=place < tokens, other=0.0)
        tl.store(out.grad_logps + place, share * grad, mask=place < tokens)
    if out.grad_entropy is not None:
        grad = tl.load(out.grad_entropy + place, mask=place < tokens, other=0.0)
        tl.store(out.grad_entropy + place, entropy_share * grad, mask=place < tokens)


def grpo_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `grpo_loss`, arguments as in its schema; copies inputs that are not contiguous."""
    *tensors, parameters = args
    inputs, p = LossInputs(*tensors), decode(parameters)
    logps = inputs.logps
    offsets = inputs.cu_seqlens
    sequences = len(logps) if offsets is None else len(offsets) - 1
    if logps.dtype != torch.float32 or sequences == 0:
        return reference(inputs, p)  # float64 is for tests; a grid of no programs cannot launch
    if offsets is not None:
        check_offsets(offsets, len(logps))
    inputs = map_tensors(Tensor.contiguous, inputs)
    if inputs.denominator is not None:
        inputs = inputs._replace(denominator=inputs.denominator.to(logps.device))
    with_entropy = inputs.entropy is not None and p.entropy_coef != 0.0
    empty = inputs.logps.new_empty
    out = _Outputs(
        loss=empty(()),
        grad_logps=empty(logps.shape),
        grad_entropy=empty(logps.shape) if with_entropy else None,
        metrics=empty(len(METRICS)),
        sums=empty((sequences, _COLUMNS.value)),
    )
    # Packed (N, 1): one per token even if N = B.
    column = inputs.cu_seqlens is not None and inputs.advantages.ndim == 2
    options, values = _split(p, column or inputs.advantages.numel() != sequences)
    given = {"token_mean": 0.0, "num_items": p.num_items}
    count = given.get(options.aggregation, p.num_sequences)
    if count == 0.0 and options.aggregation not in given and not options.exclude_empty:
        count = float(sequences)
    columns = logps.shape[1] if offsets is None else 0
    blocks = triton.cdiv(logps.numel(), _FINISH["BLOCK"])
    if inputs.weights is not None and not with_entropy:
        blocks = 1  # nothing to scale
    with torch.cuda.device_of(logps):
        _completion_kernel[(sequences,)](
            inputs, out, values, columns, logps.numel(), OPTIONS=options, **_LAUNCH
        )
        _finish_kernel[(max(blocks, 1),)](
            inputs, out, values, sequences, logps.numel(), count, OPTIONS=options, **_FINISH
        )
    grad_entropy = empty(0) if out.grad_entropy is None else out.grad_entropy
    return out.loss, out.grad_logps, grad_entropy, out.metrics
