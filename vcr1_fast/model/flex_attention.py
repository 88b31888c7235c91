"""Attention over groups that share their prompts, by torch's FlexAttention.

One call over the whole pack. Token i sees token j when j <= i, both are of one group, and j is of
the prompt or of i's own completion. Blocks of 128 x 128 in which nobody sees anybody are skipped by
the kernel, so completions of one group cost each other nothing but the blocks they share; blocks
that everybody sees whole are computed without looking at the rule.

The kernel is compiled for its sizes: a pack is padded to one of eight sizes an octave, so that a
run compiles a few times and computes at most an eighth more rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vcr1_fast.model.packing import Span, token_owners

_BLOCK = 128
# Compiled kernels that one process keeps. torch's own limit, 8, is for code whose sizes should not
# matter; beyond it, it runs uncompiled, with all scores in memory.
_MOST_KERNELS = 64


def flex_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool = False,
) -> Tensor:
    """query (1, H, N, D), key and value (1, heads, N, D); returns (1, N, H, D).

    Compiled on a GPU; elsewhere plain torch operators run, with all scores in memory and without a
    backward pass.
    """
    rows = query.shape[2]
    size = padded_size(rows) if query.is_cuda else rows
    place = ("flex", size, *((span.start, span.prompt, span.lengths) for span in spans))
    mask = spans[0].cache.get(place)
    if mask is None:
        mask = spans[0].cache[place] = block_mask(spans, size)
    out = _run(
        query.device.type,
        *(F.pad(x, (0, 0, 0, size - rows)) for x in (query, key, value)),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[:, :, :rows].transpose(1, 2)


def padded_size(rows: int) -> int:
    """The next size of which there are eight between a power of two and the next, in blocks."""
    step = max(_BLOCK, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def block_mask(spans: Sequence[Span], size: int) -> Any:
    """FlexAttention's block mask of a pack padded to `size` tokens, those of the padding a group
    among themselves.

    From the pieces' edges, on their device: `create_block_mask` would first make the mask of
    (size, size) tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = spans[0].device
    if spans[-1].end < size:
        spans = [*spans, Span(spans[-1].end, size - spans[-1].end, (), device)]
    group, owner = token_owners(spans)

    def sees(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = (owner[j] == 0) | (owner[j] == owner[i])
        return (j <= i) & (group[j] == group[i]) & visible

    # Rectangles (first query, end, first key, end) of what is seen, without the rule j <= i: all of
    # a group sees its prompt, a completion itself. The first one's keys go on from the prompt's.
    edges: list[tuple[int, int, int, int]] = []
    for span in spans:
        edges.append((span.start, span.end, span.start, span.middle))
        first, keys = span.middle, span.start
        for length in span.lengths:
            edges.append((first, first + length, keys, first + length))
            first = keys = first + length
    blocks = -(-size // _BLOCK)
    low = torch.arange(blocks, device=device)[:, None] * _BLOCK
    high = (low + _BLOCK).clamp(max=size)
    q_first, q_end, k_first, k_end = torch.tensor(edges, device=device).unbind(1)
    # (blocks, rectangles): whether a block of queries, or of keys, meets the rectangle's, or lies
    # in it.
    meets_q, meets_k = (low < q_end) & (high > q_first), (low < k_end) & (high > k_first)
    within_q, within_k = (low >= q_first) & (high <= q_end), (low >= k_first) & (high <= k_end)
    met = _pairs(meets_q, meets_k).tril_()
    # All j <= i: a block below the diagonal.
    full = _pairs(within_q, within_k).tril_(-1)
    return BlockMask.from_kv_blocks(
        *_as_lists(met & ~full),
        *_as_lists(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(size, size),
    )


def _pairs(queries: Tensor, keys: Tensor) -> Tensor:
    """bool (blocks, blocks): those that meet the queries and the keys of one rectangle."""
    return queries.float() @ keys.float().t() > 0


def _as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of blocks of keys for each block of queries, and their indices first in a row:
    int32 (1, 1, blocks) and (1, 1, blocks, blocks)."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _run(device: str, *inputs: Tensor, **options: Any) -> Tensor:
    if device != "cuda":
        return _kernel(device)(*inputs, **options)
    import torch._dynamo.config as limits

    with limits.patch(recompile_limit=_MOST_KERNELS):
        return _kernel(device)(*inputs, **options)


@cache
def _kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
