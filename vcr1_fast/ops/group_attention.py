"""Attention over packed sequences: completions share the keys and values of their prompt.

The rows of a packed sequence are cut into parts. The queries i in [row, end) of a part attend to
the keys

    [prefix, prefix_end)  and  [row, i]

so a prompt is a part without a prefix, and the prefix of a completion is its prompt. Where the
prompt ran in an earlier pass, `prefix` brings its keys and values, prefixes count their rows, and
the sequence holds completions alone. With scores
s_ij = scale q_i k_j over the keys that i attends to, and P = softmax(s):

    out_i = sum_j P_ij v_j,   lse_i = log sum_j e^s_ij

and backward, with dO the gradient of out and delta_i = dO_i out_i (Dao et al., arXiv 2205.14135,
algorithm 4):

    dV = P^T dO,   dS = P (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q

The CPU kernel passes over each block of 32 queries once, a tile of 64 keys at a time: scores and
probabilities stay in the cache, one query in each lane of a vector. The backward pass recomputes
the scores: five products, where the forward pass has two. Keys and values are copied once, to dense
rows that all completions read, and nothing of size (rows x rows) is in memory. float64 is computed
in float64, everything else in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native

MAX_DIM = 256  # of a head, on the CPU: the kernel's `kGroupAttentionMaxDim`
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Least number of tasks of the backward pass. Each sums gradients of keys and values in separate
# memory of their size: no atomics, and the same bits for every number of threads.
_TASKS = 8


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exactly(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` without autocast, which would compute its products in half precision."""

    @functools.wraps(reference)
    def run(query: Tensor, *args: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return reference(query, *args)

    return run


@_exactly
def group_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), part by part; arguments as in `group_attention`."""
    key, value, before = _behind(prefix_key, key, prefix_value, value)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full((query.shape[1], len(query)), -torch.inf, dtype=_accumulated(query))
    for rows, keys, seen in _pieces(parts, before, query.device):
        q, k, v = _heads(query, rows), _heads(key, keys), _heads(value, keys)
        scores = (_product(q, k.mT) * scale).masked_fill(~seen, -torch.inf)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = _product(scores.softmax(-1), v).transpose(0, 1).to(out.dtype)
    return out, lse


@_exactly
def group_attention_backward_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    parts: Tensor,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the prefix's, by the equations above."""
    key, value, before = _behind(prefix_key, key, prefix_value, value)
    grads = [
        torch.zeros(x.shape, dtype=_accumulated(x), device=x.device) for x in (query, key, value)
    ]
    for rows, keys, seen in _pieces(parts, before, query.device):
        q, k, v = _heads(query, rows), _heads(key, keys), _heads(value, keys)
        d_out, of_out = _heads(grad, rows), _heads(out, rows)
        p = (_product(q, k.mT) * scale - lse[:, rows, None]).exp().masked_fill(~seen, 0.0)
        d_scores = p * (_product(d_out, v.mT) - (d_out * of_out).sum(-1, keepdim=True)) * scale
        grads[0][rows] = _product(d_scores, k).transpose(0, 1)
        for whole, part in (
            (grads[1], _product(d_scores.mT, q)),
            (grads[2], _product(p.mT, d_out)),
        ):
            # Over the query heads that share a key head.
            shared = part.unflatten(0, (key.shape[1], -1)).sum(1)
            whole.index_add_(0, keys, shared.transpose(0, 1))
    grad_query, grad_key, grad_value = (x.to(query.dtype) for x in grads)
    # Copies: an operator must not return two views of one tensor.
    if prefix_key is None:
        return grad_query, grad_key, grad_value, query.new_empty(0), query.new_empty(0)
    of_prefix_key, of_key = (x.clone() for x in (grad_key[:before], grad_key[before:]))
    of_prefix_value, of_value = (x.clone() for x in (grad_value[:before], grad_value[before:]))
    return grad_query, of_key, of_value, of_prefix_key, of_prefix_value


