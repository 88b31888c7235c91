"""Log-probs of completions under a model, by micro-batches: the reference model's for the KL term,
the policy's where the engine does not report them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vcr1_fast.model.forward import completion_logps, prompt_pass
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.planner import MicroBatch, longest_first
from vcr1_fast.train.setup import Run


def with_reference_logps(run: Run, groups: Sequence[PolicyGroup]) -> list[PolicyGroup]:
    """The groups with the log-probs of the reference model, the policy before training."""
    # A trained encoder's features are the policy's: the reference model encodes the clips itself.
    given = groups if run.vision_is_frozen else [one.with_vision(None) for one in groups]
    with run.reference() as model:
        found = group_logps(run, model, given)
    return [replace(one, ref_logps=logps) for one, logps in zip(groups, found, strict=True)]


@torch.no_grad()
def group_logps(run: Run, model: nn.Module, groups: Sequence[PolicyGroup]) -> list[Tensor]:
    """Log-probs (N,) of each group's completion tokens at the rollout's temperature."""
    if not groups:
        return []
    longest = longest_first(groups)
    parts: list[Tensor] = []
    for attempt in run.planner.attempts(longest):
        with attempt as micro_batches:
            parts = [
                logps
                for batch in micro_batches
                for logps in _logps(model, batch, run.config.rollout.temperature)
            ]
    # A micro-batch may hold a group in parts, so the log-probs are cut again by group.
    by_group = torch.cat(parts).split([sum(one.lengths) for one in longest])
    found = dict(zip(map(id, longest), by_group, strict=True))
    return [found[id(one)] for one in groups]


def _logps(model: nn.Module, batch: MicroBatch[PolicyGroup], temperature: float) -> list[Tensor]:
    """Log-probs of each pass of a micro-batch. The prompt of a split group runs once: without a
    graph `split` and `twice` are the same."""
    if batch.schedule == "packed":
        groups = [one.group for one in batch.items]
        return [completion_logps(model, groups, temperature=temperature)]
    prompt = prompt_pass(model, batch.items[0].group)
    return [
        completion_logps(model, [part.group], prompt, temperature=temperature)
        for part in batch.suffixes
    ]
