"""The GRPO step (DeepSeekMath, arXiv 2402.03300) on video: sample, score, advantage, loss, step.

The gradient is that of the unshared baseline, in which every completion runs with its own copy of
prompt and clip, to rounding. The work is less:

    prefix sharing: a group's prompt runs once in the rollout and once in the policy's forward pass,
    also where its completions do not fit in memory together;
    the vision encoder runs once per clip and step, or once per run where it is frozen;
    zero-advantage groups run only where a KL or entropy term gives them a gradient;
    old log-probs are the policy's own in the first update and the sampler's afterwards;
    no reference model when `beta` is 0; with LoRA it is the policy with its adapters disabled.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vcr1_fast.model.forward import prompt_pass
from vcr1_fast.model.prompt_state import PromptState
from vcr1_fast.model.rollout import Rollout
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.rewards.plugin import load_reward
from vcr1_fast.train.advantages import advantages_of, rank_slice
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.groups import PolicyGroup, minibatches_of, step_loss_config
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.metrics import log_completions, merge_metrics, step_row, to_numbers
from vcr1_fast.train.optim import clipped_step, learning_rate
from vcr1_fast.train.planner import MicroBatch, longest_first
from vcr1_fast.train.policy_loss import policy_loss
from vcr1_fast.train.reference import with_reference_logps
from vcr1_fast.train.rollouts import check_rollout_gap, sample_completions
from vcr1_fast.train.scoring import Scored, Scoring
from vcr1_fast.train.setup import Run, open_run


def train(config: TrainConfig) -> Path:
    """Run or resume GRPO; the folder of the trained model.

    Everything it writes lies in `config.run.output`. ValueError (ConfigError, CheckpointError and
    RecordError are ones) names the setting or file at fault.
    """
    user_rewards = [load_reward(spec, config.rewards.timeout) for spec in config.rewards.functions]
    with (
        open_run(config, reference=config.loss.beta != 0) as run,
        Scoring(config, user_rewards, run.tasks, run.accelerator.device) as scoring,
    ):
        for step, samples in enumerate(run.batches(), start=run.done):
            watch = Stopwatch(decode=run.source.take_seconds())

            # 1. Sample a group of completions per prompt. A chunk is scored in the background while
            #    the next one is sampled: judges are slow, and the device would wait for them.
            rollouts: list[Rollout] = []
            for chunk in sample_completions(run, samples, step, watch):
                rollouts += chunk.rollouts
                with watch.stage("reward"):  # some scorers take turns with the rollout
                    scoring.submit(chunk.samples, chunk.rollouts, chunk.shuffled)
            groups = [
                PolicyGroup.from_rollout(sample, one)
                for sample, one in zip(samples, rollouts, strict=True)
            ]

            # 2. Reference log-probs, only with a KL term. They need no reward, so they run while
            #    the last chunk is still being scored.
            if config.loss.beta != 0:
                with watch.stage("reference"):
                    groups = with_reference_logps(run, groups)

            # 3. Rewards to advantages. Every rank sees all rewards, because some estimators
            #    normalise over the batch, and keeps its completions' advantages.
            with watch.stage("reward"):
                scored = scoring.results()
                everyone: list[Scored] = gather_object(scored)
                advantages = advantages_of(
                    everyone, config.advantage, config.rollout.group_size, run.scales
                )[rank_slice(len(scored), run.rank)]
                groups = PolicyGroup.with_advantages(groups, advantages)

            # 4. Policy update: forward, loss, backward per micro-batch; clip; optimiser step.
            with watch.stage("policy"):
                metrics = update_policy(run, groups, learning_rate(step, run.config.optim))

            # 5. Log, evaluate, then checkpoint: a resume cuts the rows of steps after the last one.
            metrics |= {"quarantined": run.missing(samples), **scoring.take_metrics()}
            skipped = bool(metrics["skipped_updates"])
            log_completions(run, step, samples, rollouts, scored, advantages, skipped=skipped)
            size = config.rollout.group_size
            row = step_row(step + 1, everyone, metrics, watch, group_size=size)
            run.log_step(row | run.validate(step + 1))
            run.finish_step(step + 1)
        return run.export()


def update_policy(run: Run, groups: Sequence[PolicyGroup], lr: float) -> dict[str, float]:
    """All optimiser steps on one step's groups; their metrics over all ranks.

    `saved_tokens`: share of the unshared baseline's tokens that did not run through the policy.
    """
    config = run.config
    needs_every_group = config.loss.beta != 0 or config.loss.entropy_coef != 0
    minibatches = minibatches_of(groups, config.optim)
    collected: list[dict[str, float]] = []
    norms: list[float] = []
    skipped_updates = unshared_tokens = 0
    for number, minibatch in enumerate(minibatches):
        # Over all ranks and micro-batches, skipped groups included: the whole step's denominators.
        counts = torch.tensor(
            [
                sum(len(one.lengths) for one in minibatch),
                sum(sum(one.lengths) for one in minibatch),
                sum(one.unshared_tokens for one in minibatch),
            ],
            device=run.accelerator.device,
        )
        sequences, tokens, unshared = run.accelerator.reduce(counts).tolist()
        if sequences == 0:  # on every rank, so no rank waits in a collective alone
            continue
        unshared_tokens += unshared
        kept = [one for one in minibatch if needs_every_group or not one.has_zero_advantages]
        loss_config = step_loss_config(config.loss, sequences, tokens)
        # The policy that sampled is the policy that is trained until the first optimiser step.
        on_policy = number == 0
        metrics = accumulate_gradients(run, kept, loss_config, on_policy=on_policy)
        if on_policy:
            check_rollout_gap(merge_metrics(metrics), config.rollout)
        collected += metrics
        # Sums the gradients of all ranks, clips their joint norm, takes the optimiser step.
        finite = all(math.isfinite(one["loss"]) for one in metrics)
        norm = clipped_step(run.optimizer, lr, config.optim, finite_loss=finite)
        if math.isfinite(norm):
            norms.append(norm)
        else:
            skipped_updates += 1
    merged = merge_metrics(gather_object(collected))
    silent = gather_object([one.has_zero_advantages for one in groups])
    return {
        "loss": 0.0,  # where every group was skipped
        **merged,
        "grad_norm": sum(norms) / max(len(norms), 1),
        "lr": lr,
        "skipped_updates": skipped_updates,
        "skipped_groups": 0 if needs_every_group else sum(silent),
        "zero_advantage_groups": sum(silent) / max(len(silent), 1),
        **run.traffic.take(),
        "saved_tokens": 1.0 - merged.get("num_run_tokens", 0.0) / max(unshared_tokens, 1),
    }


def accumulate_gradients(
    run: Run, groups: Sequence[PolicyGroup], loss_config: GRPOLossConfig, *, on_policy: bool
) -> list[dict[str, float]]:
    """Leave the gradient of the groups' loss in the parameters; the micro-batches' metrics."""
    run.gather()
    unencoded = [one.with_vision(None) for one in groups]
    features = [one.group.vision for one in groups if one.group.vision is not None]
    leaves: list[Tensor] = []
    if run.vision_is_frozen:
        first = retry = groups
    elif on_policy and features and all(one.requires_grad for one in features):
        # The rollout's vision pass kept its graph. A clip's completions may be spread over several
        # micro-batches: each backward pass ends in the clip's leaf, then one pass through the
        # encoder takes the sums.
        leaves = [one.detach().requires_grad_() for one in features]
        unused = iter(leaves)
        first = [
            one if one.group.vision is None else one.with_vision(next(unused)) for one in groups
        ]
        retry = unencoded
    else:
        first = retry = unencoded  # a trained encoder encodes the clips of each micro-batch
    metrics: list[dict[str, Tensor]] = []
    for attempt in run.planner.attempts(longest_first(first), longest_first(retry)):
        with attempt as micro_batches:
            run.optimizer.zero_grad()  # a pass that ran out of memory left parts of gradients
            metrics = [
                one
                for batch in micro_batches
                for one in forward_backward(run, batch, loss_config, on_policy=on_policy)
            ]
    if leaves and attempt.number == 0:
        torch.autograd.backward(features, [leaf.grad for leaf in leaves])
    return [to_numbers(one) for one in metrics]


def forward_backward(
    run: Run, batch: MicroBatch[PolicyGroup], loss_config: GRPOLossConfig, *, on_policy: bool
) -> list[dict[str, Tensor]]:
    """Forward, loss and backward of a micro-batch; the metrics of each of its passes.

    A function, so that after an out-of-memory error no local variable holds the graph.
    """
    if batch.schedule == "packed":
        return [pass_backward(run, batch.items, loss_config, on_policy=on_policy)]
    # A group that does not fit: its prompt once, its completions part by part on the prompt's keys
    # and values, then one backward pass through the prompt from their summed gradients.
    (group,) = (one.group for one in batch.items)
    prompt = prompt_pass(run.model, group, keep_graph=batch.schedule == "split")
    metrics = [
        pass_backward(run, [part], loss_config, prompt, on_policy=on_policy)
        for part in batch.suffixes
    ]
    gradients = prompt.take_gradients()
    if batch.schedule == "twice":  # the graph of the prompt, now that no completion's is in memory
        prompt = prompt_pass(run.model, group)
    prompt.backward(gradients)
    metrics[0]["num_run_tokens"] += batch.prompt_passes * group.prompt_tokens
    return metrics


def pass_backward(
    run: Run,
    groups: Sequence[PolicyGroup],
    loss_config: GRPOLossConfig,
    prompt: PromptState | None = None,
    *,
    on_policy: bool,
) -> dict[str, Tensor]:
    """Forward, loss and backward of one pass; its metrics."""
    if on_policy:  # later updates of a step must finish it: its weights have changed
        run.check_overdue()
    loss, metrics = policy_loss(
        run.model,
        groups,
        loss_config,
        prompt,
        temperature=run.config.rollout.temperature,
        on_policy=on_policy,
    )
    loss.backward()
    prompts = sum(one.prompt_tokens for one in groups) if prompt is None else 0
    tokens = loss.new_tensor(prompts + sum(sum(one.lengths) for one in groups))
    counts = {"num_run_tokens": tokens, "num_microbatches": torch.ones_like(tokens)}
    return {"loss": loss.detach(), **metrics, **counts}
