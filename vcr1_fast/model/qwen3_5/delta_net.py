"""Gated DeltaNet layers over groups that share their prompts, and over rows that decode.

All that such a layer passes from token to token are the state of the delta rule and the last inputs
of a short causal convolution. So a group's prompt runs once, from a zero state to its final state;
each completion starts from copies of that state and of the prompt's last inputs. Backward, the
gradients of the copies add up in the prompt: exactly the sum that G separate prompts would get.

Prompts of about one length are a batch, and so are completions, padded behind the shorter ones with
tokens that neither write to the state nor make it forget.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from vcr1_fast.model.decode import SharedPrefix
from vcr1_fast.model.packing import Span
from vcr1_fast.model.prompt_state import PromptRecorder, Suffix
from vcr1_fast.model.qwen3_5.delta_rule import delta_rule, one_token

_SHORT = 128  # tokens, about: below that a separate batch costs more than the padding


class GroupDeltaNet(Qwen3_5GatedDeltaNet):
    """A Gated DeltaNet layer of transformers that also takes packs and decoding rows.

    Takes the place of a layer's class (`use_group_delta_net`): parameters, their names and all
    other passes are the layer's own.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        spans: Sequence[Span] | None = None,
        shared_prefix: SharedPrefix | None = None,
        recorder: PromptRecorder | None = None,
        suffix: Suffix | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Output (B, N, H) of hidden states (B, N, H).

        `spans`: they are a pack, B = 1; with `shared_prefix` the prompts' states are kept there,
        and `recorder.record(layer, last inputs, state)` takes them with their graph.
        `shared_prefix` alone: one token of each row, N = 1. `suffix`: completions of `suffix.span`
        without their prompt, which `suffix.state.layers` holds as recorded, B = 1. None of them:
        transformers' own forward.
        """
        if spans is None and shared_prefix is None and suffix is None:
            return super().forward(hidden_states, *args, **kwargs)
        mixed, gate = self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states)
        step = self.in_proj_a(hidden_states)
        exact = torch.promote_types(step.dtype, torch.float32)
        beta = self.in_proj_b(hidden_states).sigmoid()
        decay = -self.A_log.to(exact).exp() * F.softplus(step.to(exact) + self.dt_bias)
        if spans is not None:
            out, states = self._over_pack(mixed[0], decay[0], beta[0], spans)
            if shared_prefix is not None:
                shared_prefix.states[self.layer_idx] = states
            if recorder is not None:
                recorder.record(self.layer_idx, *states)
        elif suffix is not None:
            pieces = [x[0].split(suffix.span.lengths) for x in (mixed, decay, beta)]
            group = torch.zeros(len(suffix.span.lengths), dtype=torch.int64, device=mixed.device)
            last, state = suffix.state.layers[self.layer_idx]
            out = torch.cat(self._completions(pieces, (last, state), group))
        else:
            assert shared_prefix is not None
            out = self._one_token(mixed, decay, beta, shared_prefix)
        normed = self.norm(out.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
        return self.out_proj(normed.reshape(*hidden_states.shape[:2], -1))

    def _over_pack(
        self,
        mixed: Tensor,
        decay: Tensor,
        beta: Tensor,
        spans: Sequence[Span],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, value heads * Dv) from the inputs (N, channels), (N, heads) and (N, heads); and what
        later tokens read of each prompt: its last inputs and its state."""
        lengths = [span.lengths for span in spans]
        sizes = list(chain.from_iterable((span.prompt, sum(span.lengths)) for span in spans))
        pieces = [x.split(sizes) for x in (mixed, decay, beta)]
        of_prompts = [part[::2] for part in pieces]
        before = mixed.new_zeros(len(spans), self.conv_kernel_size - 1, mixed.shape[1])
        out, state = self._sequences(of_prompts, before, None)
        # A prompt shorter than the kernel has zeros before it, as the convolution has.
        last = torch.stack([_last_rows(part, before.shape[1]) for part in of_prompts[0]])
        flat = list(chain.from_iterable(lengths))
        if not flat:
            return torch.cat(out), (last, state)
        completions = [torch.cat(part[1::2]).split(flat) for part in pieces]
        group = torch.arange(len(spans)).repeat_interleave(torch.tensor(list(map(len, lengths))))
        own = self._completions(completions, (last, state), group.to(mixed.device))
        following = iter(own)
        rows: list[Tensor] = []
        for prompt, given in zip(out, lengths, strict=True):
            rows += [prompt, *(next(following) for _ in given)]
        return torch.cat(rows), (last, state)

    def _completions(
        self,
        pieces: Sequence[Sequence[Tensor]],
        states: tuple[Tensor, Tensor],
        group: Tensor,
    ) -> list[Tensor]:
        """Outputs of completions, `pieces` as in `_sequences`, of the prompts `group` (R,), whose
        last inputs and states are `states`."""
        # Indexing copies a prompt's state to its completions, and adds their gradients up.
        last, state = (x[group] for x in states)
        return self._sequences(pieces, last, state)[0]

    def _sequences(
        self, pieces: Sequence[Sequence[Tensor]], before: Tensor, state: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs (T, value heads * Dv) of sequences of unlike lengths T, and their last states.

        pieces: inputs (T, channels), (T, heads) and (T, heads) of each sequence. before, state:
        what each starts from, see `_rule`.
        """
        lengths = [len(x) for x in pieces[0]]
        outputs: list[Tensor] = list(pieces[0])
        order: list[int] = []
        states = []
        for rows in _alike(lengths):
            # `pad_sequence` pads with zeros: a decay of e^0 and a strength of 0 leave the state
            # alone.
            x, g, b = (pad_sequence([part[i] for i in rows], batch_first=True) for part in pieces)
            own = None if state is None else state[rows]
            out, last = self._rule(x, g, b, before[rows], own)
            for i, row in zip(rows, out, strict=True):
                outputs[i] = row[: lengths[i]].flatten(1)
            order += rows
            states.append(last)
        back = sorted(range(len(order)), key=order.__getitem__)
        return outputs, torch.cat(states)[back]

    def _one_token(
        self, mixed: Tensor, decay: Tensor, beta: Tensor, shared_prefix: SharedPrefix
    ) -> Tensor:
        """(R, 1, value heads, Dv) of the rows' newest tokens; their states advance."""
        last, state = shared_prefix.states[self.layer_idx]
        out = one_token(*self._heads(self._convolve(mixed, last)), decay, beta, state)
        # In place, as the state: see `one_token`.
        last.copy_(torch.cat([last[:, 1:], mixed], dim=1))
        return out

    def _rule(
        self, x: Tensor, decay: Tensor, beta: Tensor, before: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return delta_rule(*self._heads(self._convolve(x, before)), decay, beta, state)

    def _convolve(self, x: Tensor, before: Tensor) -> Tensor:
        """Causal convolution and activation of x (B, T, channels); before (B, kernel - 1, channels)
        are the inputs of the tokens before it."""
        channels = torch.cat([before, x], dim=1).transpose(1, 2)
        out = F.conv1d(
            channels, self.conv1d.weight, self.conv1d.bias, groups=self.conv1d.weight.shape[0]
        )
        return F.silu(out).transpose(1, 2)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, value heads, D) of channels (B, T, channels)."""
        query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        value = value.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        query, key = (
            x.unflatten(-1, (self.num_k_heads, self.head_k_dim)).repeat_interleave(
                self.num_v_heads // self.num_k_heads, dim=2
            )
            for x in (query, key)
        )
        return query, key, value


def use_group_delta_net(language_model: Any) -> None:
    """Let every Gated DeltaNet layer of `language_model` take packs and decoding rows.

    The class is exchanged, not the `forward` of the object: a copy or a pickle of the model keeps
    it. ValueError for a layer with another activation, which `_convolve` would ignore.
    """
    for layer in language_model.layers:
        net = getattr(layer, "linear_attn", None)
        if net is None or isinstance(net, GroupDeltaNet):
            continue
        if net.activation != "silu":
            raise ValueError(f"a Gated DeltaNet layer has the activation {net.activation!r}")
        net.__class__ = GroupDeltaNet


def _last_rows(x: Tensor, count: int) -> Tensor:
    return F.pad(x, (0, 0, count, 0))[-count:]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences whose lengths differ by less than half, together: one long clip beside
    many stills must not pad them all to its length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and 2 * lengths[i] <= 3 * lengths[batches[-1][0]] + _SHORT:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
