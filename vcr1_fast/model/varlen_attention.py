"""Attention over groups that share their prompts, by two calls of torch's varlen flash kernels.

A varlen call takes many pieces of a sequence at once, each with its queries and its keys, and no
mask. A layer needs two, whatever the number of groups and completions:

    own part      every prompt and every completion on itself, causal
    prompt part   a group's completions, as one piece of queries, on its prompt, all of it

A completion's rows are in both parts: their outputs and log-sum-exps are merged, and each part's
backward kernel gets the merged ones (`attention.py` has the formulas). In the last layer, where of
a prompt only its last row is used, the prompt part takes that row with the completions, and the own
part has the completions alone.

The kernels are `aten::_flash_attention_forward` and `_backward`, for CUDA in half precision.
`torch.nn.attention.varlen` calls the same ones, but its backward pass ignores the gradient of the
log-sum-exp: a merge through autograd would be silently wrong. They are not part of torch's public
interface, so `missing_varlen` compares them with a dense softmax before they are used. On the CPU
plain operators stand in for them (`plain_varlen_forward`), in any dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.model.packing import Span, token_owners
from vcr1_fast.model.partial_attention import plain_backward, plain_forward
from vcr1_fast.model.prompt_state import Suffix

Rows = slice | Tensor  # of a tensor's first dimension; indices are int64
# Parameters of the kernels that are given here, all by name; others must have a default.
_FORWARD = {
    "query",
    "key",
    "value",
    "cum_seq_q",
    "cum_seq_k",
    "max_q",
    "max_k",
    "dropout_p",
    "is_causal",
    "return_debug_mask",
    "scale",
}
_BACKWARD = (_FORWARD - {"return_debug_mask"}) | {
    "grad_out",
    "out",
    "logsumexp",
    "rng_state",
    "unused",
}


@dataclass(frozen=True, eq=False)
class Part:
    """One varlen call: piece i has the queries edges[0][i] .. edges[0][i + 1] - 1 of `queries` and
    the keys edges[1][i] .. edges[1][i + 1] - 1 of `keys`.

    queries: among the rows that the layer computes; keys: among all rows; edges: int32
    (pieces + 1,) on the device; longest: bounds of a piece's queries and keys.
    """

    queries: Rows
    keys: Rows
    edges: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    causal: bool


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """The calls of one layer.

    rows: those whose output is computed, all N or, in the last layer, those that are used; first:
    covers each of them; second: covers some of them, with other keys, or None; seed: uint64 (2,),
    of the dropout, which there is none of.
    """

    rows: Rows
    first: Part
    second: Part | None
    seed: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], is_last: bool) -> "VarlenLayout":
        """For groups that lie one behind another, from row 0 on; ValueError for gaps."""
        device, size = spans[0].device, spans[-1].end
        starts = [0, *(span.end for span in spans)]
        if [span.start for span in spans] != starts[:-1]:
            raise ValueError(f"groups start at {[s.start for s in spans]}, end at {starts[1:]}")
        # Only groups with completions have queries for the prompt part: a piece without queries
        # would leave the gradients of its keys to the kernel's care.
        asking = [span for span in spans if span.lengths]
        answers = [(span.middle, span.end) for span in asking]
        seed = torch.zeros(2, dtype=torch.uint64, device=device)
        if is_last:
            # One row more for each group: the prompt's last, which sees the whole prompt as the
            # completions do.
            counts = [1 + span.end - span.middle for span in spans]
            first = Part(
                slice(0, sum(counts)),
                _rows([(span.start, span.middle) for span in spans], device),
                (_edges(counts, device), _edges([span.prompt for span in spans], device)),
                (_bound(counts), _bound([span.prompt for span in spans])),
                False,
            )
            second = None
            if asking:
                ends = list(accumulate(counts))
                placed = zip(ends, spans, strict=True)
                own = [length for span in spans for length in span.lengths]
                edges = _edges(own, device)
                second = Part(
                    _rows([(e - s.end + s.middle, e) for e, s in placed if s.lengths], device),
                    _rows(answers, device),
                    (edges, edges),
                    (_bound(own), _bound(own)),
                    True,
                )
            used = [(span.middle - 1, span.end) for span in spans]
            return cls(_rows(used, device), first, second, seed)
        every = slice(0, size)
        pieces = [length for span in spans for length in (span.prompt, *span.lengths)]
        edges = _edges(pieces, device)
        first = Part(every, every, (edges, edges), (_bound(pieces), _bound(pieces)), True)
        second = None
        if asking:
            counts = [span.end - span.middle for span in asking]
            prompts = [span.prompt for span in asking]
            second = Part(
                _rows(answers, device),
                _rows([(span.start, span.middle) for span in asking], device),
                (_edges(counts, device), _edges(prompts, device)),
                (_bound(counts), _bound(prompts)),
                False,
            )
        return cls(every, first, second, seed)


def _bound(lengths: Sequence[int]) -> int:
    """Of pieces; at least 2, since the kernels reshape a call of single queries."""
    return max(2, *lengths)


def _edges(lengths: Sequence[int], device: torch.device) -> Tensor:
    return _on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def _rows(ranges: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    """Rows of these ranges: a slice, which costs no copy, where each starts at the end of the one
    before it, as for a single group."""
    if all(end == start for (_, end), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return _on_device(torch.cat([torch.arange(*one) for one in ranges]), device)


def _on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device: the vision encoder may still be running there."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def varlen_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool = False,
) -> Tensor:
    """query (1, H, N, D), key and value (1, heads, N, D), heads dividing H; returns (1, N, H, D).

    is_last: of a prompt only the last token's row is used afterwards; the others are zero.
    """
    # All layers of a pass get the same spans: the layout is made once and dropped with them.
    place = ("varlen", is_last, *((span.start, span.prompt, span.lengths) for span in spans))
    layout = spans[0].cache.get(place)
    if layout is None:
        if spans[-1].end != query.shape[2]:
            end, rows = spans[-1].end, query.shape[2]
            raise ValueError(f"groups end at row {end}, the sequence has {rows}")
        layout = spans[0].cache[place] = VarlenLayout.of(spans, is_last)
    # `squeeze`: the gradient of an index would be a copy into zeros.
    q, k, v = (_dense_rows(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
    return _VarlenParts.apply(q, k, v, scaling, layout)[None]


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read a head's D numbers as one vector; other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Saved(NamedTuple):
    """What a layer's backward kernels read: rows that are computed, all keys, merged results."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    seed: Tensor


