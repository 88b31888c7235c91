"""The GRPO loss in plain torch, with its derivative written out: the specification of `grpo_loss`.

Shapes: logps (B, T), or (N,) packed with cu_seqlens (B + 1,). `GRPOLossConfig` has the formulae of
the terms. With m the mask, W_t = m_t a_b the aggregation weight, s the log-ratio at the chosen
level, r = e^s, P the policy term, F the constant factors (token weight, off-policy mask, rollout
correction) and K the KL estimator:

    loss  = sum_t W_t (F_t P_t + beta K_t [r_t]) - entropy_coef sum_t V_t H_t

    dloss/dlogp_t = W_t (F_t dP_t/dlogp_t + beta dK_t/dlogp_t [r_t])             directly, and
                  + sum_u dloss/ds_u ds_u/dlogp_t,   dloss/ds_u = W_u r_u (F_u dP_u/dr + [beta K_u])

where ds_u/dlogp_t = [u = t] for token ratios, m_t / n_b inside completion b for sequence ratios
and [u = t] again for "sequence_token". The terms in [] apply with the bias correction. The
constants of the loss (old, ref, rollout log-probs, advantages, weights) get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.grpo.config import CLIPPED_LOSSES, LossParameters

METRICS = (
    "num_tokens",
    "num_sequences",
    "policy_loss",
    "kl",
    "entropy",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "clip_low",
    "clip_high",
    "clip_region",
    "clip_delta",
    "vespo_phi",
    "off_policy_kept",
    "rollout_gap_mean",
    "rollout_gap_max",
    "rollout_kl",
    "rollout_weight_mean",
    "rollout_clipped",
)

VESPO_LOG_FLOOR = math.log(1e-8)
VESPO_LOG_CEILING = 20.0


class LossInputs(NamedTuple):
    """The tensor arguments of the op `grpo_loss`, in the order of its schema.

    `grpo_loss` documents them. Log-probs, advantages and weights have one dtype. Packed advantages
    (N, 1) are one per token even if N = B. `weights` (B,): the loss weight of a token of each
    completion, in place of the aggregation's. `denominator`: the count that the aggregation divides
    by, 0-d.
    """

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


def map_tensors(fn: Callable[[Tensor], Tensor], inputs: LossInputs) -> LossInputs:
    """`fn` of each tensor that is there."""
    return LossInputs(*[x if x is None else fn(x) for x in inputs])  # type: ignore[arg-type]


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """ValueError unless the offsets of packed completions rise within `tokens`; CPU only."""
    if offsets.device.type != "cpu":
        return  # reading values of a GPU would synchronise
    if offsets[0] < 0 or offsets[-1] > tokens or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise within 0 to {tokens}, the number of tokens; got "
            f"{offsets.tolist()}"
        )


class Completions:
    """Maps tokens to completions: sums over completions, and values spread back to tokens."""

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
        """(tokens) -> (B,)."""
        if self._offsets is None:
            return x.sum(-1)
        if self.count == 0:
            return x.new_zeros(0)
        # Adds in a fixed order, unlike index_add on GPUs: results repeat bit for bit.
        return torch.segment_reduce(x, "sum", offsets=self._offsets, initial=0, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """(B,) -> (tokens)."""
        if self._offsets is None:
            return x[:, None].expand(self._shape)
        return x[self._index] if self.count else x.new_zeros(self._shape)

    def per_token(self, x: Tensor) -> Tensor:
        """(B,), padded (B, 1), (tokens), or packed (N, 1) -> (tokens), zero outside the mask."""
        if self._offsets is None and x.shape[1:] == (1,):
            x = x[:, 0]
        per_sequence = x.ndim == 1 and (self._offsets is None or x.shape[0] == self.count)
        return self.keep(self.spread(x) if per_sequence else x.reshape(self._shape))

    def keep(self, x: Tensor) -> Tensor:
        """x inside the mask, 0 elsewhere."""
        # Selects, because padding may hold inf or nan, and 0 * nan is nan.
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


class Rollout(NamedTuple):
    """The rollout correction of each token."""

    gap: Tensor  # old - rollout, 0 where the sampler gave no log-prob (nan)
    weight: Tensor  # of the policy term
    log_weight: Tensor  # (B,): sum of log weights over the completion, for vespo
    clipped: Tensor  # outside the bounds


class Factors(NamedTuple):
    """Factors of each token that are constant for the gradient."""

    policy: Tensor
    kl: Tensor
    kept: Tensor  # 1, or 0 where the off-policy threshold drops the policy term


def rollout_correction(
    inputs: LossInputs, p: LossParameters, rows: Completions, old: Tensor
) -> Rollout:
    """The correction for the gap between the sampler and `old_logps`."""
    gap = torch.zeros_like(old)
    if inputs.rollout_logps is not None:
        gap = old - rows.keep(inputs.rollout_logps)
        # Some samplers report no log-prob for forced tokens: count them as on-policy.
        gap = torch.where(gap.isnan(), 0.0, gap)
    kind = p.rollout_correction
    ones = torch.ones_like(gap)
    if kind == "none":
        return Rollout(gap, ones, rows.sum(gap) * 0, ones > 1)
    low, high = p.rollout_min, p.rollout_max
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
    # A weight of 0 has log -inf, which would make vespo's phi NaN.
    log_weight = weight.log().clamp(VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    log_weight = rows.keep(log_weight)
    if scope == "sequence" and action != "icepop":
        # Every token carries the completion's weight, which must count once in the sum.
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
    """The factors of the policy term and of the KL term, and the rollout correction."""
    ones = torch.ones_like(logps)
    rollout = rollout_correction(inputs, p, rows, old)
    kept = ones
    if math.isfinite(p.off_policy_threshold):
        tokens = rows.sum(rows.mask.to(logps.dtype)).clamp(min=1)
        drift = rows.spread(rows.sum(old - rollout.gap - logps) / tokens)
        kept = ((advantages >= 0) | (drift <= p.off_policy_threshold)).to(logps.dtype)
    policy = kept if inputs.token_weights is None else kept * rows.keep(inputs.token_weights)
    # vespo puts the correction inside its weight phi (`policy_term`); it must not count twice.
    weight = ones if p.loss_type == "vespo" else rollout.weight
    kl = weight if p.rollout_after_kl else ones
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
    zero = torch.zeros_like(ratio)
    if p.loss_type in CLIPPED_LOSSES:
        low, high, delta = p.ratio_low, p.ratio_high, p.delta
        free = ratio.clamp(max=delta) * advantages
        clipped = ratio.clamp(low, high) * advantages
        d_free = -advantages * (ratio <= delta)
        d_clipped = -advantages * ((ratio >= low) & (ratio <= high))
        # Where both are equal, half of each, as autograd does: the full gradient inside the range.
        d_ratio = torch.where(free < clipped, d_free, d_clipped)
        d_ratio = torch.where(free == clipped, 0.5 * (d_free + d_clipped), d_ratio)
        return -torch.minimum(free, clipped), d_ratio, zero, zero
    if p.loss_type == "sapo":
        tau = _where(advantages > 0, p.sapo_tau_pos, p.sapo_tau_neg, ratio)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -advantages * 4 * gate / tau, -advantages * 4 * gate * (1 - gate), zero, zero
    if p.loss_type == "cispo":
        phi = ratio.clamp(p.ratio_low, p.ratio_high)
        return -phi * advantages * logps, zero, -phi * advantages, zero
    log_w = rows.sum(log_ratio.clamp(-20, 20)) + rollout.log_weight
    log_w = rows.spread(log_w.clamp(VESPO_LOG_FLOOR, VESPO_LOG_CEILING))
    positive = advantages >= 0
    k = _where(positive, p.vespo_k_pos, p.vespo_k_neg, ratio)
    lam = _where(positive, p.vespo_lambda_pos, p.vespo_lambda_neg, ratio).clamp(min=1e-4)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi * advantages * logps, zero, -phi * advantages, phi


def _where(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` or `no` for each element, in the dtype of `like` (two floats would give float32)."""
    return torch.where(condition, torch.full_like(like, yes), no)


