"""The terms of the GRPO loss, token by token: see `grpo_config.py` for what they compute."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.grpo_config import (
    CLIPPED_LOSSES,
    KL_KINDS,
    LOSS_TYPES,
    ROLLOUT_CORRECTIONS,
    LossParameters,
)

VESPO_LOG_FLOOR = math.log(1e-8)
VESPO_LOG_CEILING = 20.0


class LossInputs(NamedTuple):
    """The tensors of one call, all of the log-probs' dtype; see `grpo_loss` for their meaning."""

    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    ref_logps: Tensor | None = None
    entropy: Tensor | None = None
    rollout_logps: Tensor | None = None
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    weights: Tensor | None = None
    denominator: Tensor | None = None


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """ValueError unless the offsets of packed completions rise within `tokens`. On the CPU only:
    elsewhere the check would synchronise."""
    if offsets.device.type != "cpu":
        return
    if offsets[0] < 0 or offsets[-1] > tokens or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise within 0 to {tokens}, the number of tokens; got "
            f"{offsets.tolist()}"
        )


class Completions:
    """Which completion each token belongs to: sums over completions, and values spread back."""

    def __init__(self, inputs: LossInputs) -> None:
        self._shape = inputs.logps.shape
        self._offsets = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()
        if self._offsets is None:
            self.count = self._shape[0]
            inside = torch.ones(self._shape, dtype=torch.bool, device=inputs.logps.device)
        else:
            self.count = len(self._offsets) - 1
            check_offsets(self._offsets, self._shape[0])
            position = torch.arange(self._shape[0], device=inputs.logps.device)
            inside = (position >= self._offsets[0]) & (position < self._offsets[-1])
            index = torch.searchsorted(self._offsets[1:].contiguous(), position, right=True)
            self._index = index.clamp(max=max(self.count - 1, 0))
        self.mask = inside if inputs.mask is None else inside & (inputs.mask != 0)

    def sum(self, x: Tensor) -> Tensor:
        """(tokens) -> (B,). Segment sums run in a fixed order, unlike index_add on GPUs."""
        if self._offsets is None:
            return x.sum(-1)
        if self.count == 0:
            return x.new_zeros(0)
        return torch.segment_reduce(x, "sum", offsets=self._offsets, initial=0, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """(B,) -> (tokens)."""
        if self._offsets is None:
            return x[:, None].expand(self._shape)
        return x[self._index] if self.count else x.new_zeros(self._shape)

    def per_token(self, x: Tensor) -> Tensor:
        """(B,), (B, 1) or (tokens) -> (tokens), zero outside the mask."""
        per_sequence = x.ndim == 1 and (self._offsets is None or x.shape[0] == self.count)
        return self.keep(self.spread(x) if per_sequence else x)

    def keep(self, x: Tensor) -> Tensor:
        """x inside the mask and 0 elsewhere, whatever is there (padding may hold inf or nan)."""
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


class Rollout(NamedTuple):
    gap: Tensor  # old - rollout, 0 where the sampler gave no log-prob (nan)
    weight: Tensor  # of the policy term
    log_weight: Tensor  # (B,): its sum over the completion in logs, for vespo
    clipped: Tensor


class Factors(NamedTuple):
    policy: Tensor
    kl: Tensor
    kept: Tensor


def rollout_correction(
    inputs: LossInputs, p: LossParameters, rows: Completions, old: Tensor
) -> Rollout:
    """The correction for the gap between the sampler and `old_logps`."""
    gap = torch.zeros_like(old)
    if inputs.rollout_logps is not None:
        gap = old - rows.keep(inputs.rollout_logps)
        gap = torch.where(gap.isnan(), 0.0, gap)
    kind = ROLLOUT_CORRECTIONS[p.kind("rollout_correction")]
    ones = torch.ones_like(gap)
    if kind == "none":
        return Rollout(gap, ones, rows.sum(gap) * 0, ones > 1)
    low, high = p.value("rollout_min"), p.value("rollout_max")
    scope, action = kind.split("_")
    if kind == "sequence_icepop":
        tokens = rows.sum(rows.mask.to(gap.dtype)).clamp(min=1)
        tested, ratio = rows.spread((rows.sum(gap) / tokens).exp()), gap.exp()
    else:
        tested = gap.exp() if scope == "token" else rows.spread(rows.sum(gap).exp())
        ratio = tested
    clipped = (tested < low) | (tested > high)
    if action == "truncate":
        weight = ratio.clamp(low, high)
    else:
        weight = torch.where(clipped, torch.zeros_like(ratio), ratio)
    log_weight = weight.log().clamp(VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    log_weight = rows.keep(log_weight)
    if scope == "sequence" and action != "icepop":
        # Every token carries the completion's weight, which counts once.
        tokens = rows.sum(rows.mask.to(gap.dtype)).clamp(min=1)
        return Rollout(gap, weight, rows.sum(log_weight) / tokens, clipped)
    return Rollout(gap, weight, rows.sum(log_weight), clipped)


def constant_factors(
    inputs: LossInputs,
    p: LossParameters,
    rows: Completions,
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
) -> tuple[Factors, Rollout]:
    """What multiplies the policy term and the KL term of each token, constant for the gradient."""
    ones = torch.ones_like(logps)
    rollout = rollout_correction(inputs, p, rows, old)
    kept = ones
    if math.isfinite(p.value("off_policy_threshold")):
        tokens = rows.sum(rows.mask.to(logps.dtype)).clamp(min=1)
        drift = rows.spread(rows.sum(old - rollout.gap - logps) / tokens)
        kept = ((advantages >= 0) | (drift <= p.value("off_policy_threshold"))).to(logps.dtype)
    policy = kept if inputs.token_weights is None else kept * rows.keep(inputs.token_weights)
    weight = ones if LOSS_TYPES[p.kind("loss_type")] == "vespo" else rollout.weight
    kl = weight if p.kind("rollout_after_kl") else ones
    return Factors(policy * weight, kl, kept), rollout


def policy_term(
    p: LossParameters,
    rows: Completions,
    ratio: Tensor,
    logps: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    rollout: Rollout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(policy term, its derivative in the ratio, its direct derivative in logp, vespo's phi)."""
    loss_type = LOSS_TYPES[p.kind("loss_type")]
    zero = torch.zeros_like(ratio)
    if loss_type in CLIPPED_LOSSES:
        low, high, delta = p.value("ratio_low"), p.value("ratio_high"), p.value("delta")
        free = ratio.clamp(max=delta) * advantages
        clipped = ratio.clamp(low, high) * advantages
        d_free = -advantages * (ratio <= delta)
        d_clipped = -advantages * ((ratio >= low) & (ratio <= high))
        # Where both are equal, half of each: the full gradient inside the range, as autograd's.
        d_ratio = torch.where(free < clipped, d_free, d_clipped)
        d_ratio = torch.where(free == clipped, 0.5 * (d_free + d_clipped), d_ratio)
        return -torch.minimum(free, clipped), d_ratio, zero, zero
    if loss_type == "sapo":
        tau = _by_sign(advantages > 0, p, "sapo_tau", ratio.dtype)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -advantages * 4 * gate / tau, -advantages * 4 * gate * (1 - gate), zero, zero
    if loss_type == "cispo":
        phi = ratio.clamp(p.value("ratio_low"), p.value("ratio_high"))
        return -phi * advantages * logps, zero, -phi * advantages, zero
    log_w = rows.sum(log_ratio.clamp(-20, 20)) + rollout.log_weight
    log_w = rows.spread(log_w.clamp(VESPO_LOG_FLOOR, VESPO_LOG_CEILING))
    k = _by_sign(advantages >= 0, p, "vespo_k", ratio.dtype)
    lam = _by_sign(advantages >= 0, p, "vespo_lambda", ratio.dtype).clamp(min=1e-4)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi * advantages * logps, zero, -phi * advantages, phi


def _by_sign(positive: Tensor, p: LossParameters, name: str, dtype: torch.dtype) -> Tensor:
    """The parameter `name`_pos where positive and `name`_neg elsewhere."""
    chosen = torch.full_like(positive, p.value(name + "_pos"), dtype=dtype)
    return torch.where(positive, chosen, p.value(name + "_neg"))


def kl_term(
    p: LossParameters, rows: Completions, ref_logps: Tensor | None, logps: Tensor
) -> tuple[Tensor, Tensor]:
    """(estimator, its derivative in logp)."""
    if ref_logps is None:
        return torch.zeros_like(logps), torch.zeros_like(logps)
    limit, bound = p.value("kl_input_clamp"), p.value("kl_output_clamp")
    raw = rows.keep(ref_logps) - logps
    d = raw.clamp(-limit, limit)
    kind = KL_KINDS[p.kind("kl")]
    if kind == "k1":
        value, slope = -d, -torch.ones_like(d)  # slope: derivative in d
    elif kind == "k2":
        value, slope = 0.5 * d * d, d
    elif kind == "k3":
        value, slope = d.exp() - d - 1, d.exp() - 1
    else:
        value, slope = d.abs(), d.sign()
    inside = (raw.abs() <= limit) & (value.abs() <= bound)
    if p.kind("kl_straight_through"):
        slope, inside = d, raw.abs() <= limit
    return value.clamp(-bound, bound), -slope * inside
