"""An LM head taken in chunks of rows: the matrix products that the `linear_*` ops share.

A chunk's logits = hidden W^T + bias exist only until their gradient has been used, so memory holds
`chunk_rows` of them at a time. Matrix products are torch's; what is done to a row of logits is
`gather_logprobs`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.gather_logprobs import forward_op, inplace_backward_op

# Bytes of one chunk of logits: large enough for the matrix products to run at full rate, small
# beside the model.
_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_MAX_CHUNK_ROWS = 8192


class RowStatistics(NamedTuple):
    """What `gather_logprobs` computes of n rows: logps (n, K), entropy and lse (n,), stats (n, 3);
    entropy is (0,) unless asked for."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    stats: Tensor


class Head(NamedTuple):
    """The LM head over N rows: hidden (N, H), weight (V, H), bias (V,) or None, labels (N, K)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    row_temperature: Tensor | None
    temperature: float
    entropy: bool

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, logits) of the rows named."""
        x = self.hidden.index_select(0, rows)
        # With the bias inside the product the logits are rounded once.
        return x, torch.nn.functional.linear(x, self.weight, self.bias)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, RowStatistics]:
        """(hidden, logits, what `gather_logprobs` says of them) of the rows named."""
        x, logits = self.logits(rows)
        statistics = forward_op(logits, *self._arguments(rows), self.entropy)
        return x, logits, RowStatistics(*statistics)

    def backward_(
        self,
        rows: Tensor,
        logits: Tensor,
        statistics: RowStatistics,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None = None,
    ) -> None:
        """Turns the logits of the rows named into their gradient; grad_logps is (n, K) or (n,)."""
        labels, *state = self._arguments(rows)
        upstream = (grad_logps.reshape(labels.shape), grad_entropy, grad_lse)
        grads = [g if g is None else g.contiguous() for g in upstream]
        inplace_backward_op(logits, labels, statistics.logps, statistics.stats, *state, *grads)

    def _arguments(self, rows: Tensor) -> tuple:
        temperatures = self.row_temperature
        if temperatures is not None:
            temperatures = temperatures.index_select(0, rows)
        return self.labels.index_select(0, rows), None, temperatures, self.temperature


class HeadGradients:
    """dhidden (N, H), dW (V, H) and dbias (V,), the latter two summed over chunks in float32.

    Those of the three that are not `needed` stay (0,) and cost nothing.
    """

    def __init__(self, head: Head, needed: list[bool]) -> None:
        self._head = head
        wide = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
        vocab = head.weight.shape[0]
        shapes = (head.hidden.shape, head.weight.shape, (vocab,))
        dtypes = (head.hidden.dtype, wide, wide)
        self.hidden, self.weight, self.bias = (
            head.hidden.new_zeros(shape if need else (0,), dtype=dtype)
            for shape, dtype, need in zip(shapes, dtypes, needed, strict=True)
        )
        self._needed = needed

    def add(self, rows: Tensor, x: Tensor, grad_logits: Tensor) -> None:
        need_hidden, need_weight, need_bias = self._needed
        if need_hidden:
            self.hidden.index_copy_(0, rows, grad_logits @ self._head.weight)
        if need_weight and x.dtype == self.weight.dtype:
            self.weight.addmm_(grad_logits.t(), x)
        elif need_weight:
            # One rounding to half precision a chunk; the sum over chunks is not rounded.
            self.weight.add_(grad_logits.t() @ x)
        if need_bias:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))


def rows_per_chunk(hidden: Tensor, weight: Tensor, chunk_rows: int | None) -> int:
    """`chunk_rows`, or for None what fits 128 MiB of logits on the CPU, 1 GiB on a GPU."""
    if chunk_rows is None:
        row_bytes = weight.shape[0] * hidden.element_size()
        fitting = _CHUNK_BYTES.get(hidden.device.type, 1 << 30) // max(row_bytes, 1)
        return min(max(fitting, 1), _MAX_CHUNK_ROWS)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    return chunk_rows


def under_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype when it is on for their device, as a linear layer would."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """ValueError unless hidden (..., H), weight (V, H), bias (V,) and integer labels (...) fit."""
    if hidden.ndim < 2 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not fit: expected "
            "(B, T, H) and (B, T), or (N, H) and (N,)"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden {hidden.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
