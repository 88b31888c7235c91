"""An LM head in chunks of rows: the matrix products that the `linear_*` functions share.

A chunk's logits = hidden W^T + bias exist only until their gradient is used, so memory holds one
chunk of them at a time, in a buffer that all chunks share. Matrix products are torch's; rows of
logits go through the ops of `gather_logprobs`.

With a soft cap c the logits are z = c tanh(x / c), x the product, and dL/dx = dL/dz (1 - tanh^2).

Sums over chunks are float32. On the CPU a product of bfloat16 matrices is rounded to bfloat16 once,
before it is added; on CUDA the product itself adds in float32. float16 would lose gradients below
6e-8, which are most of a vocabulary's: a chunk's gradients are scaled by a power of two on the way
in and by its inverse in float32 on the way out, and dhidden and dW stay float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, check_one_device, native
from vcr1_fast.ops.gather_logprobs import forward_op, inplace_backward_op
from vcr1_fast.ops.memory import available_bytes

# Bytes of logits at a time: enough rows for the matrix products to run at full rate, and for the
# sum of dW, one pass over (V, H) per chunk, to be small beside them.
_MOST_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_FREE_SHARE = 8  # of the free memory, one part in this
_MOST_ROWS = 8192
# Bytes of a tile that stays in a cache (on a GPU: whose temporaries do not matter).
_TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Largest upstream gradient of a scaled float16 chunk, as a power of two: a share of 2.4e-7 of it is
# still a normal number, and a product with the weight stays below 65504 for |W| < 128.
_HALF_EXPONENT = 8


def check_chunk_rows(chunk_rows: int | None) -> int:
    """`chunk_rows`, 0 for None (chosen at run time); ValueError unless positive."""
    if chunk_rows is None:
        return 0
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    return chunk_rows


def rows_per_chunk(hidden: Tensor, vocab: int, chunk_rows: int, *, doubled: bool = False) -> int:
    """Rows whose logits exist at a time: `chunk_rows`, unless 0.

    For 0, as many as fit an eighth of the free memory, rounded down to a power of two of bytes, and
    at most 256 MiB on the CPU or 1 GiB on a GPU; at most 8192 rows. doubled: a second tensor of the
    logits' size exists beside them.
    """
    if chunk_rows:
        return chunk_rows
    share = max(available_bytes(hidden.device) // _FREE_SHARE, 1)
    # A power of two: otherwise every change of the free memory would change the order of sums.
    budget = min(1 << share.bit_length() - 1, most_bytes(hidden.device))
    row_bytes = max(vocab * hidden.element_size() * (2 if doubled else 1), 1)
    return min(max(budget // row_bytes, 1), _MOST_ROWS)


def most_bytes(device: torch.device) -> int:
    """The most bytes of logits that exist at a time if the number of rows is not given."""
    return _MOST_BYTES.get(device.type, 1 << 30)


class RowStatistics(NamedTuple):
    """Results of the op `gather_logprobs` for n rows: logps (n, K), entropy and lse (n,), stats
    (n, 3); entropy is (0,) unless requested."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    stats: Tensor


def _gather_native(x: Tensor, rows: Tensor) -> Tensor:
    out = x.new_empty(len(rows), x.shape[1])
    native.copy_rows(from_=x, rows=rows, to=out, scatter=False)
    return out


def _scatter(x: Tensor, rows: Tensor, total: int) -> Tensor:
    return x.new_zeros(total, x.shape[1]).index_copy_(0, rows, x)


def _scatter_native(x: Tensor, rows: Tensor, total: int) -> Tensor:
    out = x.new_empty(total, x.shape[1])
    native.copy_rows(from_=x, rows=rows, to=out, scatter=True)
    return out


gather_rows_op = Op(
    "gather_rows",
    "(Tensor x, Tensor rows) -> Tensor",
    lambda x, rows: x.new_empty(len(rows), x.shape[1]),
)
scatter_rows_op = Op(
    "scatter_rows",
    "(Tensor x, Tensor rows, int total) -> Tensor",
    lambda x, rows, total: x.new_empty(total, x.shape[1]),
)
# Only CUDA has kernels: there zeros and a scatter would be two passes.
for _backend in ("reference", "cpu", "triton"):
    gather_rows_op.register(_backend, lambda x, rows: x.index_select(0, rows))
    scatter_rows_op.register(_backend, _scatter)
gather_rows_op.register("cuda", _gather_native)
scatter_rows_op.register("cuda", _scatter_native)


class Chunk(NamedTuple):
    """Rows of the head: which, hidden (n, H), logits (n, V) in the shared buffer, and dz/dx of the
    soft cap (n, V), if there is one."""

    rows: slice
    hidden: Tensor
    logits: Tensor
    slope: Tensor | None


