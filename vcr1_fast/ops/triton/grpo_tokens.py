"""Blocks of a completion's tokens: what they hold, what they share, their terms of the GRPO loss.

The maths, with these names, is in vcr1_fast/ops/grpo_terms.py and grpo_reference.py.
"""

import triton
import triton.language as tl

from vcr1_fast.ops.triton.grpo_terms import (
    CEILING,
    FLOOR,
    clamp,
    kl_term,
    policy_term,
    token_correction,
)


@triton.jit
def load_tokens(inputs, values, place, counts):
    """(logp, before, log-ratio, whether it was not cut, gap); 0 where the token does not count."""
    logp = tl.load(inputs.logps + place, mask=counts, other=0.0)
    before = logp
    if inputs.old_logps is not None:
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
    """What the tokens of a completion share: (tokens, entropy weight, mean log-ratio, rollout
    correction, dropped by it, off policy, phi for A >= 0, phi for A < 0)."""
    tokens, entropy_weight = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    log_ratio, bounded = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    gaps, drift = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    log_weight = tl.full([], 0.0, tl.float32)
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
    """Of a block of tokens: what the gradient and the metrics are made of."""
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
