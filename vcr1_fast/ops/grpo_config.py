"""Options of the GRPO loss: what each variant computes is written in `grpo_reference.py`.

Symbols used below, for a completion b and its token t (tokens outside the mask never count):

    x_t = logp_t - old_t            log-ratio between the policy and the one that sampled
    r   = exp(x_t)                  level "token"
    r   = exp(mean_t x_t)           level "sequence"  (GSPO: one ratio for the completion)
    r   = the sequence's value, but with the gradient of its own token   level "sequence_token"
    A   = the advantage of the completion, or of the token
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vcr1_fast.ops.grpo_checks import check_numbers

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence", "sequence_token")
KL_KINDS = ("k1", "k2", "k3", "abs")
AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum", "max_length", "num_items")
ROLLOUT_CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "token_icepop",
    "sequence_truncate",
    "sequence_mask",
    "sequence_icepop",
)
ENTROPY_AGGREGATIONS = ("loss", "token_mean")
CISPO_BOUNDS = ("absolute", "relative")

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
DEFAULT_AGGREGATION = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "max_length",
    "dapo": "num_items",
    "cispo": "num_items",
    "vespo": "num_items",
}


@dataclass(frozen=True)
class GRPOLossConfig:
    """Options of `grpo_loss` and `linear_grpo_loss`.

    Policy term of a token, by `loss_type`:
        grpo, bnpo, dr_grpo, dapo, luspo   -min(min(r, delta) A, clip(r, 1-eps_low, 1+eps_high) A)
        cispo    -stop(clip(r, bounds)) A logp
        sapo     -A 4 sigmoid(tau (r - 1)) / tau, tau by the sign of A
        vespo    -stop(exp(lambda + k log w - lambda w)) A logp, log w = sum over the completion
                 of x_t and of the log rollout correction, kept within [log 1e-8, 20]

    How tokens are averaged, by `aggregation` (None takes the loss type's own, in brackets), with
    n_b the tokens of completion b and B the completions (or `num_sequences`):
        sequence_mean  sum_t / n_b, then mean over B   (grpo, sapo)
        token_mean     sum over all / number of tokens of this call   (bnpo)
        sequence_sum   sum_t, then mean over B   (luspo)
        max_length     sum over all / (B max_length)   (dr_grpo)
        num_items      sum over all / num_items; None: this call's tokens  (dapo, cispo, vespo)

    ValueError for an unknown name, for a number that is NaN, infinite or out of its range (None is
    "no bound" where it is allowed), and for options that do not go together.

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        level: where the ratio is taken, one of `LEVELS`; vespo demands "token".
        eps_low, eps_high: clip range. For cispo see `cispo_bounds`.
        delta: upper bound of the unclipped ratio (two-sided clipping). With delta >= 1 + eps_high
            it is the dual clip of PPO with that constant. Only for the clipped losses.
        beta: weight of the KL term against `ref_logps`.
        kl: estimator, with d = ref - logp: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1, abs = |d|.
        kl_input_clamp: d is kept within +-this, with zero gradient outside. None: unbounded.
        kl_output_clamp: the estimator is kept within +-this, with zero gradient outside.
        kl_bias_correction: multiply the estimator by r (and differentiate through r).
        kl_straight_through: the estimator's value with the gradient of k2 (verl's "k3+").
        log_ratio_clamp: x_t is kept within +-this, with zero gradient outside, so that no ratio
            overflows. None is TRL's behaviour: infinite losses are then possible.
        cispo_bounds: "absolute": r is cut above eps_high itself and not below (MiniMax, TRL);
            "relative": r is kept within [1 - eps_low, 1 + eps_high] (verl).
        sapo_tau_pos, sapo_tau_neg: temperatures for A > 0 and otherwise.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: for A >= 0 and otherwise.
        rollout_correction: weight of a token for the gap between the sampler's log-probs
            (`rollout_logps`) and `old_logps`, with c_t = exp(old_t - rollout_t) and
            C = exp(sum_t (old_t - rollout_t)):
              token_truncate, sequence_truncate   clip(c_t or C, rollout_min, rollout_max)
              token_mask, sequence_mask           c_t or C, 0 outside [rollout_min, rollout_max]
              token_icepop                        as token_mask, but both bounds must be given
              sequence_icepop                     c_t, 0 for the whole completion where the
                                                  geometric mean of c_t is outside the bounds
            The weight is a constant for the gradient. None: no correction.
        rollout_min, rollout_max: bounds; None is unbounded.
        rollout_after_kl: weigh the policy term plus the KL term (ms-swift), not the policy alone.
        off_policy_threshold: leave out the policy term of completions with A < 0 whose mean of
            (sampler's log-prob - logp) exceeds this (DeepSeek-V3.2). None: keep all.
        entropy_coef: the loss gets -entropy_coef times the aggregated entropy.
        entropy_aggregation: "loss": as the loss is; "token_mean": mean over this call's tokens
            (TRL). Both weigh tokens with `token_weights` where it is given.
        aggregation: one of `AGGREGATIONS`, or None.
        max_length: for "max_length": the longest completion allowed, in tokens.
        num_items: for "num_items": tokens of the whole optimiser step (divided by the number of
            processes where gradients are averaged over them). A number or a 0-d tensor.
        num_sequences: what B stands for in the table, for a step that is split into several
            calls. A number or a 0-d tensor; None is the completions of this call.
        exclude_empty: leave completions without tokens out of B where it is counted here.
    """

    loss_type: str = "grpo"
    level: str = "token"
    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_input_clamp: float | None = 20.0
    kl_output_clamp: float | None = None
    kl_bias_correction: bool = False
    kl_straight_through: bool = False
    log_ratio_clamp: float | None = 20.0
    cispo_bounds: str = "absolute"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    rollout_correction: str | None = None
    rollout_min: float | None = None
    rollout_max: float | None = None
    rollout_after_kl: bool = False
    off_policy_threshold: float | None = None
    entropy_coef: float = 0.0
    entropy_aggregation: str = "loss"
    aggregation: str | None = None
    max_length: int | None = None
    num_items: float | torch.Tensor | None = None
    num_sequences: float | torch.Tensor | None = None
    exclude_empty: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("level", self.level, LEVELS)
        _one_of("kl", self.kl, KL_KINDS)
        _one_of("cispo_bounds", self.cispo_bounds, CISPO_BOUNDS)
        _one_of("entropy_aggregation", self.entropy_aggregation, ENTROPY_AGGREGATIONS)
        _one_of("aggregation", self.resolved_aggregation, AGGREGATIONS)
        _one_of("rollout_correction", self.rollout_correction or "none", ROLLOUT_CORRECTIONS)
        if self.loss_type == "vespo" and self.level != "token":
            raise ValueError(f'vespo needs level "token", got {self.level!r}')
        if self.delta is not None and self.loss_type not in CLIPPED_LOSSES:
            raise ValueError(f"delta is for {CLIPPED_LOSSES}, not for {self.loss_type!r}")
        if self.resolved_aggregation == "max_length" and self.max_length is None:
            raise ValueError(f"{self.loss_type} averages over max_length: give it (> 0)")
        if "icepop" in (self.rollout_correction or "") and None in (
            self.rollout_min,
            self.rollout_max,
        ):
            raise ValueError(
                f"{self.rollout_correction} needs rollout_min and rollout_max, got "
                f"{self.rollout_min} and {self.rollout_max}"
            )
        low, high = self.rollout_min, self.rollout_max
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"rollout_min {low} is above rollout_max {high}")
        # Calls read this, not twenty attributes: it is not a field, and frozen only guards those.
        object.__setattr__(self, "_parameters", _encode(self))

    @property
    def resolved_aggregation(self) -> str:
        """`aggregation`, or the loss type's own."""
        return self.aggregation or DEFAULT_AGGREGATION[self.loss_type]


@dataclass(frozen=True)
class LossParameters:
    """A config as numbers, the form in which it goes through the operator and to the kernels.

    `kinds` and `values` follow `KINDS` and `VALUES`; an absent bound is an infinity and an absent
    count 0. The enumerations of csrc/grpo_loss.h repeat both orders.
    """

    kinds: tuple[int, ...]
    values: tuple[float, ...]

    def kind(self, name: str) -> int:
        return self.kinds[KINDS.index(name)]

    def value(self, name: str) -> float:
        return self.values[VALUES.index(name)]

    def replace(self, **changes: float) -> "LossParameters":
        kinds = (changes.get(name, old) for name, old in zip(KINDS, self.kinds, strict=True))
        values = (changes.get(name, old) for name, old in zip(VALUES, self.values, strict=True))
        return LossParameters(tuple(kinds), tuple(values))


KINDS = (
    "loss_type",
    "level",
    "kl",
    "aggregation",
    "rollout_correction",
    "entropy_token_mean",
    "kl_bias_correction",
    "kl_straight_through",
    "rollout_after_kl",
    "exclude_empty",
)
VALUES = (
    "ratio_low",
    "ratio_high",
    "delta",
    "beta",
    "kl_input_clamp",
    "kl_output_clamp",
    "log_ratio_clamp",
    "sapo_tau_pos",
    "sapo_tau_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "rollout_min",
    "rollout_max",
    "off_policy_threshold",
    "entropy_coef",
    "max_length",
    "num_items",
    "num_sequences",
)


def parameters(config: GRPOLossConfig) -> LossParameters:
    """The numbers of `config`; counts that are tensors are left at 0 (see `denominator`)."""
    return config._parameters


def _encode(config: GRPOLossConfig) -> LossParameters:
    kinds = (
        LOSS_TYPES.index(config.loss_type),
        LEVELS.index(config.level),
        KL_KINDS.index(config.kl),
        AGGREGATIONS.index(config.resolved_aggregation),
        ROLLOUT_CORRECTIONS.index(config.rollout_correction or "none"),
        int(config.entropy_aggregation == "token_mean"),
        int(config.kl_bias_correction),
        int(config.kl_straight_through),
        int(config.rollout_after_kl),
        int(config.exclude_empty),
    )
    absolute = config.loss_type == "cispo" and config.cispo_bounds == "absolute"
    values = (
        -math.inf if absolute else 1.0 - config.eps_low,
        config.eps_high if absolute else 1.0 + config.eps_high,
        _or_infinity(config.delta),
        config.beta,
        _or_infinity(config.kl_input_clamp),
        _or_infinity(config.kl_output_clamp),
        _or_infinity(config.log_ratio_clamp),
        config.sapo_tau_pos,
        config.sapo_tau_neg,
        config.vespo_k_pos,
        config.vespo_lambda_pos,
        config.vespo_k_neg,
        config.vespo_lambda_neg,
        -math.inf if config.rollout_min is None else config.rollout_min,
        _or_infinity(config.rollout_max),
        _or_infinity(config.off_policy_threshold),
        config.entropy_coef,
        float(config.max_length or 0),
        _count(config.num_items),
        _count(config.num_sequences),
    )
    return LossParameters(kinds, tuple(float(value) for value in values))


def denominator(config: GRPOLossConfig) -> torch.Tensor | None:
    """The count that this config's aggregation divides by, where it is a tensor."""
    aggregation = config.resolved_aggregation
    if aggregation == "token_mean":
        return None
    count = config.num_items if aggregation == "num_items" else config.num_sequences
    return count if isinstance(count, torch.Tensor) else None


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _count(value: float | torch.Tensor | None) -> float:
    return 0.0 if value is None or isinstance(value, torch.Tensor) else float(value)