class Head(NamedTuple):
    """The LM head over N rows, those inside the mask: hidden (N, H), weight (V, H), bias (V,) or
    None, labels (N, K); softcap 0: no cap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    row_temperature: Tensor | None
    temperature: float
    softcap: float
    entropy: bool

    def chunks(self, chunk_rows: int, *, gradient: bool) -> tuple[list[slice], Tensor]:
        """(rows of each chunk, memory for the logits of one chunk); no chunks without rows."""
        vocab, count = self.weight.shape[0], len(self.hidden)
        doubled = gradient and self.softcap != 0
        size = rows_per_chunk(self.hidden, vocab, chunk_rows, doubled=doubled)
        size = max(min(size, count), 1)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return parts, self.hidden.new_empty(size, vocab)

    def logits(self, rows: slice, buffer: Tensor, *, gradient: bool) -> Chunk:
        """Computes the logits of `rows` in `buffer`; gradient: `backward_` will follow."""
        x = self.hidden[rows]
        out = buffer[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:  # the bias inside the product: the logits are rounded once
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        slope = _cap_(out, self.softcap, gradient) if self.softcap else None
        return Chunk(rows, x, out, slope)

    def forward(self, chunk: Chunk) -> RowStatistics:
        """The log-probs and statistics of the chunk's rows."""
        return RowStatistics(*forward_op(chunk.logits, *self.arguments(chunk.rows), self.entropy))

    def backward_(
        self, chunk: Chunk, statistics: RowStatistics, *upstream: Tensor | None
    ) -> Tensor | None:
        """Overwrites a chunk's logits with their gradient.

        upstream: gradients of logps (n, K) or (n,), entropy and lse (n,); the last two optional.
        For float16 the gradient is multiplied by a power of two; returns its inverse, else None.
        """
        labels, *state = self.arguments(chunk.rows)
        given = [*upstream, None, None][:3]
        grads = [None if g is None else g.contiguous() for g in given]
        if grads[0] is not None:
            grads[0] = grads[0].reshape(labels.shape)
        inverse = None
        if chunk.logits.dtype == torch.float16:
            # A power of two: scaling and its inverse are exact, whatever the rounding between.
            scale, inverse = _half_scale(grads)
            grads = [None if g is None else g * scale for g in grads]
        inplace_backward_op(
            chunk.logits, labels, statistics.logps, statistics.stats, *state, *grads
        )
        if chunk.slope is not None:
            chunk.logits.mul_(chunk.slope)
        return inverse

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        """Labels, mask, temperatures and temperature of rows, as the ops on logits take them."""
        temperatures = self.row_temperature
        if temperatures is not None:
            temperatures = temperatures[rows]
        return self.labels[rows], None, temperatures, self.temperature


def _cap_(logits: Tensor, softcap: float, gradient: bool) -> Tensor | None:
    """Applies c tanh(x / c) in place, computed in float32; returns its derivative if `gradient`."""
    slope = torch.empty_like(logits) if gradient else None
    wide = torch.promote_types(logits.dtype, torch.float32)
    for part in _tiles(logits.shape, logits):
        tanh = logits[part].to(wide).div(softcap).tanh_()
        if slope is not None:
            slope[part] = 1 - tanh * tanh
        logits[part] = tanh.mul_(softcap)
    return slope