def kl_term(
    p: LossParameters, rows: Completions, ref_logps: Tensor | None, logps: Tensor
) -> tuple[Tensor, Tensor]:
    """(estimator, its derivative in logp)."""
    if ref_logps is None:
        return torch.zeros_like(logps), torch.zeros_like(logps)
    limit, bound = p.kl_input_clamp, p.kl_output_clamp
    raw = rows.keep(ref_logps) - logps
    d = raw.clamp(-limit, limit)
    if p.kl == "k1":
        value, slope = -d, -torch.ones_like(d)  # slope: derivative in d
    elif p.kl == "k2":
        value, slope = 0.5 * d * d, d
    elif p.kl == "k3":
        value, slope = d.exp() - d - 1, d.exp() - 1
    else:
        value, slope = d.abs(), d.sign()
    inside = (raw.abs() <= limit) & (value.abs() <= bound)
    if p.kl_straight_through:
        slope, inside = d, raw.abs() <= limit
    return value.clamp(-bound, bound), -slope * inside


class TokenTerms(NamedTuple):
    """The terms of each token, before aggregation weights; (tokens) unless noted."""

    rows: Completions
    tokens: Tensor  # (B,): number inside the mask
    log_ratio: Tensor
    ratio: Tensor
    unclamped: Tensor
    advantages: Tensor
    factor: Factors
    rollout: Rollout
    policy: Tensor
    d_ratio: Tensor
    d_logp: Tensor
    phi: Tensor
    kl: Tensor
    d_kl: Tensor
    correction: Tensor

    def loss(self, p: LossParameters, weights: Tensor | float) -> tuple[Tensor, Tensor]:
        """(policy part, KL part) of weights_t loss_t for each token t."""
        kl = weights * p.beta * self.factor.kl * self.kl * self.correction
        return self.rows.keep(weights * self.factor.policy * self.policy), self.rows.keep(kl)

    def gradient(self, p: LossParameters, weights: Tensor) -> Tensor:
        """Derivative of sum_t weights_t loss_t in logps."""
        beta = p.beta
        direct = self.factor.policy * self.d_logp + beta * self.factor.kl * self.d_kl * (
            self.correction
        )
        through_ratio = self.factor.policy * self.d_ratio
        if p.kl_bias_correction:
            through_ratio = through_ratio + beta * self.factor.kl * self.kl
        rows = self.rows
        grad_s = rows.keep(weights * through_ratio * self.ratio)
        if p.level == "token":
            grad_s = grad_s * self.unclamped
        elif p.level == "sequence":
            # s is the mean log-ratio of the completion: each token moves it by 1 / n_b.
            mean = rows.spread(rows.sum(grad_s) / self.tokens.clamp(min=1))
            grad_s = mean * self.unclamped
        return rows.keep(weights * direct + grad_s)