class _VarlenParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, layout: VarlenLayout
    ) -> Tensor:
        used = _take(q, layout.rows)
        out, lse = _forward(used, k, v, layout.first, scaling)
        if layout.second is not None:
            other = _forward(used, k, v, layout.second, scaling)
            merge_into(out, lse, layout.second.queries, other)
        ctx.save_for_backward(used, k, v, out, lse)
        ctx.scaling, ctx.layout = scaling, layout
        return _whole(out, layout.rows, len(q))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        used, k, v, out, lse = ctx.saved_tensors
        layout, size = ctx.layout, len(grad)
        # Both kernels get the merged out and lse: e^(score - lse) is then the whole's probability
        # of a key, each part yields the whole's gradients of its keys, and those of a query add up.
        saved = _Saved(_take(grad, layout.rows), used, k, v, out, lse, layout.seed)
        of_query, of_key, of_value = _backward(saved, layout.first, ctx.scaling)
        of_key, of_value = (_whole(x, layout.first.keys, size) for x in (of_key, of_value))
        if layout.second is not None:
            more = _backward(saved, layout.second, ctx.scaling)
            _add(of_query, layout.second.queries, more[0])
            _add(of_key, layout.second.keys, more[1])
            _add(of_value, layout.second.keys, more[2])
        return _whole(of_query, layout.rows, size), of_key, of_value, None, None