def _half_scale(grads: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """(scale, its inverse): the power of two that brings the largest to 2^_HALF_EXPONENT."""
    largest = torch.stack([g.abs().amax() for g in grads if g is not None]).amax()
    exponent = torch.frexp(largest.nan_to_num(0, 0, 0)).exponent.clamp(-100, 100)
    one = torch.ones_like(largest)
    shift = _HALF_EXPONENT - exponent
    return torch.ldexp(one, shift), torch.ldexp(one, -shift)


def _tiles(shape: torch.Size, like: Tensor) -> list[slice]:
    """Slices of the rows of a matrix, `_TILE_BYTES` each."""
    rows, columns = shape
    size = _TILE_BYTES.get(like.device.type, 64 << 20) // max(columns * like.element_size(), 1)
    size = max(size, 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class HeadGradients:
    """dhidden (N, H), dW (V, H) and dbias (V,) of a head, added up chunk by chunk.

    Those that are not `needed` stay (0,) and cost nothing. `chunks`: number of chunks to add; a
    single bfloat16 chunk needs no float32 sum.
    """

    def __init__(self, head: Head, needed: list[bool], chunks: int) -> None:
        self._head, self._needed, self._chunks = head, needed, chunks
        dtype = head.hidden.dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self._dtypes = gradient_dtypes(dtype)
        need_hidden, _, need_bias = needed
        shape = head.hidden.shape if need_hidden else (0,)  # every row is in a chunk
        self._hidden = head.hidden.new_empty(shape, dtype=self._dtypes[0])
        self._bias = head.weight.new_empty(0, dtype=self._wide)
        if need_bias:
            self._bias = head.weight.new_zeros(head.weight.shape[:1], dtype=self._wide)
        self._weight: Tensor | None = None
        self._tile: Tensor | None = None

    def add(self, chunk: Chunk, inverse: Tensor | None) -> None:
        """Adds the contribution of a chunk whose logits hold their gradient."""
        need_hidden, need_weight, need_bias = self._needed
        gradient = chunk.logits
        if need_hidden and inverse is None:
            torch.mm(gradient, self._head.weight, out=self._hidden[chunk.rows])
        elif need_hidden and inverse is not None:
            product = gradient @ self._head.weight
            torch.mul(product.to(self._wide), inverse, out=self._hidden[chunk.rows])
        if need_weight:
            self._add_weight(gradient, chunk.hidden, inverse)
        if need_bias:
            part = gradient.sum(0, dtype=self._wide)
            self._bias.add_(part if inverse is None else part.mul_(inverse))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of `gradient_dtypes`."""
        weight = self._weight
        if weight is None:  # not needed, or no chunk came
            shape = self._head.weight.shape if self._needed[1] else (0,)
            weight = self._head.hidden.new_zeros(shape, dtype=self._dtypes[1])
        return self._hidden, weight.to(self._dtypes[1]), self._bias

    def _add_weight(self, gradient: Tensor, x: Tensor, inverse: Tensor | None) -> None:
        whole = x.dtype == self._wide or (self._chunks == 1 and x.dtype == torch.bfloat16)
        first = self._weight is None
        if self._weight is None:
            dtype = x.dtype if whole else self._wide
            self._weight = torch.empty_like(self._head.weight, dtype=dtype)
        if whole and first:
            torch.mm(gradient.t(), x, out=self._weight)
        elif whole:
            self._weight.addmm_(gradient.t(), x)
        elif x.dtype == torch.bfloat16 and x.is_cuda:
            if first:
                torch.mm(gradient.t(), x, out_dtype=self._wide, out=self._weight)
            else:
                torch.addmm(self._weight, gradient.t(), x, out_dtype=self._wide, out=self._weight)
        else:
            self._add_in_tiles(gradient, x, inverse, first)

    def _add_in_tiles(
        self, gradient: Tensor, x: Tensor, inverse: Tensor | None, first: bool
    ) -> None:
        """Adds rounded products, or float32 products of float16, tile by tile."""
        # A tile is added while a cache holds it, and no second (V, H) tensor exists.
        assert self._weight is not None
        if inverse is not None and not x.is_cuda:
            x = x.to(self._wide)
        for part in _tiles(self._weight.shape, x):
            columns = gradient[:, part]
            if inverse is not None:
                product = _wide_product(columns.t(), x).mul_(inverse)
            else:
                if self._tile is None:
                    self._tile = torch.empty_like(self._weight[part], dtype=x.dtype)
                product = self._tile[: columns.shape[1]]
                torch.mm(columns.t(), x, out=product)
            # Adding mixed dtypes is slow: convert first.
            if first:
                self._weight[part].copy_(product)
            else:
                self._weight[part].add_(product.to(self._wide))


def _wide_product(halves: Tensor, x: Tensor) -> Tensor:
    """halves @ x in float32; x is float32 already except on CUDA."""
    if x.is_cuda:
        return torch.mm(halves, x, out_dtype=torch.float32)
    return halves.to(x.dtype) @ x


def gradient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """dtypes of dhidden, dW and dbias for a head in `dtype`."""
    # float32 for float16, because a loss scaler may still multiply the gradient; for the bias,
    # because it is a sum over all rows and small.
    wide = torch.promote_types(dtype, torch.float32)
    return (wide, wide, wide) if dtype == torch.float16 else (dtype, dtype, wide)


def empty_gradients(
    hidden: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors as `HeadGradients.results` returns them, unfilled: for fakes."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = gradient_dtypes(hidden.dtype)
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, need, dtype in zip(shapes, needed, dtypes, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


def under_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype if it is on for their device, as a linear layer casts them;
    ValueError where they are on several devices."""
    check_one_device("hidden", hidden, weight=weight, bias=bias)
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def check_softcap(softcap: float | None) -> float:
    """`softcap` as the ops take it, 0 for None; ValueError unless positive and finite."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    return float(softcap)


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
