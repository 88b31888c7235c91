"""Triton kernels of `gather_logprobs`, one program a row; the formulae are in the op's own file.

Forward reads a row once. Backward reads it once and writes it once, also over itself; rows without
upstream gradient are written without being read. Everything is summed in float32 in an order that
depends on V alone, without atomics: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_fast.ops.gather_logprobs import (
    KERNEL_DTYPES,
    allocate,
    check_values,
    reference_backward,
    reference_backward_,
    reference_forward,
)

# 8 warps with 16 elements a thread: two 16-byte loads in flight each in half precision.
_LAUNCH = {"BLOCK": 4096, "LABELS": 32, "num_warps": 8, "enable_fp_fusion": True}
_ALIGNMENT = 16  # elements; what a row must be a multiple of for vector loads
_LENGTHS = ["vocab", "k", "inner", "outer_stride", "inner_stride", "grad_outer", "grad_inner"]


class _Rows(NamedTuple):
    """Inputs of the rows beside their logits; None where there is none."""

    labels: Tensor
    mask: Tensor | None
    temperature: Tensor | None


class _Results(NamedTuple):
    logps: Tensor
    entropy: Tensor | None
    lse: Tensor
    stats: Tensor


class _Upstream(NamedTuple):
    logps: Tensor
    entropy: Tensor | None
    lse: Tensor | None


class _Layout(NamedTuple):
    """Row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride, in elements."""

    inner: int
    outer_stride: int
    inner_stride: int


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride, ALIGNED: tl.constexpr):
    """Offset of a row; where rows are aligned, written so that the compiler sees it."""
    if ALIGNED:
        outer_stride = outer_stride // 16 * 16
        inner_stride = inner_stride // 16 * 16
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit(do_not_specialize=["temperature", *_LENGTHS])
def _forward_kernel(
    logits,
    rows,
    out,
    temperature,
    vocab,
    k,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LABELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + _row_start(row, inner, outer_stride, inner_stride, ALIGNED)
    if ALIGNED:
        vocab = vocab // 16 * 16
    end = vocab  # of what is read
    if rows.mask is not None:
        end = tl.where(tl.load(rows.mask + row), vocab, 0)
    if rows.temperature is not None:
        temperature = tl.load(rows.temperature + row)
    scale = 1.0 / temperature

    # Sums of e^d and d e^d with d = (x - top) / T, a lane each; top is the maximum so far.
    columns = tl.arange(0, BLOCK)
    top = tl.full([], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        x = tl.load(x_row + start + columns, mask=start + columns < end, other=float("-inf")).to(
            tl.float32
        )
        new_top = tl.maximum(top, tl.max(x, 0))
        shift_from = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        shift = (top - shift_from) * scale
        # A new maximum rescales the sums so far: one read of the row, however large its logits.
        factor = tl.exp(shift)
        d = (x - shift_from) * scale
        e = tl.exp(d)
        weighted = tl.where(factor > 0.0, factor * (weighted + shift * weight), 0.0)
        weighted += e * tl.maximum(d, -200.0)  # e is 0 there, and d may be -inf
        weight = weight * factor + e
        top = new_top

    # A masked row is not read: its results are 0, not those of an empty sum.
    live = end > 0
    total = tl.sum(weight, 0)
    log_sum = tl.where(total == 0.0, float("nan"), tl.log(total))
    mean_d = tl.sum(weighted, 0) / total
    lse = tl.where(total == 0.0, float("-inf"), top * scale + log_sum)
    tl.store(out.lse + row, tl.where(live, lse, 0.0))
    if out.entropy is not None:
        tl.store(out.entropy + row, tl.where(live, log_sum - mean_d, 0.0))
    tl.store(out.stats + row * 3, tl.where(live, top, 0.0))
    tl.store(out.stats + row * 3 + 1, tl.where(live, log_sum, 0.0))
    tl.store(out.stats + row * 3 + 2, tl.where(live, mean_d, 0.0))
    for first in range(0, k, LABELS):
        place = first + tl.arange(0, LABELS)
        label = tl.load(rows.labels + row * k + place, mask=place < k, other=0)
        known = (label >= 0) & (label < end) & (place < k)
        x = tl.load(x_row + label, mask=known, other=float("nan")).to(tl.float32)
        logp = (x - top) * scale - log_sum
        tl.store(out.logps + row * k + place, tl.where(live, logp, 0.0), mask=place < k)


@triton.jit(do_not_specialize=["temperature", *_LENGTHS])
def _backward_kernel(
    logits,
    grad,
    rows,
    upstream,
    stats,
    temperature,
    vocab,
    k,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LABELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + _row_start(row, inner, outer_stride, inner_stride, ALIGNED)
    grad_row = grad + _row_start(row, inner, grad_outer, grad_inner, ALIGNED)
    if ALIGNED:
        vocab = vocab // 16 * 16
    top, log_sum = tl.load(stats + row * 3), tl.load(stats + row * 3 + 1)
    if rows.temperature is not None:
        temperature = tl.load(rows.temperature + row)
    scale = 1.0 / temperature

    total, used = tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
    for first in range(0, k, LABELS):
        place = first + tl.arange(0, LABELS)
        g = tl.load(upstream.logps + row * k + place, mask=place < k, other=0.0)
        total += tl.sum(g, 0)
        used += tl.sum((g != 0.0).to(tl.int32), 0)
    share = -total  # what p_j is multiplied with
    if upstream.lse is not None:
        g_lse = tl.load(upstream.lse + row)
        used += (g_lse != 0.0).to(tl.int32)
        share += g_lse
    if upstream.entropy is not None:
        h = tl.load(upstream.entropy + row)
        used += (h != 0.0).to(tl.int32)
        mean_d = tl.load(stats + row * 3 + 2)
    if rows.mask is not None:
        used = tl.where(tl.load(rows.mask + row), used, 0)
    end = tl.where(used > 0, vocab, 0)  # of what is read
    count = tl.where(used > 0, k, 0)

    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        place = start + columns
        x = tl.load(x_row + place, mask=place < end, other=0.0).to(tl.float32)
        d = (x - top) * scale
        out = share
        if upstream.entropy is not None:
            out = share - h * (tl.maximum(d, -200.0) - mean_d)  # p is 0 where d may be -inf
        out = tl.exp(d - log_sum) * out
        for j in range(0, count):
            label = tl.load(rows.labels + row * k + j) - start
            if (label >= 0) & (label < BLOCK):
                g = tl.load(upstream.logps + row * k + j)
                out += tl.where(columns == label.to(tl.int32), g, 0.0)
        out = tl.where(used > 0, out * scale, 0.0)
        tl.store(grad_row + place, out.to(grad.dtype.element_ty), mask=place < vocab)


def _layout(x: Tensor) -> _Layout | None:
    """How the rows of (..., V) lie, where two strides say it and a row's elements are adjacent."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    merged: list[tuple[int, int]] = []  # (size, stride)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *merged][-2:]
    return _Layout(inner, outer_stride, inner_stride)


