"""The groups that a policy update runs on, and the denominators of their loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import Rollout
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.config import OptimConfig
from vcr1_fast.train.dataset import Sample


@dataclass(frozen=True, eq=False)
class PolicyGroup:
    """A prompt with its G completions of N tokens in all, and the loss's inputs.

    advantages (G,); rollout_logps (N,), of the sampler at its temperature; ref_logps (N,), of the
    reference model, None without a KL term; place: of the prompt in its step, over all ranks.
    """

    group: Group
    advantages: Tensor
    rollout_logps: Tensor
    ref_logps: Tensor | None = None
    place: int = 0

    @classmethod
    def from_rollout(cls, sample: Sample, one: Rollout) -> "PolicyGroup":
        """The group of one prompt's rollout, with advantages of 0 until rewards are known.

        ValueError for a completion of several turns: the loss has no mask for given tokens yet.
        """
        for i in range(len(one.tokens[0])):
            if [segment.sampled for segment in one.segments(0, i)] != [True]:
                raise ValueError(f"completion {i} has more than one turn, which is not trained yet")
        return cls(
            Group(sample.prompt, one.tokens[0], one.vision[0]),
            torch.zeros(len(one.tokens[0])),
            torch.cat(one.full_logps[0]),
            place=sample.place,
        )

    @property
    def prompt_tokens(self) -> int:
        return self.group.prompt_tokens

    @property
    def lengths(self) -> list[int]:
        return self.group.lengths

    @property
    def patches(self) -> int:
        return self.group.patches

    @property
    def unshared_tokens(self) -> int:
        """Tokens of the unshared baseline: every completion with its own copy of the prompt."""
        return len(self.lengths) * self.prompt_tokens + sum(self.lengths)

    @property
    def has_zero_advantages(self) -> bool:
        """All completions equally good: without a KL or entropy term there is no gradient."""
        return not bool(self.advantages.any())

    def part(self, first: int, last: int) -> "PolicyGroup":
        """The same prompt with completions first .. last - 1."""
        before = sum(self.lengths[:first])
        tokens = slice(before, before + sum(self.lengths[first:last]))
        return PolicyGroup(
            self.group.part(first, last),
            self.advantages[first:last],
            self.rollout_logps[tokens],
            None if self.ref_logps is None else self.ref_logps[tokens],
        )

    @staticmethod
    def with_advantages(groups: Sequence["PolicyGroup"], advantages: Tensor) -> list["PolicyGroup"]:
        """The groups with advantages (N,), groups in order."""
        parts = advantages.split([len(one.lengths) for one in groups])
        return [replace(one, advantages=part) for one, part in zip(groups, parts, strict=True)]

    def with_vision(self, vision: Tensor | None) -> "PolicyGroup":
        """The same with other features; None has its clips encoded in the forward pass."""
        return replace(self, group=replace(self.group, vision=vision))


def minibatches_of(groups: Sequence[PolicyGroup], config: OptimConfig) -> list[list[PolicyGroup]]:
    """This rank's groups of each optimiser step on one rollout, all inner epochs.

    By place, not by number: an optimiser step takes the same prompts for any number of ranks.
    """
    steps, size = config.inner_steps, config.prompts_per_step
    parts: list[list[PolicyGroup]] = [[] for _ in range(steps)]
    for one in groups:
        parts[one.place * steps // size].append(one)
    return parts * config.inner_epochs


def step_loss_config(config: GRPOLossConfig, sequences: int, tokens: int) -> GRPOLossConfig:
    """The config with the counts of the whole optimiser step as denominators, so that losses and
    gradients of its micro-batches, on all ranks, add up to the step's."""
    if config.resolved_aggregation == "token_mean":
        config = replace(config, aggregation="num_items")
    return replace(config, num_sequences=float(max(sequences, 1)), num_items=float(max(tokens, 1)))