def token_terms(inputs: LossInputs, p: LossParameters) -> TokenTerms:
    """The terms of each token; ignores `inputs.weights` and the aggregation."""
    rows = Completions(inputs)
    advantages = rows.per_token(inputs.advantages)
    logps = rows.keep(inputs.logps)
    old = logps if inputs.old_logps is None else rows.keep(inputs.old_logps)
    tokens = rows.sum(rows.mask.to(logps.dtype))

    raw_log_ratio = logps - old
    limit = p.log_ratio_clamp
    log_ratio = raw_log_ratio.clamp(-limit, limit)
    s = log_ratio
    if p.level != "token":
        s = rows.spread(rows.sum(log_ratio) / tokens.clamp(min=1))
    ratio = s.exp()

    factor, rollout = constant_factors(inputs, p, rows, logps, old, advantages)
    policy, d_ratio, d_logp, phi = policy_term(
        p, rows, ratio, logps, advantages, log_ratio, rollout
    )
    kl, d_kl = kl_term(p, rows, inputs.ref_logps, logps)
    return TokenTerms(
        rows=rows,
        tokens=tokens,
        log_ratio=log_ratio,
        ratio=ratio,
        unclamped=(raw_log_ratio.abs() <= limit).to(logps.dtype),
        advantages=advantages,
        factor=factor,
        rollout=rollout,
        policy=policy,
        d_ratio=d_ratio,
        d_logp=d_logp,
        phi=phi,
        kl=kl,
        d_kl=d_kl,
        correction=ratio if p.kl_bias_correction else torch.ones_like(ratio),
    )


