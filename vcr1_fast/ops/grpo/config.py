"""Options of the GRPO loss. `reference.py` has the formulae of every variant.

Symbols, for a completion b and its token t (tokens outside the mask never count):

    x_t = logp_t - old_t            log-ratio between the policy and the one that sampled
    r   = exp(x_t)                  level "token"
    r   = exp(mean_t x_t)           level "sequence"  (GSPO: one ratio per completion)
    r   = the sequence's value, with the gradient of each token   level "sequence_token"
    A   = the advantage of the completion, or of the token
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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

# A NaN weight or bound would not fail by itself: comparisons with NaN are false, so a term would be
# dropped or never clipped without an error. Each number is therefore checked: its range, and
# whether None ("no bound" or "not given") is allowed.
_ANY, _NOT_NEGATIVE, _POSITIVE = "a finite number", "finite and not negative", "finite and positive"
_RANGES = {
    "eps_low": (_NOT_NEGATIVE, False),
    "eps_high": (_NOT_NEGATIVE, False),
    "delta": (_POSITIVE, True),
    "beta": (_NOT_NEGATIVE, False),
    "kl_input_clamp": (_POSITIVE, True),
    "kl_output_clamp": (_POSITIVE, True),
    "log_ratio_clamp": (_POSITIVE, True),
    "sapo_tau_pos": (_POSITIVE, False),
    "sapo_tau_neg": (_POSITIVE, False),
    "vespo_k_pos": (_NOT_NEGATIVE, False),
    "vespo_lambda_pos": (_NOT_NEGATIVE, False),
    "vespo_k_neg": (_NOT_NEGATIVE, False),
    "vespo_lambda_neg": (_NOT_NEGATIVE, False),
    "rollout_min": (_NOT_NEGATIVE, True),
    "rollout_max": (_POSITIVE, True),
    "off_policy_threshold": (_ANY, True),
    "entropy_coef": (_ANY, False),
    "max_length": (_POSITIVE, True),
    "num_items": (_POSITIVE, True),
    "num_sequences": (_POSITIVE, True),
}


@dataclass(frozen=True)
class GRPOLossConfig:
    """Options of `grpo_loss` and `linear_grpo_loss`.

    Policy term of a token, by `loss_type`:
        grpo, bnpo, dr_grpo, dapo, luspo   -min(min(r, delta) A, clip(r, 1-eps_low, 1+eps_high) A)
        cispo    -stop(clip(r, bounds)) A logp
        sapo     -A 4 sigmoid(tau (r - 1)) / tau, tau by the sign of A
        vespo    -stop(exp(lambda + k log w - lambda w)) A logp, log w = sum over the completion
                 of x_t and of the log rollout correction, clamped to [log 1e-8, 20]

    Average over tokens, by `aggregation` (None: the default of the loss type, in brackets), with
    n_b the number of tokens of completion b and B the completions (or `num_sequences`):
        sequence_mean  sum_t / n_b, then mean over B   (grpo, sapo)
        token_mean     sum over all / number of tokens of this call   (bnpo)
        sequence_sum   sum_t, then mean over B   (luspo)
        max_length     sum over all / (B max_length)   (dr_grpo)
        num_items      sum over all / num_items; None: this call's tokens  (dapo, cispo, vespo)

    Raises ValueError for an unknown name, a number that is NaN, infinite or out of range (None is
    "no bound" where it is allowed), and options that exclude each other.

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        level: level of the ratio, one of `LEVELS`; vespo needs "token".
        eps_low, eps_high: clip range. For cispo see `cispo_bounds`.
        delta: upper bound of the unclipped ratio (two-sided clipping). With delta >= 1 + eps_high
            it is the dual clip of PPO with that constant. Only for the clipped losses.
        beta: weight of the KL term against `ref_logps`.
        kl: estimator, with d = ref - logp: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1, abs = |d|.
        kl_input_clamp: d is clamped to +-this, with zero gradient outside. None: unbounded.
        kl_output_clamp: the estimator is clamped to +-this, with zero gradient outside.
        kl_bias_correction: multiply the estimator by r (and differentiate through r).
        kl_straight_through: the estimator's value with the gradient of k2 (verl's "k3+").
        log_ratio_clamp: x_t is clamped to +-this, with zero gradient outside, so that no ratio
            overflows. None is TRL's behaviour: infinite losses are then possible.
        cispo_bounds: "absolute": r is clamped above at eps_high and not below (MiniMax, TRL);
            "relative": r is clamped to [1 - eps_low, 1 + eps_high] (verl).
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
        rollout_after_kl: the weight also applies to the KL term (ms-swift).
        off_policy_threshold: drop the policy term of completions with A < 0 whose mean of
            (sampler's log-prob - logp) exceeds this (DeepSeek-V3.2). None: keep all.
        entropy_coef: -entropy_coef times the aggregated entropy is added to the loss.
        entropy_aggregation: "loss": as the loss is; "token_mean": mean over this call's tokens
            (TRL). Both weight tokens by `token_weights` if given.
        aggregation: one of `AGGREGATIONS`, or None.
        max_length: for "max_length": the maximum completion length, in tokens.
        num_items: for "num_items": tokens of the whole optimiser step (divided by the number of
            processes where gradients are averaged over them). A number or a 0-d tensor.
        num_sequences: B in the table, for a step that is split into several calls. A number or a
            0-d tensor; None: the completions of this call.
        exclude_empty: do not count completions without tokens in B.
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
    num_items: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    exclude_empty: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("level", self.level, LEVELS)
        _one_of("kl", self.kl, KL_KINDS)
        _one_of("cispo_bounds", self.cispo_bounds, CISPO_BOUNDS)
        _one_of("entropy_aggregation", self.entropy_aggregation, ENTROPY_AGGREGATIONS)
        _one_of("aggregation", self.resolved_aggregation, AGGREGATIONS)
        _one_of("rollout_correction", self.rollout_correction or "none", ROLLOUT_CORRECTIONS)
        # vespo sums token log-ratios itself; a sequence ratio would average them first.
        if self.loss_type == "vespo" and self.level != "token":
            raise ValueError(f'vespo needs level "token", got {self.level!r}')
        if self.delta is not None and self.loss_type not in CLIPPED_LOSSES:
            raise ValueError(f"delta is for {CLIPPED_LOSSES}, not for {self.loss_type!r}")
        if self.resolved_aggregation == "max_length" and self.max_length is None:
            raise ValueError(f"{self.loss_type} averages over max_length, which is missing")
        # Without both bounds icepop would drop nothing and look as if it worked.
        if "icepop" in (self.rollout_correction or "") and None in (
            self.rollout_min,
            self.rollout_max,
        ):
            raise ValueError(
                f"{self.rollout_correction} needs rollout_min and rollout_max, got "
                f"{self.rollout_min} and {self.rollout_max}"
            )
        # Reversed bounds would drop or clamp every token without an error.
        low, high = self.rollout_min, self.rollout_max
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"rollout_min {low} is above rollout_max {high}")
        # Once, because reading thirty attributes at each call would cost more than the loss of a
        # small batch. Not fields, so `replace`, `==` and `asdict` ignore them.
        object.__setattr__(self, "_parameters", _resolve(self))
        object.__setattr__(self, "_encoded", self._parameters.encode())  # type: ignore[attr-defined]

    @property
    def resolved_aggregation(self) -> str:
        """`aggregation`, or the default of the loss type."""
        return self.aggregation or DEFAULT_AGGREGATION[self.loss_type]


