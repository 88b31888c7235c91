"""What `gather_logprobs` computes, in plain torch: the specification and the `reference` backend.

The formulae are in gather_logprobs.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LogProbs(NamedTuple):
    """`logps` has the shape of the labels, `entropy` (None unless asked for) and `lse` that of the
    logits without the vocabulary.

    A row of nothing but -inf is no distribution: its lse is -inf, the sum of no terms, on every
    backend, and all else of it, gradients included, is NaN. With +inf or NaN in a row lse is NaN
    too (of +inf the reference in plain torch says +inf).
    """

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> LogProbs:
    """The specification in plain torch, differentiable; computes in float32 (float64 for float64).

    Arguments as in `gather_logprobs`, but masked rows must hold valid labels and finite logits.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x / temperature[..., None] if isinstance(temperature, Tensor) else x / temperature
    log_p = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    several = labels.ndim == logits.ndim
    logps = log_p.gather(-1, labels if several else labels[..., None])
    logps = logps if several else logps[..., 0]
    # A logit at -inf has no share in the entropy: 0 * -inf would be NaN.
    row_entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    if mask is not None:
        logps = logps.masked_fill(~(mask[..., None] if several else mask), 0)
        lse = lse.masked_fill(~mask, 0)
        row_entropy = row_entropy.masked_fill(~mask, 0)
    return LogProbs(logps, row_entropy if entropy else None, lse)


# The ops take labels (..., K), mask (...) bool, row_temperature (...) float32, all contiguous.
# `stats` (..., 3) carries max x, log sum exp(z - m) and sum p (z - m) to the backward pass.


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def allocate(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    lead = logits.shape[:-1]
    dtype = _accumulator(logits)
    shapes = (labels.shape, lead if entropy else (0,), lead, (*lead, 3))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _scaled(logits, mask, row_temperature, temperature):
    """Logits less their maximum, over T, in the accumulator's dtype; the maximum; T (..., 1)."""
    x = logits.to(_accumulator(logits))
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    t = temperature if row_temperature is None else row_temperature[..., None].to(x.dtype)
    top = x.amax(-1, keepdim=True)
    return (x - top) / t, top, t


def check_values(
    labels: Tensor, mask: Tensor | None, row_temperature: Tensor | None, vocab: int
) -> None:
    """ValueError for labels or temperatures of live rows that no row can have. On the CPU only:
    elsewhere the check would synchronise."""
    if labels.device.type != "cpu":
        return
    bad = (labels < 0) | (labels >= vocab)
    if mask is not None:
        bad &= mask[..., None]
    if bad.any():
        raise ValueError(f"labels: {labels[bad][0].item()} is outside a vocabulary of {vocab}")
    if row_temperature is None:
        return
    bad = ~((row_temperature > 0) & row_temperature.isfinite())
    if mask is not None:
        bad &= mask
    if bad.any():
        raise ValueError(
            f"temperature: a row holds {row_temperature[bad][0].item()}, expected a positive one"
        )


def reference_forward(logits, labels, mask, row_temperature, temperature, entropy):
    if logits.numel() == 0:
        return allocate(logits, labels, entropy)
    check_values(labels, mask, row_temperature, logits.shape[-1])
    d, top, t = _scaled(logits, mask, row_temperature, temperature)
    log_sum = d.exp().sum(-1, keepdim=True).log()
    index = labels if mask is None else labels.masked_fill(~mask[..., None], 0)
    logps = d.gather(-1, index) - log_sum
    mean_d = ((d - log_sum).exp() * d.masked_fill(d == -torch.inf, 0)).sum(-1, keepdim=True)
    # Of nothing but -inf, where the shifted logits are NaN, -inf.
    lse = torch.where(top == -torch.inf, top, top / t + log_sum)
    out = (logps, log_sum - mean_d, lse, torch.cat([top, log_sum, mean_d], -1))
    if mask is not None:
        out = tuple(x.masked_fill(~mask[..., None], 0) for x in out)
    logps, row_entropy, lse, stats = out
    return logps, row_entropy[..., 0] if entropy else lse.new_empty(0), lse[..., 0], stats


def reference_backward(
    logits, labels, logps, stats, mask, row_temperature, temperature, grads, grad_entropy, grad_lse
):
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    d, _, t = _scaled(logits, mask, row_temperature, temperature)
    p = (d - stats[..., 1:2]).exp()
    grad = p * -grads.sum(-1, keepdim=True)
    if grad_lse is not None:
        grad += p * grad_lse[..., None]
    if grad_entropy is not None:
        shifted = d.masked_fill(d == -torch.inf, 0) - stats[..., 2:3]
        grad -= p * grad_entropy[..., None] * shifted
    index = labels if mask is None else labels.masked_fill(~mask[..., None], 0)
    grad = grad.scatter_add(-1, index, grads) / t
    dead = (grads == 0).all(-1)
    for upstream in (grad_entropy, grad_lse):
        if upstream is not None:
            dead &= upstream == 0
    if mask is not None:
        dead |= ~mask
    return grad.masked_fill(dead[..., None], 0).to(logits.dtype)


def reference_backward_(logits, *args):
    logits.copy_(reference_backward(logits, *args))
