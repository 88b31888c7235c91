"""Supervised fine-tuning on right answers; the loss is over completion tokens alone."""

import math
from pathlib import Path

import torch

from vcr1_fast.data.records import Record
from vcr1_fast.model.forward import completion_logps
from vcr1_fast.model.packing import Group
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.optim import clipped_step, learning_rate
from vcr1_fast.train.planner import longest_first
from vcr1_fast.train.setup import Run, open_run


def right_answer(record: Record, think: bool = False, opened: str = "") -> str:
    """The right completion of a record; with `think`, after the record's `metadata.reasoning`.

    `opened`: the part of the assistant's turn that the chat template has written (`Prompt.opened`),
    which is not written a second time. ValueError where the reasoning is missing or empty: empty
    tags would teach the model not to reason.
    """
    answer = TASKS[record.task].target(record)
    if not think:
        return answer
    reasoning = record.metadata.get("reasoning")
    if not isinstance(reasoning, str) or not reasoning.strip():
        raise ValueError(
            f"record {record.id!r}: data.think fine-tunes on metadata.reasoning, got {reasoning!r}"
        )
    if opened:
        # White space as the templates that open the reasoning write it.
        return f"{reasoning.strip()}\n</think>\n\n{answer}"
    return f"<think>{reasoning.strip()}</think>{answer}"


def sft(config: TrainConfig) -> Path:
    """Run or resume fine-tuning on the right answers; the folder of the trained model.

    Ignores the sections `rollout`, `advantage` and `loss`, `optim.inner_epochs` and
    `optim.inner_steps`. Errors as `train`.
    """
    with open_run(config, reference=False, kind="sft") as run:
        for step, samples in enumerate(run.batches(), start=run.done):
            watch = Stopwatch(decode=run.source.take_seconds())
            with watch.stage("policy"):
                # A trained encoder runs in the policy's pass, which needs its graph.
                run.gather()
                frozen = run.vision_is_frozen
                vision = run.clip_features(samples) if frozen else [None] * len(samples)
                groups = [
                    Group(
                        one.prompt,
                        [
                            run.processor.completion(
                                right_answer(one.record, config.data.think, one.prompt.opened)
                            )
                        ],
                        features,
                    )
                    for one, features in zip(samples, vision, strict=True)
                ]
                metrics = update(run, groups, learning_rate(step, run.config.optim))
            seconds = sum(watch.seconds.values())
            run.log_step(
                {
                    "step": step + 1,
                    **metrics,
                    **run.traffic.take(),
                    "quarantined": run.missing(samples),
                    "tokens_per_second": metrics["num_tokens"] / max(seconds, 1e-9),
                    **{f"seconds/{name}": value for name, value in watch.seconds.items()},
                    **run.validate(step + 1),
                }
            )
            run.finish_step(step + 1)
        return run.export()


def update(run: Run, groups: list[Group], lr: float) -> dict[str, float]:
    """One optimiser step on the mean loss over all ranks' completion tokens."""
    config, device = run.config, run.accelerator.device
    own = sum(len(completion) for group in groups for completion in group.completions)
    # Of all ranks: each token weighs the same wherever it is computed.
    tokens = int(run.accelerator.reduce(torch.tensor(own, device=device)))

    losses: list[torch.Tensor] = []
    for attempt in run.planner.attempts(longest_first(groups)):
        with attempt as micro_batches:
            run.optimizer.zero_grad()  # an attempt that ran out of memory left parts of gradients
            # A group has one completion, so that every micro-batch is packed.
            losses = [forward_backward(run, batch.items, tokens) for batch in micro_batches]
    total = sum(losses, torch.zeros((), dtype=torch.float64, device=device))
    # One wait for the device, after all micro-batches.
    finite = bool(total.isfinite())
    norm = clipped_step(run.optimizer, lr, config.optim, finite_loss=finite) if tokens else 0.0
    return {
        "loss": float(run.accelerator.reduce(total)),
        "grad_norm": norm,
        "lr": lr,
        "skipped_updates": int(not math.isfinite(norm)),
        "num_tokens": tokens,
    }


def forward_backward(run: Run, groups: list[Group], tokens: int) -> torch.Tensor:
    """Forward, loss and backward of one micro-batch of a step with `tokens` completion tokens; its
    loss. A function, so that after an out-of-memory error no local variable holds the graph."""
    run.check_overdue()
    logps = completion_logps(run.model, groups)
    loss = -logps.sum() / max(tokens, 1)
    loss.backward()
    return loss.detach().double()