def _dense(logits: Tensor) -> tuple[Tensor, _Layout]:
    """`logits` and its layout; a contiguous copy where the kernels cannot walk its strides."""
    layout = _layout(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = _layout(logits)
        assert layout is not None  # contiguous rows always merge into one dimension
    return logits, layout


def _aligned(vocab: int, *layouts: _Layout) -> bool:
    strides = [stride for layout in layouts for stride in layout[1:]]
    return all(length % _ALIGNMENT == 0 for length in (vocab, *strides))


def forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """The op `gather_logprobs`. float64 goes to the reference; rows with more than two different
    strides, or whose elements are not adjacent, are copied."""
    if logits.dtype not in KERNEL_DTYPES or logits.numel() == 0:
        return reference_forward(logits, labels, mask, row_temperature, temperature, entropy)
    check_values(labels, mask, row_temperature, logits.shape[-1])
    logits, layout = _dense(logits)
    outputs = allocate(logits, labels, entropy)
    logps, row_entropy, lse, stats = outputs
    vocab = logits.shape[-1]
    with torch.cuda.device_of(logits):
        _forward_kernel[(logits.numel() // vocab,)](
            logits,
            _Rows(labels, mask, row_temperature),
            _Results(logps, row_entropy if entropy else None, lse, stats),
            temperature,
            vocab,
            labels.shape[-1],
            *layout,
            ALIGNED=_aligned(vocab, layout),
            **_LAUNCH,
        )
    return outputs


def _run_backward(logits: Tensor, layout: _Layout, grad: Tensor, *args: Any) -> None:
    labels, _, stats, mask, row_temperature, temperature, *upstream = args
    vocab = logits.shape[-1]
    written = layout
    if grad is not logits:
        written = _Layout(layout.inner, layout.inner * vocab, vocab)
    with torch.cuda.device_of(logits):
        _backward_kernel[(logits.numel() // vocab,)](
            logits,
            grad,
            _Rows(labels, mask, row_temperature),
            _Upstream(*upstream),
            stats,
            temperature,
            vocab,
            labels.shape[-1],
            *layout,
            *written[1:],
            ALIGNED=_aligned(vocab, layout, written),
            **_LAUNCH,
        )


def backward(logits: Tensor, *args: Any) -> Tensor:
    """The op `gather_logprobs_backward`; `args` as in its schema."""
    if logits.dtype not in KERNEL_DTYPES or logits.numel() == 0:
        return reference_backward(logits, *args)
    logits, layout = _dense(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _run_backward(logits, layout, grad, *args)
    return grad


def backward_(logits: Tensor, *args: Any) -> None:
    """The op `gather_logprobs_backward_`; through a copy where `_layout` knows no layout."""
    if logits.dtype not in KERNEL_DTYPES or logits.numel() == 0:
        reference_backward_(logits, *args)
        return
    layout = _layout(logits)
    if layout is None:
        logits.copy_(backward(logits, *args))
    else:
        _run_backward(logits, layout, logits, *args)