def varlen_suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, suffix: Suffix, layer: int
) -> Tensor:
    """Attention of a group's completions to their prompt's keys and values, which an earlier pass
    recorded in `layer`, and to their own. query (1, H, S, D), key and value (1, heads, S, D);
    returns (1, S, H, D)."""
    layout = suffix.span.cache.get("varlen suffix")
    if layout is None:
        layout = suffix.span.cache["varlen suffix"] = SuffixLayout.of(suffix.span)
    tensors = (query, key, value, *suffix.state.layers[layer])
    q, k, v, pk, pv = (_dense_rows(x.squeeze(0).transpose(0, 1)) for x in tensors)
    return _VarlenSuffix.apply(q, k, v, pk, pv, scaling, layout)[None]


@dataclass(frozen=True, eq=False)
class SuffixLayout:
    """The two calls of one layer: completions on themselves, and, as one piece, on the prompt."""

    own: Part
    prompt: Part
    seed: Tensor

    @classmethod
    def of(cls, span: Span) -> "SuffixLayout":
        lengths, size, device = span.lengths, sum(span.lengths), span.device
        every = slice(0, size)
        edges = _edges(lengths, device)
        own = Part(every, every, (edges, edges), (_bound(lengths), _bound(lengths)), True)
        prompt = Part(
            every,
            slice(0, span.prompt),
            (_edges([size], device), _edges([span.prompt], device)),
            (_bound([size]), _bound([span.prompt])),
            False,
        )
        return cls(own, prompt, torch.zeros(2, dtype=torch.uint64, device=device))


class _VarlenSuffix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        scaling: float,
        layout: SuffixLayout,
    ) -> Tensor:
        out, lse = _forward(q, k, v, layout.own, scaling)
        on_prompt = _forward(q, prefix_key, prefix_value, layout.prompt, scaling)
        merge_into(out, lse, layout.own.queries, on_prompt)
        ctx.save_for_backward(q, k, v, out, lse, prefix_key, prefix_value)
        ctx.scaling, ctx.layout = scaling, layout
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, prefix_key, prefix_value = ctx.saved_tensors
        layout = ctx.layout
        # Both kernels get the merged out and lse, as in `_VarlenParts`.
        saved = _Saved(grad, q, k, v, out, lse, layout.seed)
        of_query, of_key, of_value = _backward(saved, layout.own, ctx.scaling)
        saved = saved._replace(k=prefix_key, v=prefix_value)
        more, *of_prefix = _backward(saved, layout.prompt, ctx.scaling)
        return of_query.add_(more), of_key, of_value, *of_prefix, None, None


def merge_into(out: Tensor, lse: Tensor, rows: Rows, other: tuple[Tensor, Tensor]) -> None:
    """Merge a part over `rows`, (out (S, H, D), lse (H, S)), into out (N, H, D) and lse (H, N).

    With L the merged log-sum-exp, e^(other_lse - L) = sigmoid(other_lse - lse).
    """
    other_out, other_lse = other
    mine = _take(lse.t(), rows)
    share = torch.sigmoid(other_lse.t() - mine)[..., None]
    # In float32 until the last copy: two roundings of half-precision sums would cost a bit.
    merged = (_take(out, rows) * (1 - share)).addcmul_(other_out, share)
    _put(out, rows, merged)
    _put(lse.t(), rows, torch.logaddexp(mine, other_lse.t()))


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values.to(x.dtype))


def _add(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows].add_(values)  # `+=` would copy the sum onto itself
    else:
        x.index_add_(0, rows, values)  # rows differ: the order of additions is no matter


def _whole(x: Tensor, rows: Rows, size: int) -> Tensor:
    """`x`, of these out of `size` rows, with zeros as the other rows."""
    if len(x) == size:
        return x
    whole = x.new_zeros(size, *x.shape[1:])
    _put(whole, rows, x)
    return whole


