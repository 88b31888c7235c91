"""The distribution that completions are sampled from, exactly, and sampling from it."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Decoding = Literal["auto", "dynamic", "static", "graphs"]


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled. Nothing is taken from the checkpoint's generation config.

    temperature: 0 takes the most likely token; top_k: 0 keeps all; top_p: 1 keeps all;
    max_new_tokens: the longest completion; stop: a completion also ends once its text holds one of
    these strings (checked by decoding, so leave it empty where the end-of-turn token is enough).
    decoding: how the loop runs; it does not change what is sampled, see `rollout.py`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    decoding: Decoding = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding must be one of {get_args(Decoding)}, got {self.decoding!r}")


class Sampled(NamedTuple):
    """One token a row. tokens (R,) int64; logps (R,), their log-probability under the distribution
    sampled from (0 for temperature 0); full_logps (R,), under the plain softmax of
    logits / temperature over the whole vocabulary (temperature 1 for 0), both in float32, or
    float64 for such logits; possible (R,) bool: whether there was a distribution at all; where not,
    the other fields mean nothing."""

    tokens: Tensor
    logps: Tensor
    full_logps: Tensor
    possible: Tensor


def sample(logits: Tensor, uniforms: Tensor, banned: Tensor, config: SamplingConfig) -> Sampled:
    """Sample one token a row, without waiting for the device.

    Args:
        logits: (R, V) of the model, any float dtype.
        uniforms: (R,) float64 in [0, 1): the only source of randomness.
        banned: (b,) int64 tokens of probability zero.
        config: temperature, then top-k, then top-p, each renormalised, as transformers orders them.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if config.temperature not in (0.0, 1.0):
        scores = scores / config.temperature
    full = scores.logsumexp(-1)
    allowed = scores.index_fill(-1, banned, -torch.inf)
    if config.temperature == 0:
        best, tokens = allowed.max(-1)
        return Sampled(tokens, torch.zeros_like(best), best - full, (best + full).isfinite())
    norm = allowed.logsumexp(-1)
    possible = (full + norm).isfinite()
    if config.top_k or config.top_p < 1:
        allowed = truncate(allowed, config.top_k, config.top_p)
        norm = allowed.logsumexp(-1)
    # Inverse transform sampling, summed in float64: a token without probability spans no part of
    # the line, and the last factor keeps the point left of its end.
    line = (allowed - norm[:, None]).exp().cumsum(-1, dtype=torch.float64)
    points = uniforms * line[:, -1] * (1 - 2.0**-40)
    tokens = torch.searchsorted(line, points[:, None], right=True)[:, 0]
    # Past nan lies an index outside the vocabulary.
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    chosen = allowed.gather(-1, tokens[:, None])[:, 0]
    return Sampled(tokens, chosen - norm, chosen - full, possible)


def check_possible(possible: Tensor) -> None:
    """ValueError for a row without a distribution: a logit that is nan or +inf, or nothing but -inf
    outside the banned tokens. possible: (R,) bool of `Sampled`."""
    if not bool(possible.all()):
        bad = possible.logical_not().nonzero()[:, 0].tolist()
        raise ValueError(
            f"the model's logits are nan or infinite in rows {bad[:8]} of {len(possible)}: its "
            "weights are spoiled (a learning rate too high?), or its dtype overflows"
        )


def truncate(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (R, V) with the tokens outside top-k, then outside top-p, at -inf.

    Top-k keeps ties of the k-th score. Top-p keeps the most likely tokens until their sum reaches
    `top_p`, the one that reaches it included.
    """
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # The most likely token stays whatever rounding does to its sum.
        before[:, 0] = 0
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        scores = torch.empty_like(scores).scatter_(-1, order, ordered)
    return scores