def reference(inputs: LossInputs, p: LossParameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dloss/dlogps, dloss/dentropy, metrics in the order of `METRICS`)."""
    terms = token_terms(inputs, p)
    rows, tokens = terms.rows, terms.tokens
    weights = rows.keep(rows.spread(aggregation_weights(inputs, p, tokens)))
    grad_logps = terms.gradient(p, weights)

    policy, kl = terms.loss(p, weights)
    policy_loss = policy.sum()
    loss = policy_loss + kl.sum()
    grad_entropy = grad_logps.new_zeros(0)
    if inputs.entropy is not None and p.entropy_coef:
        grad_entropy = -p.entropy_coef * entropy_weights(inputs, p, rows, weights)
        loss = loss + (grad_entropy * rows.keep(inputs.entropy)).sum()

    metrics = _Metrics(rows, tokens)
    metrics.put("policy_loss", policy_loss)
    metrics.mean("kl", terms.kl)
    if inputs.entropy is not None:
        metrics.mean("entropy", rows.keep(inputs.entropy))
    _ratio_metrics(metrics, p, terms)
    metrics.mean("vespo_phi", terms.phi)
    metrics.mean("off_policy_kept", terms.factor.kept)
    if inputs.rollout_logps is not None:
        gap = terms.rollout.gap
        metrics.mean("rollout_gap_mean", gap.abs())
        metrics.put("rollout_gap_max", metrics.extreme(gap.abs(), 0.0, "amax"))
        metrics.mean("rollout_kl", gap.exp() - 1 - gap)
        metrics.mean("rollout_weight_mean", terms.rollout.weight)
        metrics.mean("rollout_clipped", terms.rollout.clipped.to(grad_logps.dtype))
    return loss, grad_logps, grad_entropy, metrics.vector()


def aggregation_weights(inputs: LossInputs, p: LossParameters, tokens: Tensor) -> Tensor:
    """(B,): the loss weight of a token of each completion; tokens (B,): their numbers."""
    if inputs.weights is not None:
        return inputs.weights
    aggregation = p.aggregation
    total = tokens.sum()
    if aggregation in ("token_mean", "num_items"):
        given = p.num_items if aggregation == "num_items" else 0.0
        count = total if given == 0.0 else torch.full_like(total, given)
        if inputs.denominator is not None:
            count = inputs.denominator.to(total)
        # At least 1: a call without tokens has loss 0, not nan.
        return (1.0 / count.clamp(min=1)).expand_as(tokens)
    sequences = (tokens > 0).sum().to(total) if p.exclude_empty else total * 0 + len(tokens)
    if p.num_sequences:
        sequences = torch.full_like(total, p.num_sequences)
    if inputs.denominator is not None:
        sequences = inputs.denominator.to(total)
    each = (1.0 / sequences.clamp(min=1)).expand_as(tokens)
    if aggregation == "sequence_mean":
        return each / tokens.clamp(min=1)
    return each / p.max_length if aggregation == "max_length" else each


def entropy_weights(
    inputs: LossInputs, p: LossParameters, rows: Completions, weights: Tensor
) -> Tensor:
    """The weight V_t of each token's entropy."""
    each = rows.mask.to(weights.dtype)
    if inputs.token_weights is not None:
        each = rows.keep(inputs.token_weights)
    if not p.entropy_token_mean:
        return weights * each
    total = each.sum()
    return each / torch.where(total > 0, total, torch.ones_like(total))


class _Metrics:
    """Token means and counts, collected on the device."""

    def __init__(self, rows: Completions, tokens: Tensor) -> None:
        self._rows = rows
        self._total = tokens.sum()
        self._values = {"num_tokens": self._total, "num_sequences": (tokens > 0).sum()}

    def put(self, name: str, value: Tensor) -> None:
        self._values[name] = value

    def mean(self, name: str, x: Tensor) -> None:
        self._values[name] = self._rows.keep(x).sum() / self._total.clamp(min=1)

    def extreme(self, x: Tensor, neutral: float, reduction: str) -> Tensor:
        filled = torch.where(self._rows.mask, x, torch.full_like(x, neutral)).flatten()
        # amin and amax refuse empty tensors: the neutral element makes a call without tokens legal.
        filled = torch.cat([filled, filled.new_full((1,), neutral)])
        return torch.where(self._total > 0, getattr(filled, reduction)(), 0.0)

    def vector(self) -> Tensor:
        zero = torch.zeros_like(self._total)
        return torch.stack([self._values.get(name, zero).to(self._total) for name in METRICS])


def clipped_tokens(p: LossParameters, terms: TokenTerms) -> tuple[Tensor, Tensor]:
    """Where (r is below the range with A < 0, r is above it with A > 0)."""
    low = (terms.ratio < p.ratio_low) & (terms.advantages < 0)
    high = (terms.ratio > p.ratio_high) & (terms.advantages > 0)
    return low, high


def _ratio_metrics(metrics: _Metrics, p: LossParameters, terms: TokenTerms) -> None:
    ratio, log_ratio = terms.ratio, terms.log_ratio
    metrics.mean("ratio_mean", ratio)
    metrics.put("ratio_min", metrics.extreme(ratio, math.inf, "amin"))
    metrics.put("ratio_max", metrics.extreme(ratio, -math.inf, "amax"))
    metrics.mean("approx_kl", log_ratio.exp() - 1 - log_ratio)
    if p.has_clip_range:
        low, high = clipped_tokens(p, terms)
        metrics.mean("clip_low", low.to(ratio.dtype))
        metrics.mean("clip_high", high.to(ratio.dtype))
        metrics.mean("clip_region", (low | high).to(ratio.dtype))
    over = (ratio > p.delta) & (terms.advantages < 0)
    metrics.mean("clip_delta", over.to(ratio.dtype))