def _behind(
    prefix_key: Tensor | None, key: Tensor, prefix_value: Tensor | None, value: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Keys and values with the prefix's rows before them, and how many these are."""
    if prefix_key is None or prefix_value is None:
        return key, value, 0
    both = torch.cat([prefix_key, key]), torch.cat([prefix_value, value])
    return *both, len(prefix_key)


def _pieces(
    parts: Tensor, before: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each part: its rows, the keys (m,) that they attend to, and the mask (rows, m) bool;
    keys counted with the `before` rows of a separate prefix."""
    # One comparison of numbers is the mask: the prefix lies before the part's rows.
    for row, end, prefix, prefix_end in parts.tolist():
        stretches = ((prefix, prefix_end), (before + row, before + end))
        keys = torch.cat([torch.arange(a, b, device=device) for a, b in stretches])
        queries = torch.arange(before + row, before + end, device=device)[:, None]
        yield slice(row, end), keys, keys <= queries


def _heads(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Select rows of (N, heads, D) as (heads, rows, D), in the precision of the reference."""
    return x[rows].transpose(0, 1).to(_accumulated(x))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where consecutive heads of a share a head of b."""
    # Copies of the shared heads: the reference may be slow, a reshape would be harder to check.
    return a @ b.repeat_interleave(len(a) // len(b), dim=0)


def _scratch(query: Tensor, key: Tensor, prefix_key: Tensor | None, tasks: int) -> Tensor:
    rows, kv_heads, dim = key.shape
    rows += 0 if prefix_key is None else len(prefix_key)
    size = native.group_attention_scratch(rows, kv_heads, dim, tasks)
    return query.new_empty(size, dtype=_accumulated(query))


def _new(query: Tensor, parts: Tensor) -> Tensor:
    """Output memory for the queries; the kernel writes only those in a part."""
    # Zeroing costs a pass over the output, so it is done only for queries that are in no part.
    covered = int((parts[:, 1] - parts[:, 0]).sum())
    new = query.new_empty if covered == len(query) else query.new_zeros
    return new(query.shape)


def _dense_rows(x: Tensor) -> Tensor:
    # The kernel reads a head's D values as one stretch. Rows and heads may have any distance: views
    # of a fused projection need no copy.
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 or x.numel() == 0 else x.contiguous()


def _dense_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _dense_rows(x)


def _forward_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = _new(query, parts)
    lse = query.new_full((query.shape[1], len(query)), -torch.inf, dtype=_accumulated(query))
    native.group_attention(
        query=_dense_rows(query),
        key=_dense_rows(key),
        value=_dense_rows(value),
        prefix_key=_dense_or_none(prefix_key),
        prefix_value=_dense_or_none(prefix_value),
        parts=parts,
        scale=scale,
        out=out,
        lse=lse,
        scratch=_scratch(query, key, prefix_key, 0),
        num_threads=torch.get_num_threads(),
    )
    return out, lse


def _backward_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    parts: Tensor,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_query = _new(query, parts)
    grad_key, grad_value = (x.new_empty(x.shape) for x in (key, value))
    of_prefix = _empty_like_prefix(query, prefix_key, prefix_value)
    given = [None if prefix_key is None else x for x in of_prefix]
    # Per key head, so that all heads together make at least `_TASKS`.
    tasks = -(-_TASKS // key.shape[1])
    native.group_attention_backward(
        query=_dense_rows(query),
        key=_dense_rows(key),
        value=_dense_rows(value),
        prefix_key=_dense_or_none(prefix_key),
        prefix_value=_dense_or_none(prefix_value),
        parts=parts,
        scale=scale,
        out=out,
        lse=lse,
        grad=_dense_rows(grad),
        grad_query=grad_query,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_prefix_key=given[0],
        grad_prefix_value=given[1],
        scratch=_scratch(query, key, prefix_key, tasks),
        tasks=tasks,
        num_threads=torch.get_num_threads(),
    )
    return grad_query, grad_key, grad_value, of_prefix[0], of_prefix[1]


def _empty_like_prefix(query: Tensor, *prefix: Tensor | None) -> list[Tensor]:
    """Memory for the prefix's gradients; without a prefix nothing, since an operator cannot return
    None."""
    return [query.new_empty(0) if x is None else x.new_empty(x.shape) for x in prefix]


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, parts: Tensor, scale: float, *_: Any
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=_accumulated(query))
    return query.new_empty(query.shape), lse


def _fake_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    parts: Tensor,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, ...]:
    own = (x.new_empty(x.shape) for x in (query, key, value))
    return *own, *_empty_like_prefix(query, prefix_key, prefix_value)


_forward = Op(
    "group_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor parts, float scale, "
    "Tensor? prefix_key=None, Tensor? prefix_value=None) -> (Tensor, Tensor)",
    _fake_forward,
    on_cpu=("parts",),
)
_forward.register("reference", group_attention_reference)
_forward.register("cpu", _forward_cpu)
_backward = Op(
    "group_attention_backward",
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad, Tensor parts, "
    "float scale, Tensor? prefix_key=None, Tensor? prefix_value=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    on_cpu=("parts",),
)
_backward.register("reference", group_attention_backward_reference)
_backward.register("cpu", _backward_cpu)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: Tensor,
        scale: float,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, parts, scale, prefix_key, prefix_value)
        ctx.save_for_backward(query, key, value, out, lse, parts, prefix_key, prefix_value)
        ctx.scale = scale
        # The backward kernel takes no gradient of lse.
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_lse: None) -> Any:
        *saved, parts, prefix_key, prefix_value = ctx.saved_tensors
        *own, grad_prefix_key, grad_prefix_value = _backward(
            *saved, grad, parts, ctx.scale, prefix_key, prefix_value
        )
        if prefix_key is None:
            return *own, None, None, None, None
        return *own, None, None, grad_prefix_key, grad_prefix_value


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor | Sequence[Sequence[int]],
    *,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of a packed sequence over the keys of their parts.

    query: (N, H, D); key, value: (N, heads, D); heads divides H, and consecutive query heads share
        a key head; float64, float32, bfloat16 or float16 of one dtype, any strides; D >= 1, and on
        the CPU up to MAX_DIM.
    parts: (n, 4) int64 on the CPU, or four numbers each: row, end, prefix, prefix_end, see above.
        Rows rise, and a prefix ends at or before its part's first row.
    scale: of the scores, usually 1 / sqrt(D).
    prefix: keys and values (P, heads, D) of an earlier pass, to whose rows all prefixes then refer;
        they are read where they lie and get gradients.
    Returns out (N, H, D) in the inputs' dtype, zero for queries in no part, and the log-sum-exps of
    the scores (H, N), float32 or float64, -inf for queries in no part. out is differentiable once;
    lse is not. A value that is not finite may spoil its part and neighbours with the same prefix.
    Raises ValueError for other shapes and dtypes, and for parts that overlap or exceed N.
    """
    if not isinstance(parts, Tensor):
        parts = _as_tensor(parts)
    _check(query, key, value, parts)
    if prefix is not None:
        _check_prefix(key, *prefix)
    if not torch.compiler.is_compiling():  # a traced tensor has no values; the binding checks again
        _check_parts(parts, len(query), None if prefix is None else len(prefix[0]))
    return _GroupAttention.apply(
        query, key, value, parts.contiguous(), float(scale), *(prefix or (None, None))
    )


def _as_tensor(parts: Sequence[Sequence[int]]) -> Tensor:
    for part in parts:
        if len(part) != 4 or not all(isinstance(x, int) for x in part):
            raise ValueError(f"a part is four whole numbers, got {part!r}")
    return torch.tensor(list(parts), dtype=torch.int64, device="cpu").view(-1, 4)


def _check(query: Tensor, key: Tensor, value: Tensor, parts: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if any(len(shape) != 3 for shape in shapes) or shapes[1] != shapes[2]:
        raise ValueError(
            f"query, key and value must be (N, heads, D) each, the last two alike; got {shapes}"
        )
    if query.shape[::2] != key.shape[::2] or query.shape[2] == 0:
        raise ValueError(f"query and key must agree in N and D >= 1, got {shapes[0]}, {shapes[1]}")
    if 0 in (query.shape[1], key.shape[1]) or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"heads must divide H, both at least 1; got {key.shape[1]}, {query.shape[1]}"
        )
    if len({x.device for x in (query, key, value)}) > 1:
        devices = [str(x.device) for x in (query, key, value)]
        raise ValueError(f"query, key and value must be on one device, got {devices}")
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in _DTYPES:
        raise ValueError(f"query, key and value must be of one dtype of {_DTYPES}, got {dtypes}")
    if parts.dtype != torch.int64 or parts.dim() != 2 or parts.shape[1] != 4:
        raise ValueError(f"parts must be int64 (n, 4), got {parts.dtype} {tuple(parts.shape)}")
    if parts.device.type != "cpu":
        raise ValueError(f"parts must be on the CPU, got {parts.device}")


def _check_prefix(key: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> None:
    for name, x in (("prefix keys", prefix_key), ("prefix values", prefix_value)):
        if x.dim() != 3 or x.shape[1:] != key.shape[1:] or len(x) != len(prefix_key):
            raise ValueError(
                f"{name} must be (P, {key.shape[1]}, {key.shape[2]}), P the same for both; got "
                f"{tuple(x.shape)} beside {len(prefix_key)} rows of keys"
            )
        if x.dtype != key.dtype or x.device != key.device:
            raise ValueError(
                f"{name} must be {key.dtype} on {key.device} as the keys are, got {x.dtype} on "
                f"{x.device}"
            )


def _check_parts(parts: Tensor, rows: int, prefix_rows: int | None) -> None:
    before = 0
    for i, part in enumerate(parts.tolist()):
        row, end, prefix, prefix_end = part
        limit = row if prefix_rows is None else prefix_rows
        if not (before <= row < end <= rows and 0 <= prefix <= prefix_end <= limit):
            where = "its part's first row" if prefix_rows is None else f"{prefix_rows} rows"
            raise ValueError(
                f"part {i} is {part}: rows must rise within {rows}, and a prefix end at or before "
                f"{where}"
            )
        before = end