@dataclass(frozen=True)
class LossParameters:
    """The options as the implementations use them: names resolved, bounds and counts as numbers.

    An absent bound is an infinity and an absent count 0. Operators take the `encode`d form and the
    kernels `native_parameters`, a C++ struct with these field names.
    """

    loss_type: str
    level: str
    kl: str
    aggregation: str
    rollout_correction: str
    entropy_token_mean: bool
    kl_bias_correction: bool
    kl_straight_through: bool
    rollout_after_kl: bool
    exclude_empty: bool
    ratio_low: float
    ratio_high: float
    delta: float
    beta: float
    kl_input_clamp: float
    kl_output_clamp: float
    log_ratio_clamp: float
    sapo_tau_pos: float
    sapo_tau_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    rollout_min: float
    rollout_max: float
    off_policy_threshold: float
    entropy_coef: float
    max_length: float
    num_items: float
    num_sequences: float

    @property
    def has_clip_range(self) -> bool:
        return self.loss_type in (*CLIPPED_LOSSES, "cispo")

    def encode(self) -> str:
        """`name=value` pairs, separated by spaces; `decode` restores every bit.

        Schemas of torch operators have no structs. Text carries the names with the values, is
        readable in compiled graphs, and means the same in another process (compile caches).
        """
        # Plain formatting: torch.compile traces it where a config is made inside a compiled region.
        return " ".join([f"{name}={getattr(self, name)!s}" for name in _FIELDS])

    def replace(self, **changes: str | bool | float) -> LossParameters:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


