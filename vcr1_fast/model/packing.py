"""Groups packed into one sequence without padding, and their layout.

A group is a prompt and its completions. Its tokens lie in a row, the prompt first,

    prompt | completion 1 | ... | completion G | next group's prompt | ...

and a completion's last token is left out: nothing is predicted from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.prompt import Prompt, next_position


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt with its completions, each (C_j,) int64 with C_j >= 1.

    vision: features (vision tokens, levels * H) of the prompt's clips and images; None:
    `completion_hidden` encodes them, with gradient if the vision encoder is trained.
    """

    prompt: Prompt
    completions: Sequence[Tensor]
    vision: Tensor | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion) for completion in self.completions]

    @property
    def patches(self) -> int:
        """Patches that the vision encoder has yet to encode."""
        return self.prompt.patches if self.vision is None else 0

    def part(self, first: int, last: int) -> "Group":
        """The same prompt with completions first .. last - 1."""
        return replace(self, completions=self.completions[first:last])


@dataclass(frozen=True, eq=False)
class Span:
    """Where a group lies: `prompt` tokens from `start`, then completions of `lengths` (>= 1).

    Completions attend to themselves as a batch padded to the longest. `padded` (G, longest) holds
    the offset, behind the prompt, of the token at each place of that batch, the completion's last
    one again where there is none; `valid` (G, longest) marks the places that hold their own token,
    and `places` (S,) lists those.
    """

    start: int
    prompt: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def middle(self) -> int:
        return self.start + self.prompt

    @property
    def end(self) -> int:
        return self.middle + sum(self.lengths)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    def parts(self, is_last: bool) -> list[tuple[int, int, int, int]]:
        """Parts of `ops.group_attention`. is_last: of the prompt's queries only the last counts."""
        last = self.middle - 1
        parts = [(last, self.middle, self.start, last)]
        if not is_last:
            parts = [(self.start, self.middle, self.start, self.start)]
        for length in self.lengths:
            row = parts[-1][1]
            parts.append((row, row + length, self.start, self.middle))
        return parts

    @cached_property
    def read(self) -> Tensor:
        """(1 + S,) indices in the row of the tokens from which something is predicted."""
        return torch.arange(self.middle - 1, self.end, device=self.device)

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What an attention computes from the spans of a pass: kept in its first, and dropped with
        it, since all layers get the same spans."""
        return {}

    @cached_property
    def _sizes(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def valid(self) -> Tensor:
        places = torch.arange(max(self.lengths), device=self.device)
        return places < self._sizes[:, None]

    @cached_property
    def padded(self) -> Tensor:
        within = torch.arange(max(self.lengths), device=self.device)
        within = within.minimum(self._sizes[:, None] - 1)
        return within + (self._sizes.cumsum(0) - self._sizes)[:, None]

    @cached_property
    def places(self) -> Tensor:
        return self.valid.flatten().nonzero()[:, 0]

    @cached_property
    def mask(self) -> Tensor:
        """Which of the group's tokens a completion token sees, bool (S, P + S); made on the device,
        and filled in place: it is the largest tensor of the pass."""
        size = sum(self.lengths)
        numbers = torch.arange(len(self.lengths), device=self.device)
        owner = numbers.repeat_interleave(self._sizes, output_size=size)
        mask = torch.ones(size, self.prompt + size, dtype=torch.bool, device=self.device)
        own = mask[:, self.prompt :].tril_()
        own &= owner[:, None] == owner
        return mask


def token_owners(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """(N,) each, int64: a token's group, and its completion within that, 0 for the prompt."""
    device = spans[0].device
    pieces = [(n, i) for n, span in enumerate(spans) for i in range(1 + len(span.lengths))]
    sizes = [size for span in spans for size in (span.prompt, *span.lengths)]
    owners = torch.tensor(pieces, device=device).repeat_interleave(
        torch.tensor(sizes, device=device), dim=0, output_size=sum(sizes)
    )
    return owners[:, 0], owners[:, 1]


@dataclass(frozen=True, eq=False)
class Pack:
    """Groups as one sequence of N tokens, on the model's device.

    tokens (N,); is_vision (N,) bool: tokens of prompts that stand for vision features (a sampled
    token never does); positions (3, N); sources (nnz,): the token that predicts each
    of the labels (nnz,), groups and completions in order; cu_seqlens (completions + 1,) int32,
    where each completion starts in them; spans: for attention.
    """

    tokens: Tensor
    is_vision: Tensor
    positions: Tensor
    sources: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    spans: tuple[Span, ...]


def pack_groups(groups: Sequence[Group], device: torch.device) -> Pack:
    """Lay `groups` out one after another; ValueError for none, or for an empty completion."""
    if not groups:
        raise ValueError("no groups given")
    tokens, is_vision, positions, sources = [], [], [], []
    spans: list[Span] = []
    start = 0
    for group in groups:
        prompt, fed = group.prompt, [len(c) - 1 for c in group.completions]
        if not fed or min(fed) < 0:
            raise ValueError(
                f"a group needs completions of at least one token, got lengths {group.lengths}"
            )
        resume = next_position(prompt.positions)
        tokens.append(prompt.input_ids)
        positions.append(prompt.positions)
        is_vision += [prompt.is_vision, torch.zeros(sum(fed), dtype=torch.bool)]
        place = start + len(prompt)
        for completion, count in zip(group.completions, fed, strict=True):
            tokens.append(completion[:-1].cpu())
            positions.append((resume + torch.arange(count)).expand(3, -1))
            # The last prompt token, then the completion's tokens but the last.
            sources.append(torch.tensor([start + len(prompt) - 1]))
            sources.append(torch.arange(place, place + count))
            place += count
        spans.append(Span(start, len(prompt), tuple(n for n in fed if n), device))
        start = place
    completions = [completion.cpu() for group in groups for completion in group.completions]
    lengths = torch.tensor([0, *map(len, completions)])
    return Pack(
        tokens=torch.cat(tokens).to(device),
        is_vision=torch.cat(is_vision).to(device),
        positions=torch.cat(positions, dim=1).to(device),
        sources=torch.cat(sources).to(device),
        labels=torch.cat(completions).to(device),
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32).to(device),
        spans=tuple(spans),
    )
