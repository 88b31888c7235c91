"""Keys and values of prompts that many completions share, and attention over them.

While G completions of a prompt are decoded, the prompt's keys and values are kept once; a step
reads them once for all G queries, as one matrix product, and each completion's own few from a
buffer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vcr1_fast.model.partial_attention import merge, partial, partial_product

_FIRST_CAPACITY = 32


class SharedPrefix:
    """What the model's attention layers keep, in the place of a transformers cache.

    First pass: keys and values of N right-padded prompts. After `start_decoding(lengths, G)` each
    pass adds one token to every one of the N x G completions (rows, grouped by prompt).
    """

    def __init__(self) -> None:
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer, each (N, heads, P, D)
        self.bias: Tensor | None = None  # (N, 1, 1, P) as the keys: 0, or -inf on padding
        self._own: list[list[Tensor]] = []  # per layer [keys, values], (rows, heads, capacity, D)
        self._rows = 0
        self._used = 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: keep (rows, heads, tokens, D), return all of the row."""
        if self.bias is None:
            # Laid out by head once, instead of in every product with them.
            self.prefix.append((keys.contiguous(), values.contiguous()))
            return keys, values
        if layer == 0:
            self._used += 1
        if layer == len(self._own):
            shape = (len(keys), keys.shape[1], _FIRST_CAPACITY, keys.shape[3])
            self._own.append([keys.new_empty(shape) for _ in range(2)])
        own = self._own[layer]
        if own[0].shape[2] < self._used:
            own[:] = [torch.cat([x, torch.empty_like(x)], dim=2) for x in own]
        own[0][:, :, self._used - 1] = keys[:, :, 0]
        own[1][:, :, self._used - 1] = values[:, :, 0]
        return own[0][:, :, : self._used], own[1][:, :, : self._used]

    def start_decoding(self, lengths: Tensor) -> None:
        """From here on tokens belong to completions. lengths: (N,) of the prompts."""
        keys = self.prefix[0][0]
        padding = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
        bias = torch.zeros(padding.shape, dtype=keys.dtype, device=keys.device)
        self.bias = bias.masked_fill(padding, -torch.inf)[:, None, None]

    def select(self, prompts: Tensor | None, rows: Tensor) -> None:
        """Keep these prompts (None: all of them) and these rows, in this order; rows may repeat."""
        if prompts is not None:
            self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
            self.bias = self.bias[prompts]
        for own in self._own:
            own[:] = [x[rows] for x in own]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    memory: SharedPrefix,
) -> Tensor:
    """Attention of one new token a row over its prompt and its own completion.

    query: (rows, H, 1, D); key, value: (rows, heads, t, D) of the completions; rows are grouped by
    prompt, equally many each. Returns (rows, 1, H, D).
    """
    prefix_key, prefix_value = memory.prefix[module.layer_idx]
    rows, heads, _, dim = query.shape
    prompts, kv_heads = prefix_key.shape[:2]
    group, share = rows // prompts, heads // kv_heads
    part = partial if query.device.type == "cpu" else partial_product
    # All of a prompt's queries that share a key head, one after another.
    together = query.view(prompts, group, kv_heads, share, dim).transpose(1, 2)
    together = together.reshape(prompts, kv_heads, group * share, dim)
    on_prefix = [
        x.unflatten(2, (group, share)).transpose(1, 2).reshape(rows, heads, 1, *x.shape[3:])
        for x in part(together, prefix_key, prefix_value, scaling, bias=memory.bias)
    ]
    out, _ = merge(on_prefix, part(query, key, value, scaling))
    return out.transpose(1, 2)
