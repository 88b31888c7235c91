"""Log-probs and entropy of rows of logits in the dtypes that other trainers' functions return."""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops import gather_logprobs


def row_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probs of `labels` under softmax of `logits` (..., V).

    labels: (..., K), or one a row in any shape of as many integers: the result is then (...).
    out_dtype: None gives float32, float64 for float64 logits.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    several = labels.ndim == logits.ndim
    logps = gather_logprobs(
        logits,
        labels if several else labels.reshape(logits.shape[:-1]),
        inplace_backward=inplace_backward,
        out_dtype=wide,
    ).logps
    # Always a copy: the backward pass keeps the original, and trainers write into results.
    return logps.to(out_dtype or wide, copy=True)


def row_entropy(logits: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Entropy (...) in nats of softmax(logits), differentiable; in the logits' dtype by default."""
    labels = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    out = gather_logprobs(logits, labels, entropy=True, out_dtype=out_dtype or logits.dtype)
    assert out.entropy is not None
    return out.entropy
