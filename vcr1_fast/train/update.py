"""The step's second half: reference log-probs, the loss's gradient in micro-batches, the update.

What cannot move the model is not run: groups whose advantages are all zero where neither a KL nor
an entropy term needs them (they still count in the loss's denominators); the reference at beta 0; a
second pass for the old log-probs, which on the first update are the policy's own and later the
sampler's, as long as the two agree.
"""

import math
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.config import RolloutConfig
from vcr1_fast.train.optim import clipped_step
from vcr1_fast.train.setup import Run
from vcr1_fast.train.step import (
    PolicyGroup,
    completion_logps,
    equal_parts,
    longest_first,
    loss_config,
    merge_metrics,
    policy_loss,
)


@torch.no_grad()
def with_reference(run: Run, groups: list[PolicyGroup]) -> list[PolicyGroup]:
    """The groups with the reference's log-probs. Its tower is another one where that is trained."""
    if not groups:
        return []
    longest = longest_first(groups)
    given = longest if run.vision_is_frozen else [one.with_vision(None) for one in longest]
    with run.reference() as reference:

        def logps(part: list[PolicyGroup]) -> Tensor:
            return completion_logps(
                reference,
                [one.group for one in part],
                temperature=run.config.rollout.temperature,
            )

        flat = torch.cat(run.planner.run(given, logps, lambda: given))
    logps_of = dict(zip(longest, flat.split([sum(one.lengths) for one in longest]), strict=True))
    return [replace(one, ref_logps=logps_of[one]) for one in groups]


def update(run: Run, groups: list[PolicyGroup], lr: float) -> dict[str, float]:
    """All optimiser steps on one step's groups; their metrics over all processes.

    `saved_tokens` is the share of the plain form's tokens (every completion with a prompt of its
    own, every group) that did not go through the policy.
    """
    config = run.config
    needs_all = config.loss.beta != 0 or config.loss.entropy_coef != 0
    collected: list[dict[str, float]] = []
    norms, skipped_updates, plain = [], 0, 0
    for epoch in range(config.optim.inner_epochs):
        for number, part in enumerate(equal_parts(groups, config.optim.inner_steps)):
            on_policy = epoch == 0 and number == 0
            counts = run.accelerator.reduce(
                torch.tensor(
                    [
                        sum(len(one.lengths) for one in part),
                        sum(sum(one.lengths) for one in part),
                        sum(one.plain_tokens for one in part),
                    ],
                    device=run.accelerator.device,
                )
            )
            sequences, tokens, plain_tokens = counts.tolist()
            if sequences == 0:
                continue
            plain += plain_tokens
            kept = longest_first(one for one in part if needs_all or not one.is_silent)
            loss_settings = loss_config(config.loss, sequences, tokens)
            metrics = gradients(run, kept, loss_settings, on_policy=on_policy)
            if on_policy:
                check_gap(metrics, config.rollout)
            collected += metrics
            norm = clipped_step(run.optimizer, lr, config.optim)
            if math.isfinite(norm):
                norms.append(norm)
            else:
                skipped_updates += 1
    merged = merge_metrics(gather_object(collected))
    return {
        "loss": 0.0,  # where every group was skipped
        **merged,
        "grad_norm": sum(norms) / max(len(norms), 1),
        "lr": lr,
        "skipped_updates": skipped_updates,
        "skipped_groups": sum(gather_object([one.is_silent and not needs_all for one in groups])),
        "saved_tokens": 1.0 - merged.get("num_run_tokens", 0.0) / max(plain, 1),
    }


def gradients(
    run: Run, groups: list[PolicyGroup], loss_settings: GRPOLossConfig, *, on_policy: bool
) -> list[dict[str, float]]:
    """Leave the gradient of the groups' loss with the parameters; the micro-batches' metrics.

    Features that the rollout has kept with their graph are leaves here, whichever micro-batch they
    are in; then all go back through the tower in one pass. Where there are none, a trained tower
    encodes the clips of each micro-batch.
    """
    encoded_anew = [one.with_vision(None) for one in groups]
    features = [one.group.vision for one in groups if one.group.vision is not None]
    with_graph = on_policy and all(f.requires_grad for f in features)
    if not (run.vision_is_frozen or with_graph):
        groups = encoded_anew
    leaves = {f: f.detach().requires_grad_() for f in features if with_graph}

    def micro_batch(part: list[PolicyGroup]) -> dict[str, Tensor]:
        loss, metrics = policy_loss(
            run.model,
            [one.with_vision(leaves.get(one.group.vision, one.group.vision)) for one in part],
            loss_settings,
            temperature=run.config.rollout.temperature,
            on_policy=on_policy,
        )
        loss.backward()
        count = sum(one.prompt_tokens + sum(one.lengths) for one in part)
        return {
            "loss": loss.detach(),
            **metrics,
            "num_run_tokens": loss.new_tensor(count),
            "num_microbatches": loss.new_tensor(1.0),
        }

    def restart() -> list[PolicyGroup]:
        run.optimizer.zero_grad()
        leaves.clear()
        return groups if run.vision_is_frozen else encoded_anew

    metrics = run.planner.run(groups, micro_batch, restart)
    if leaves:
        torch.autograd.backward(list(leaves), [leaf.grad for leaf in leaves.values()])
    return [to_numbers(one) for one in metrics]


def check_gap(metrics: list[dict[str, float]], settings: RolloutConfig) -> None:
    """ValueError where training does not see the completions as the rollout drew them.

    Before the first update of a step both are the same model on the same tokens: apart from
    rounding, the log-probs agree.
    """
    merged = merge_metrics(metrics)
    for kind, limit in (("mean", settings.gap_mean_limit), ("max", settings.gap_max_limit)):
        gap = merged.get(f"rollout_gap_{kind}", 0.0)
        if limit is not None and gap > limit:
            raise ValueError(
                f"the {kind} gap between the log-probs of rollout and training is {gap:.3g}, above "
                f"rollout.gap_{kind}_limit {limit}. The completions were not drawn from the policy "
                "that is trained: its weights, its positions or its precision differ between the "
                "two. Nothing was updated in this step; the last checkpoint is good"
            )


def to_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as floats, with one wait for the device."""
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
