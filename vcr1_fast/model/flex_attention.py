"""Attention over groups that share their prompts, by torch's FlexAttention.

One call over the whole pack. Token i sees token j when j <= i, both are of one group, and j is of
the prompt or of i's own completion. Blocks of 128 x 128 in which nobody sees anybody are skipped by
the kernel, so completions of one group cost each other nothing but the blocks they share.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.packing import Span
from vcr1_fast.model.prompt_state import Suffix


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
    mask = getattr(spans[0], "_flex_mask", None)
    if mask is None:
        # All layers of a forward pass get the same spans: the mask is made once and dropped with
        # them.
        mask = block_mask(spans)
        object.__setattr__(spans[0], "_flex_mask", mask)
    out = _kernel(query.device.type)(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def flex_suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, suffix: Suffix, layer: int
) -> Tensor:
    """As `attention.fused_suffix_attention`: query (1, H, S, D), key and value (1, heads, S, D), of
    completions alone; returns (1, S, H, D)."""
    span = suffix.span
    mask = getattr(span, "_flex_mask", None)
    if mask is None:
        mask = suffix_block_mask(span)
        object.__setattr__(span, "_flex_mask", mask)
    before = suffix.state.layers[layer]
    k, v = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    out = _kernel(query.device.type)(
        query, k, v, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def suffix_block_mask(span: Span) -> Any:
    """FlexAttention's block mask of a group's completions over the keys of the whole group."""
    from torch.nn.attention.flex_attention import create_block_mask

    _, owner = token_owners([span])

    def sees(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = i + span.prompt
        return (j <= row) & ((owner[j] == 0) | (owner[j] == owner[row]))

    size = len(owner)
    return create_block_mask(sees, None, None, size - span.prompt, size, device=owner.device)


def block_mask(spans: Sequence[Span]) -> Any:
    """FlexAttention's block mask of a pack of N tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    group, owner = token_owners(spans)

    def sees(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = (owner[j] == 0) | (owner[j] == owner[i])
        return (j <= i) & (group[j] == group[i]) & visible

    size = len(group)
    return create_block_mask(sees, None, None, size, size, device=group.device)


def token_owners(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """(N,) each, int64: a token's group, and its completion within that, 0 for the prompt."""
    groups, owners = [], []
    for number, span in enumerate(spans):
        sizes = torch.tensor([span.prompt, *span.lengths])
        owners.append(torch.arange(len(sizes)).repeat_interleave(sizes))
        groups.append(torch.full_like(owners[-1], number))
    device = spans[0].device
    return torch.cat(groups).to(device), torch.cat(owners).to(device)


@cache
def _kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Lengths differ from pass to pass: without `dynamic` each would be compiled again.
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
