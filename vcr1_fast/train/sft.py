"""Supervised fine-tuning on right answers; the loss is that of completion tokens alone."""

import math
from pathlib import Path

import torch

from vcr1_fast.data.records import Record
from vcr1_fast.model.packing import Group
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.optim import clipped_step, learning_rate
from vcr1_fast.train.setup import Run, open_run
from vcr1_fast.train.step import completion_logps, longest_first


def right_answer(record: Record, think: bool = False) -> str:
    """The completion that answers a record rightly; with `think` after the record's own reasoning.

    ValueError where `metadata.reasoning` is needed and is not a text: tags around nothing would
    teach the model not to reason.
    """
    answer = TASKS[record.task].target(record)
    if not think:
        return answer
    reasoning = record.metadata.get("reasoning")
    if not isinstance(reasoning, str) or not reasoning.strip():
        raise ValueError(
            f"record {record.id!r}: data.think fine-tunes on metadata.reasoning, got {reasoning!r}"
        )
    return f"<think>{reasoning.strip()}</think>{answer}"


def sft(config: TrainConfig) -> Path:
    """Run or resume fine-tuning on the right answers; the folder of the trained model.

    The sections `rollout`, `advantage` and `loss` of the configuration play no part, nor do
    `optim.inner_epochs` and `optim.inner_steps`. Errors as `train`.
    """
    with open_run(config, reference=False) as run:
        for step, samples in enumerate(run.batches(), start=run.done):
            watch = Stopwatch()
            watch.seconds["decode"] = run.source.take_seconds()
            with watch.stage("policy"):
                frozen = run.vision_is_frozen
                vision = run.clip_features(samples) if frozen else [None] * len(samples)
                groups = [
                    Group(
                        one.prompt,
                        [run.processor.completion(right_answer(one.record, config.data.think))],
                        features,
                    )
                    for one, features in zip(samples, vision, strict=True)
                ]
                metrics = update(run, groups, learning_rate(step, config.optim))
            seconds = sum(watch.seconds.values())
            run.log.step(
                {
                    "step": step + 1,
                    **metrics,
                    "quarantined": run.missing(samples),
                    "tokens_per_second": metrics["num_tokens"] / max(seconds, 1e-9),
                    **{f"seconds/{name}": value for name, value in watch.seconds.items()},
                }
            )
            run.finish_step(step + 1)
        return run.export()


def update(run: Run, groups: list[Group], lr: float) -> dict[str, float]:
    """One optimiser step on the mean loss of all processes' completion tokens."""
    config, device = run.config, run.accelerator.device
    own = sum(len(completion) for group in groups for completion in group.completions)
    tokens = int(run.accelerator.reduce(torch.tensor(own, device=device)))

    def micro_batch(part: list[Group]) -> torch.Tensor:
        logps = completion_logps(run.model, part)
        loss = -logps.sum() / max(tokens, 1)
        loss.backward()
        return loss.detach().double()

    def restart() -> list[Group]:
        run.optimizer.zero_grad()
        return longest

    longest = longest_first(groups)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total = sum(run.planner.run(longest, micro_batch, restart), zero)
    norm = clipped_step(run.optimizer, lr, config.optim) if tokens else 0.0
    return {
        "loss": float(run.accelerator.reduce(total)),
        "grad_norm": norm,
        "lr": lr,
        "skipped_updates": int(not math.isfinite(norm)),
        "num_tokens": tokens,
    }