# Annotations are strings here, by the __future__ import. bool("False") is True: compare instead.
_PARSERS: dict[str, Callable[[str], Any]] = {"str": str, "bool": "True".__eq__, "float": float}
_FIELDS = {field.name: _PARSERS[str(field.type)] for field in dataclasses.fields(LossParameters)}


@lru_cache(maxsize=256)
def decode(encoded: str) -> LossParameters:
    """The parameters that `LossParameters.encode` wrote; ValueError unless every field is there."""
    texts = dict(pair.split("=", 1) for pair in encoded.split())
    if texts.keys() != _FIELDS.keys():
        wrong = ", ".join(sorted(texts.keys() ^ _FIELDS.keys()))
        raise ValueError(f"GRPO loss parameters: missing or unknown fields {wrong}")
    return LossParameters(**{name: _FIELDS[name](text) for name, text in texts.items()})


def parameters_of(config: GRPOLossConfig) -> LossParameters:
    """`config` as parameters; counts that are tensors are 0 (see `denominator`)."""
    parameters: LossParameters = config._parameters  # type: ignore[attr-defined]
    return parameters


def encode(config: GRPOLossConfig) -> str:
    """`config` as the operators take it: its parameters, encoded."""
    encoded: str = config._encoded  # type: ignore[attr-defined]
    return encoded


def _resolve(config: GRPOLossConfig) -> LossParameters:
    # MiniMax gives cispo's bound as the ratio itself, verl as a distance from 1.
    absolute = config.loss_type == "cispo" and config.cispo_bounds == "absolute"
    return LossParameters(
        loss_type=config.loss_type,
        level=config.level,
        kl=config.kl,
        aggregation=config.resolved_aggregation,
        rollout_correction=config.rollout_correction or "none",
        entropy_token_mean=config.entropy_aggregation == "token_mean",
        kl_bias_correction=bool(config.kl_bias_correction),
        kl_straight_through=bool(config.kl_straight_through),
        rollout_after_kl=bool(config.rollout_after_kl),
        exclude_empty=bool(config.exclude_empty),
        ratio_low=-math.inf if absolute else float(1.0 - config.eps_low),
        ratio_high=float(config.eps_high if absolute else 1.0 + config.eps_high),
        delta=_or_infinity(config.delta),
        beta=float(config.beta),
        kl_input_clamp=_or_infinity(config.kl_input_clamp),
        kl_output_clamp=_or_infinity(config.kl_output_clamp),
        log_ratio_clamp=_or_infinity(config.log_ratio_clamp),
        sapo_tau_pos=float(config.sapo_tau_pos),
        sapo_tau_neg=float(config.sapo_tau_neg),
        vespo_k_pos=float(config.vespo_k_pos),
        vespo_lambda_pos=float(config.vespo_lambda_pos),
        vespo_k_neg=float(config.vespo_k_neg),
        vespo_lambda_neg=float(config.vespo_lambda_neg),
        rollout_min=-math.inf if config.rollout_min is None else float(config.rollout_min),
        rollout_max=_or_infinity(config.rollout_max),
        off_policy_threshold=_or_infinity(config.off_policy_threshold),
        entropy_coef=float(config.entropy_coef),
        max_length=float(config.max_length or 0),
        num_items=_count(config.num_items),
        num_sequences=_count(config.num_sequences),
    )


def denominator(config: GRPOLossConfig) -> Tensor | None:
    """The count that the aggregation divides by, if it is a tensor."""
    aggregation = config.resolved_aggregation
    if aggregation == "token_mean":
        return None
    count = config.num_items if aggregation == "num_items" else config.num_sequences
    # A tensor stays out of the parameters: reading a GPU's value would wait for the device.
    return count if isinstance(count, Tensor) else None


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _count(value: float | Tensor | None) -> float:
    return 0.0 if value is None or isinstance(value, Tensor) else float(value)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _check_numbers(config: GRPOLossConfig) -> None:
    for name, (wanted, optional) in _RANGES.items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, Tensor) and name in ("num_items", "num_sequences"):
            _check_count(name, value)
        elif not _fits(value, wanted):
            alternative = " or None" if optional else ""
            raise ValueError(f"{name} must be {wanted}{alternative}, got {value!r}")


def _fits(value: object, wanted: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    number = float(value)
    if not math.isfinite(number):
        return False
    return wanted == _ANY or number > 0 or (number == 0 and wanted == _NOT_NEGATIVE)


def _check_count(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    # Reading a GPU's value would wait for the device. 0 is allowed: the loss divides by at least 1.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        number = float(value)
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be {_NOT_NEGATIVE}, got {number}")
