"""The GRPO loss in plain torch, with its derivative written out: the specification of `grpo_loss`.

Shapes: logps (B, T), or (N,) packed with cu_seqlens (B + 1,). Formulae of the terms are in
`GRPOLossConfig`. With m the mask, W_t = m_t a_b the aggregation weight, s the log-ratio at the
chosen level, r = e^s, P the policy term, F the constant factors (token weight, off-policy
mask, rollout correction) and K the KL estimator:

    loss  = sum_t W_t (F_t P_t + beta K_t [r_t]) - entropy_coef sum_t V_t H_t

    dloss/dlogp_t = W_t (F_t dP_t/dlogp_t + beta dK_t/dlogp_t [r_t])             directly, and
                  + sum_u dloss/ds_u ds_u/dlogp_t,   dloss/ds_u = W_u r_u (F_u dP_u/dr + [beta K_u])

where ds_u/dlogp_t = [u = t] for token ratios, m_t / n_b inside completion b for sequence ratios
and [u = t] again for "sequence_token". The terms in [] are there with the bias correction. All
constants of the loss (old, ref, rollout log-probs, advantages, weights) get no gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.grpo_config import (
    AGGREGATIONS,
    CLIPPED_LOSSES,
    LEVELS,
    LOSS_TYPES,
    LossParameters,
)
from vcr1_fast.ops.grpo_terms import (
    Completions,
    Factors,
    LossInputs,
    Rollout,
    constant_factors,
    kl_term,
    policy_term,
)

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


class TokenTerms(NamedTuple):
    """The loss before it is summed: what each token has, whatever it weighs."""

    rows: Completions
    tokens: Tensor  # (B,): how many of each completion count
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
        kl = weights * p.value("beta") * self.factor.kl * self.kl * self.correction
        return self.rows.keep(weights * self.factor.policy * self.policy), self.rows.keep(kl)

    def gradient(self, p: LossParameters, weights: Tensor) -> Tensor:
        """Derivative of sum_t weights_t loss_t in logps."""
        beta = p.value("beta")
        direct = self.factor.policy * self.d_logp + beta * self.factor.kl * self.d_kl * (
            self.correction
        )
        through_ratio = self.factor.policy * self.d_ratio
        if p.kind("kl_bias_correction"):
            through_ratio = through_ratio + beta * self.factor.kl * self.kl
        rows = self.rows
        grad_s = rows.keep(weights * through_ratio * self.ratio)
        level = LEVELS[p.kind("level")]
        if level == "token":
            grad_s = grad_s * self.unclamped
        elif level == "sequence":
            mean = rows.spread(rows.sum(grad_s) / self.tokens.clamp(min=1))
            grad_s = mean * self.unclamped
        return rows.keep(weights * direct + grad_s)


def token_terms(inputs: LossInputs, p: LossParameters) -> TokenTerms:
    """The terms of each token; `inputs.weights` and the aggregation play no part."""
    rows = Completions(inputs)
    advantages = rows.per_token(inputs.advantages)
    logps = rows.keep(inputs.logps)
    old = logps if inputs.old_logps is None else rows.keep(inputs.old_logps)
    tokens = rows.sum(rows.mask.to(logps.dtype))

    raw_log_ratio = logps - old
    limit = p.value("log_ratio_clamp")
    log_ratio = raw_log_ratio.clamp(-limit, limit)
    level = LEVELS[p.kind("level")]
    s = log_ratio if level == "token" else rows.spread(rows.sum(log_ratio) / tokens.clamp(min=1))
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
        correction=ratio if p.kind("kl_bias_correction") else torch.ones_like(ratio),
    )


def reference(
    inputs: LossInputs, parameters: LossParameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dloss/dlogps, dloss/dentropy, metrics in the order of `METRICS`)."""
    p, terms = parameters, token_terms(inputs, parameters)
    rows, tokens = terms.rows, terms.tokens
    weights = rows.keep(rows.spread(aggregation_weights(inputs, p, tokens)))
    grad_logps = terms.gradient(p, weights)

    policy, kl = terms.loss(p, weights)
    policy_loss = policy.sum()
    loss = policy_loss + kl.sum()
    grad_entropy = grad_logps.new_zeros(0)
    if inputs.entropy is not None and p.value("entropy_coef"):
        grad_entropy = -p.value("entropy_coef") * entropy_weights(inputs, p, rows, weights)
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
    """(B,): the factor of a token of each completion in the loss; `tokens` (B,) counts them."""
    if inputs.weights is not None:
        return inputs.weights
    aggregation = AGGREGATIONS[p.kind("aggregation")]
    total = tokens.sum()
    if aggregation in ("token_mean", "num_items"):
        given = p.value("num_items") if aggregation == "num_items" else 0.0
        count = total if given == 0.0 else torch.full_like(total, given)
        if inputs.denominator is not None:
            count = inputs.denominator.to(total)
        return (1.0 / count.clamp(min=1)).expand_as(tokens)
    sequences = (tokens > 0).sum().to(total) if p.kind("exclude_empty") else total * 0 + len(tokens)
    if p.value("num_sequences"):
        sequences = torch.full_like(total, p.value("num_sequences"))
    if inputs.denominator is not None:
        sequences = inputs.denominator.to(total)
    each = (1.0 / sequences.clamp(min=1)).expand_as(tokens)
    if aggregation == "sequence_mean":
        return each / tokens.clamp(min=1)
    return each / p.value("max_length") if aggregation == "max_length" else each


def entropy_weights(
    inputs: LossInputs, p: LossParameters, rows: Completions, weights: Tensor
) -> Tensor:
    each = rows.mask.to(weights.dtype)
    if inputs.token_weights is not None:
        each = rows.keep(inputs.token_weights)
    if not p.kind("entropy_token_mean"):
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
        filled = torch.cat([filled, filled.new_full((1,), neutral)])
        return torch.where(self._total > 0, getattr(filled, reduction)(), 0.0)

    def vector(self) -> Tensor:
        zero = torch.zeros_like(self._total)
        return torch.stack([self._values.get(name, zero).to(self._total) for name in METRICS])


def clipped_tokens(p: LossParameters, terms: TokenTerms) -> tuple[Tensor, Tensor]:
    """Where (r is below the range with A < 0, r is above it with A > 0)."""
    low = (terms.ratio < p.value("ratio_low")) & (terms.advantages < 0)
    high = (terms.ratio > p.value("ratio_high")) & (terms.advantages > 0)
    return low, high


def clips(p: LossParameters) -> bool:
    """Whether the loss type has a clip range."""
    return LOSS_TYPES[p.kind("loss_type")] in (*CLIPPED_LOSSES, "cispo")


def _ratio_metrics(metrics: _Metrics, p: LossParameters, terms: TokenTerms) -> None:
    ratio, log_ratio = terms.ratio, terms.log_ratio
    metrics.mean("ratio_mean", ratio)
    metrics.put("ratio_min", metrics.extreme(ratio, math.inf, "amin"))
    metrics.put("ratio_max", metrics.extreme(ratio, -math.inf, "amax"))
    metrics.mean("approx_kl", log_ratio.exp() - 1 - log_ratio)
    if clips(p):
        low, high = clipped_tokens(p, terms)
        metrics.mean("clip_low", low.to(ratio.dtype))
        metrics.mean("clip_high", high.to(ratio.dtype))
        metrics.mean("clip_region", (low | high).to(ratio.dtype))
    over = (ratio > p.value("delta")) & (terms.advantages < 0)
    metrics.mean("clip_delta", over.to(ratio.dtype))
