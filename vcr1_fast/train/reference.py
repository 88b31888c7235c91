"""Log-probs of the reference model, the policy as it was before training, for the KL term."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vcr1_fast.model.forward import completion_logps, prompt_pass
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.planner import MicroBatch, longest_first
from vcr1_fast.train.setup import Run


@torch.no_grad()
def with_reference_logps(run: Run, groups: Sequence[PolicyGroup]) -> list[PolicyGroup]:
    """The groups with the reference model's log-probs of their completions."""
    if not groups:
        return []
    longest = longest_first(groups)
    # A trained encoder's features are the policy's: the reference model encodes the clips itself.
    given = longest if run.vision_is_frozen else [one.with_vision(None) for one in longest]
    parts: list[torch.Tensor] = []
    with run.reference() as model:
        for attempt in run.planner.attempts(given):
            with attempt as micro_batches:
                parts = [
                    logps
                    for batch in micro_batches
                    for logps in _logps(model, batch, run.config.rollout.temperature)
                ]
    # A micro-batch may hold a group in parts, so the log-probs are cut again by group.
    by_group = torch.cat(parts).split([sum(one.lengths) for one in longest])
    ref_logps = dict(zip(map(id, longest), by_group, strict=True))
    return [replace(one, ref_logps=ref_logps[id(one)]) for one in groups]


def _logps(
    model: nn.Module, batch: MicroBatch[PolicyGroup], temperature: float
) -> list[torch.Tensor]:
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