def _forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scaling: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a part, for its queries among `q` and its keys among `k`."""
    run = plain_varlen_forward
    if q.device.type != "cpu":
        run = torch.ops.aten._flash_attention_forward.default
    out, lse, *_ = run(
        query=_take(q, part.queries),
        key=_take(k, part.keys),
        value=_take(v, part.keys),
        cum_seq_q=part.edges[0],
        cum_seq_k=part.edges[1],
        max_q=part.longest[0],
        max_k=part.longest[1],
        dropout_p=0.0,
        is_causal=part.causal,
        return_debug_mask=False,
        scale=scaling,
    )
    return out, lse


def _backward(saved: _Saved, part: Part, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's queries, keys and values."""
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = plain_varlen_backward
    if saved.q.device.type != "cpu":
        run = torch.ops.aten._flash_attention_backward.default
    return run(
        # The kernels take any strides of q, k and v, but dense gradients, outputs and sums.
        grad_out=_take(saved.grad, part.queries).contiguous(),
        query=_take(saved.q, part.queries),
        key=_take(saved.k, part.keys),
        value=_take(saved.v, part.keys),
        out=_take(saved.out, part.queries).contiguous(),
        logsumexp=_take(saved.lse.t(), part.queries).t().contiguous(),
        cum_seq_q=part.edges[0],
        cum_seq_k=part.edges[1],
        max_q=part.longest[0],
        max_k=part.longest[1],
        dropout_p=0.0,
        is_causal=part.causal,
        rng_state=saved.seed,
        unused=saved.seed[:0],
        scale=scaling,
    )


def plain_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """torch's varlen flash kernel from plain operators, piece by piece: query (T, H, D), key and
    value (U, heads, D) to out (T, H, D) and lse (H, T), float32 or more, of scaled scores.

    Rows that no piece covers are NaN; the kernel leaves them as they are. The maxima are bounds of
    the kernel's grid, and not used here; neither is dropout.
    """
    share = query.shape[1] // key.shape[1]
    out = torch.full_like(query, torch.nan)
    exact = torch.promote_types(query.dtype, torch.float32)
    lse = out.new_full((query.shape[1], len(query)), torch.nan, dtype=exact)
    for i, j in _pieces(cum_seq_q, cum_seq_k):
        q, k, v = _by_head(query[i]), _by_head(key[j], share), _by_head(value[j], share)
        part, part_lse = plain_forward(q, k, v, 0.0, is_causal, attn_mask=None, scale=scale)
        out[i], lse[:, i] = part[0].transpose(0, 1), part_lse[0]
    return out, lse


