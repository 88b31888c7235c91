"""Keys, values and states of prompts that many completions share, and attention over them.

While G completions of a prompt are decoded, the prompt's keys and values are kept once; a step
reads them once for all G queries, as one matrix product, and each completion's own few from a
buffer. Layers of a hybrid model without keys keep a state of fixed size for each completion.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vcr1_fast.model.partial_attention import join

_FIRST_CAPACITY = 32


class SharedPrefix:
    """Keys and values that the attention layers keep, in the place of a transformers cache.

    First pass: keys and values of N prompts of `lengths`, in one sequence without padding. After
    `start_decoding` each `make_room` and pass add one token to every one of the N x G completions
    (rows, grouped by prompt).

    `static`: a pass has the same shapes, addresses and operators as the one before it, whatever the
    token's number, until `version` changes. It reads the completions' buffer whole, masked by a
    number on the device, where the other kind reads the part in use.

    prefix_step: prompts are padded to a multiple of it.

    `states`: tensors of the layers without keys, by layer: (N, ...) of the prompts after the first
    pass, (rows, ...) of the completions in decoding, where a pass updates them in place.
    """

    def __init__(
        self, lengths: Sequence[int], *, static: bool = False, prefix_step: int = 1
    ) -> None:
        self.lengths, self.static, self.prefix_step = list(lengths), static, prefix_step
        # By layer, since only some layers of a hybrid model have keys; (N, heads, longest, D).
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self.bias: Tensor | None = None  # (N, 1, 1, P) as the keys: 0, or -inf on padding
        self.own_bias: Tensor | None = None  # the same for (1, 1, 1, capacity), static only
        self.version = 0  # of the buffers: counts their replacements
        self._own: dict[int, list[Tensor]] = {}  # [keys, values], (rows, heads, capacity, D)
        self._first = 0  # the first layer with keys
        self._used = 0
        self._last = torch.zeros(1, dtype=torch.int64)  # place of the newest token, on the device

    @property
    def prompts(self) -> int:
        """Prompts that still have rows, once decoding has started."""
        return len(self.lengths) if self.bias is None else len(self.bias)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: keep (rows, heads, tokens, D), return all of the row."""
        keys = keys.to(values.dtype)  # under autocast rotating them has made them float32
        if self.bias is None:
            self.prefix[layer] = self._by_prompt(keys), self._by_prompt(values)
            return keys, values
        own_keys, own_values = self._own[layer]
        if self.static:
            if layer == self._first:
                unused = torch.arange(own_keys.shape[2], device=keys.device) > self._last
                bias = torch.zeros(unused.shape, dtype=keys.dtype, device=keys.device)
                self.own_bias = bias.masked_fill(unused, -torch.inf)[None, None, None]
            own_keys.index_copy_(2, self._last, keys)
            own_values.index_copy_(2, self._last, values)
            return own_keys, own_values
        own_keys[:, :, self._used - 1] = keys[:, :, 0]
        own_values[:, :, self._used - 1] = values[:, :, 0]
        return own_keys[:, :, : self._used], own_values[:, :, : self._used]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, D) to (N, heads, longest, D), zeros behind the shorter prompts: laid
        out by head once, instead of in every product with them."""
        if len(self.lengths) == 1:
            return x.contiguous()
        parts = [part.transpose(0, 1) for part in x[0].split(self.lengths, dim=1)]
        return pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()

    def start_decoding(self, rows: int) -> None:
        """From here on, tokens belong to `rows` completions."""
        self._first = min(self.prefix)
        more = -self.prefix[self._first][0].shape[2] % self.prefix_step
        for layer, (keys, values) in self.prefix.items() if more else ():
            self.prefix[layer] = pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))
        keys, _ = self.prefix[self._first]
        lengths = torch.tensor(self.lengths, device=keys.device)
        padding = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
        bias = torch.zeros(padding.shape, dtype=keys.dtype, device=keys.device)
        self.bias = bias.masked_fill(padding, -torch.inf)[:, None, None]
        # Zeros: masked values are multiplied by 0 like all others, and 0 * nan would stay nan.
        shape = (rows, keys.shape[1], _FIRST_CAPACITY, keys.shape[3])
        self._own = {layer: [keys.new_zeros(shape) for _ in range(2)] for layer in self.prefix}
        self._last = self._last.to(keys.device)
        group = rows // len(self.lengths)
        self._each_state(lambda x: x.repeat_interleave(group, dim=0))

    def make_room(self) -> None:
        """Make place for one more token of every row; to be called before each pass."""
        self._used += 1
        self._last.fill_(self._used - 1)
        if self._own[self._first][0].shape[2] < self._used:
            self.version += 1
            for own in self._own.values():
                own[:] = [torch.cat([x, torch.zeros_like(x)], dim=2) for x in own]

    def select(self, prompts: Tensor | None, rows: Tensor) -> None:
        """Keep these prompts (None: all of them) and these rows, in this order; rows may repeat."""
        self.version += 1
        if prompts is not None:
            self.prefix = {i: (k[prompts], v[prompts]) for i, (k, v) in self.prefix.items()}
            if self.bias is not None:
                self.bias = self.bias[prompts]
        for own in self._own.values():
            own[:] = [x[rows] for x in own]
        self._each_state(lambda x: x[rows])

    def tensors(self) -> list[Tensor]:
        """All tensors that a static pass reads or writes, in a fixed order; in decoding."""
        assert self.bias is not None
        out = [self.bias, self._last]
        for layer in self.prefix:
            out += [*self.prefix[layer], *self._own[layer]]
        for state in self.states.values():
            out += state
        return out

    def move_to(self, buffers: Sequence[Tensor]) -> None:
        """Copy all tensors into `buffers`, shaped as `tensors()`, and use these from here on."""
        for to, given in zip(buffers, self.tensors(), strict=True):
            to.copy_(given)
        places = iter(buffers)
        self.bias, self._last = next(places), next(places)
        for layer in self.prefix:
            self.prefix[layer] = next(places), next(places)
            self._own[layer] = [next(places), next(places)]
        for layer, state in self.states.items():
            self.states[layer] = tuple(next(places) for _ in state)

    def _each_state(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer, state in self.states.items():  # one by one: the old and the new never all live
            self.states[layer] = tuple(map(change, state))


def shared_prefix_attention(
    own: tuple[Tensor, Tensor, Tensor],
    prefix: tuple[Tensor, Tensor],
    memory: SharedPrefix,
    scaling: float,
    part: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of one new token a row over its prompt and its own completion.

    own: query (rows, H, 1, D), key and value (rows, heads, t, D) of the completions; rows are
    grouped by prompt, equally many each. prefix: keys and values (N, heads, P, D) of the prompts.
    part: computes a part, `partial` or `partial_product`. Returns (rows, 1, H, D).
    """
    query, key, value = own
    rows, heads, _, dim = query.shape
    prompts, kv_heads = prefix[0].shape[:2]
    group, share = rows // prompts, heads // kv_heads
    # All of a prompt's queries that share a key head, one after another.
    together = query.view(prompts, group, kv_heads, share, dim).transpose(1, 2)
    together = together.reshape(prompts, kv_heads, group * share, dim)
    out, lse = part(together, *prefix, scaling, bias=memory.bias)
    own_out, own_lse = part(query, key, value, scaling, bias=memory.own_bias)
    by_prompt = (prompts, group, kv_heads, share)
    out = out.view(prompts, kv_heads, group, share, dim).transpose(1, 2)
    lse = lse.view(prompts, kv_heads, group, share).transpose(1, 2)
    out = join(out, lse, own_out.view(*by_prompt, dim), own_lse.view(by_prompt))
    return out.view(rows, 1, heads, dim)
