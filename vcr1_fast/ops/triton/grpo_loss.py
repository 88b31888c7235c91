"""Triton kernels of `grpo_loss`: the loss, its gradient and its metrics in two launches.

The first has a program for each completion, which reads its tokens twice at most (three times for
sequence-level ratios) and leaves its sums in a row of scratch memory. The second adds those rows in
order, writes the loss and the metrics and scales the gradient, whose weight depends on counts of
the whole call. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_fast.ops.grpo_config import LossParameters
from vcr1_fast.ops.grpo_reference import METRICS, reference
from vcr1_fast.ops.grpo_terms import LossInputs, check_offsets
from vcr1_fast.ops.triton.grpo_terms import clamp, encode
from vcr1_fast.ops.triton.grpo_tokens import counts_of, statistics, token_terms

_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
_FINISH = {"BLOCK": 4096, "ROWS": 64, "num_warps": 4, "enable_fp_fusion": True}

# Columns of a completion's row of sums: the metrics in their order, then what only we need.
_METRICS = tl.constexpr(len(METRICS))
_LOSS = tl.constexpr(len(METRICS))
_ENTROPY_LOSS = tl.constexpr(len(METRICS) + 1)
_ENTROPY_WEIGHT = tl.constexpr(len(METRICS) + 2)
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


class _Outputs(NamedTuple):
    """`sums` (B, 32) is scratch memory; gradients are as the first launch leaves them."""

    loss: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor | None
    metrics: Tensor
    sums: Tensor


@triton.jit
def _range(inputs, grads, b, columns, tokens, BLOCK: tl.constexpr):
    """(first, last + 1) token of a completion. Where packed, the first and the last completion also
    write the zeros of the tokens that are in no segment."""
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
    """The part of every token's weight that depends on the whole call; `count` 0: count here."""
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
    """The op `grpo_loss`, arguments as in its schema. float64 goes to the reference; inputs that
    are not contiguous are copied."""
    inputs, p = LossInputs(*args[:11]), LossParameters(tuple(args[11]), tuple(args[12]))
    logps = inputs.logps
    packed = inputs.cu_seqlens is not None
    sequences = len(inputs.cu_seqlens) - 1 if packed else len(logps)
    if logps.dtype != torch.float32 or sequences == 0:
        return reference(inputs, p)
    if packed:
        check_offsets(inputs.cu_seqlens, len(logps))
    inputs = LossInputs(*(x if x is None else x.contiguous() for x in inputs))
    if inputs.denominator is not None:
        inputs = inputs._replace(denominator=inputs.denominator.to(logps.device))
    with_entropy = inputs.entropy is not None and p.value("entropy_coef") != 0.0
    empty = inputs.logps.new_empty
    out = _Outputs(
        loss=empty(()),
        grad_logps=empty(logps.shape),
        grad_entropy=empty(logps.shape) if with_entropy else None,
        metrics=empty(len(METRICS)),
        sums=empty((sequences, _COLUMNS.value)),
    )
    options, values = encode(p, inputs.advantages.numel() != sequences)
    given = {"token_mean": 0.0, "num_items": p.value("num_items")}
    count = given.get(options.aggregation, p.value("num_sequences"))
    if count == 0.0 and options.aggregation not in given and not options.exclude_empty:
        count = float(sequences)
    columns = 0 if packed else logps.shape[1]
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
