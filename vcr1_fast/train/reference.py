"""Log-probs of the reference model, the policy as it was before training, for the KL term."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vcr1_fast.model.forward import completion_logps
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.planner import longest_first
from vcr1_fast.train.setup import Run


@torch.no_grad()
def with_reference_logps(run: Run, groups: Sequence[PolicyGroup]) -> list[PolicyGroup]:
    """The groups with the reference model's log-probs of their completions."""
    longest = longest_first(groups)
    # A trained encoder's features are the policy's: the reference model encodes the clips itself.
    given = longest if run.vision_is_frozen else [one.with_vision(None) for one in longest]
    parts: list[torch.Tensor] = []
    with run.reference() as model:
        for attempt in run.planner.attempts(given):
            with attempt as micro_batches:
                parts = [
                    completion_logps(
                        model,
                        [one.group for one in part],
                        temperature=run.config.rollout.temperature,
                    )
                    for part in micro_batches
                ]
    if not parts:  # this rank has no group, but enters the reference model with the others
        return []
    # A micro-batch may hold a part of a group, so the log-probs are cut again by group.
    by_group = torch.cat(parts).split([sum(one.lengths) for one in longest])
    ref_logps = dict(zip(map(id, longest), by_group, strict=True))
    return [replace(one, ref_logps=ref_logps[id(one)]) for one in groups]