def plain_varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as torch's varlen flash kernel gives them; NaN for rows
    that no piece covers."""
    share = query.shape[1] // key.shape[1]
    of_query, of_key, of_value = (torch.full_like(x, torch.nan) for x in (query, key, value))
    for i, j in _pieces(cum_seq_q, cum_seq_k):
        grad, q, o = (_by_head(x[i]) for x in (grad_out, query, out))
        k, v = (_by_head(x[j], share) for x in (key, value))
        lse = logsumexp[None, :, i]
        grads = plain_backward(grad, q, k, v, o, lse, 0.0, is_causal, scale=scale)
        of_query[i] = grads[0][0].transpose(0, 1)
        for whole, each in zip((of_key, of_value), grads[1:], strict=True):
            whole[j] = each[0].unflatten(0, (-1, share)).sum(1).transpose(0, 1)
    return of_query, of_key, of_value


def _pieces(edges_q: Tensor, edges_k: Tensor) -> list[tuple[slice, slice]]:
    queries, keys = ([slice(*e) for e in pairwise(x.tolist())] for x in (edges_q, edges_k))
    return list(zip(queries, keys, strict=True))


def _by_head(x: Tensor, share: int = 1) -> Tensor:
    """(n, heads, D) to (1, heads * share, n, D)."""
    return x.transpose(0, 1).repeat_interleave(share, 0)[None]


# Groups of the check: pieces longer than a kernel's block, a completion of one token, a group
# without completions in between, so that rows are gathered.
_CHECKED = ((150, (33, 1)), (7, ()), (40, (140, 3, 3)))
# Half precision rounds values and gradients of these groups by 0.011 at most, of which a plain
# operator's form of the kernels has as much; a log-sum-exp in another base, which is the least of
# the faults that a kernel's release could bring, shows as 0.15.
_TOLERANCE = 0.04


@cache
def missing_varlen(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> str | None:
    """Why `varlen_group_attention` cannot run for such queries and keys, or None where it can.

    The first call for a device, dtype and size of heads runs the kernels and compares their values
    and gradients with a dense softmax, since they are private: some milliseconds.
    """
    if device.type == "cpu":
        return None
    if device.type not in ("cuda", "meta"):
        return f"torch has no flash kernels for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the flash kernels take bfloat16 and float16, not {_name(dtype)}"
    if dim % 8 or dim > 256:
        return f"the flash kernels take heads of 8, 16 .. 256 numbers, not {dim}"
    if (reason := _missing_operators()) is not None or device.type == "meta":
        return reason
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the flash kernels need compute capability 8.0"
    try:
        errors = _errors(device, dtype, heads, kv_heads, dim)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        return f"the flash kernels failed: {str(failure).partition(chr(10))[0]}"
    for what, error in errors.items():
        if not error <= _TOLERANCE:  # NaN too
            return f"the flash kernels' {what} differ from a dense softmax by {error:.2g}"
    return None


def _missing_operators() -> str | None:
    """The private operators are called by name: a changed order would be no matter, but a name that
    is gone, or a new one without a default."""
    for name, given in (
        ("_flash_attention_forward", _FORWARD),
        ("_flash_attention_backward", _BACKWARD),
    ):
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            return f"torch {torch.__version__} has no aten::{name}"
        found = {one.name: one.has_default_value() for one in packet.default._schema.arguments}
        needed = {each for each, has_default in found.items() if not has_default}
        if not needed <= given <= found.keys():
            return f"torch {torch.__version__} changed the parameters of aten::{name}"
    return None


def _errors(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> dict[str, float]:
    """The largest error of a row of values, and of each gradient, relative to that row's norm plus
    the mean of all: a relative error where a row is large, and no matter where it cancels."""
    # The first pass may come to this inside of what the caller set up: no gradients; autocast,
    # which would round the dense softmax; checkpointing, whose hooks would count our tensors.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast, keep:
        return _compare(device, dtype, (heads, kv_heads, dim))


def _compare(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> dict[str, float]:
    heads, kv_heads, dim = sizes
    spans: list[Span] = []
    for prompt, lengths in _CHECKED:
        spans.append(Span(spans[-1].end if spans else 0, prompt, lengths, device))
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
    shapes = [(1, n, spans[-1].end, dim) for n in (heads, kv_heads, kv_heads, heads)]
    on_cpu = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    values = [x.to(device, dtype) for x in on_cpu]
    exact = torch.promote_types(dtype, torch.float32)
    errors = {}
    for is_last in (False, True):
        read = torch.cat([span.read for span in spans]) if is_last else slice(None)
        found = []
        for compute, kind in ((varlen_group_attention, dtype), (_dense_attention, exact)):
            q, k, v, weights = (x.to(kind, copy=True).requires_grad_() for x in values)
            out = compute(q, k, v, dim**-0.5, spans, is_last)[:, read]
            grads = torch.autograd.grad(out, (q, k, v), weights.transpose(1, 2)[:, read])
            found.append((out.detach(), *grads))
        layer = "last layer's " if is_last else ""
        names = ("values", "gradients of queries", "gradients of keys", "gradients of values")
        for name, ours, true in zip(names, *found, strict=True):
            norm = true.norm(dim=-1)
            error = (ours.to(exact) - true).norm(dim=-1) / (norm + norm.mean())
            errors[layer + name] = float(error.max())
    return errors


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool,
) -> Tensor:
    """All scores of a small pack, masked; (1, N, H, D)."""
    group, owner = token_owners(spans)
    seen = (group[:, None] == group) & ((owner == 0) | (owner[:, None] == owner))
    seen &= torch.ones_like(seen).tril()
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
