"""The plan of a run before it starts: records, tokens, steps, memory and disk, without the weights.

Bytes are those of one process:

    weights         of the model as it is loaded
    training        float32 gradients, masters of half-precision weights, two moments (optim.py)
    micro-batch     forward and backward of `optim.tokens_per_microbatch` tokens (planner.py)
    rollout         keys and values of `rollout.batch_prompts` prompts and their groups (planner.py)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vcr1_fast.data.records import Record
from vcr1_fast.files import free_bytes
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.planner import Footprint


@dataclass(frozen=True)
class Needs:
    """What a run's model takes: counts of parameters, and bytes."""

    parameters: int
    trained: int
    weights: int
    training: int
    micro_batch: int
    checkpoint: int

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> Needs:
        """From a model, whose weights need not be there (device "meta")."""
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count = sum(p.numel() for p in trained)
        masters = sum(4 * p.numel() for p in trained if p.dtype != torch.float32)
        tokens = config.optim.tokens_per_microbatch
        return cls(
            parameters=sum(p.numel() for p in parameters),
            trained=count,
            weights=sum(p.nbytes for p in parameters),
            training=masters + 12 * count,
            micro_batch=round(Footprint.of(model).bytes(tokens, tokens, 0)),
            checkpoint=sum(p.nbytes for p in trained) + masters + 8 * count,
        )


def data_lines(
    config: TrainConfig, records: Sequence[Record], refused: int, *, grpo: bool
) -> Iterator[str]:
    """Records by task, steps and epochs, completions; `config` has its steps (`with_steps`)."""
    tasks = ", ".join(f"{task} {n}" for task, n in Counter(r.task for r in records).most_common())
    yield f"data: {len(records)} records ({tasks}), {refused} rows refused"
    steps, prompts = config.optim.steps, config.optim.prompts_per_step
    line = f"steps: {steps} of {prompts} prompts = {steps * prompts / len(records):.3g} epochs"
    if grpo:
        group = config.rollout.group_size
        line += f"; {group} completions each, {steps * prompts * group:,} in all"
    yield line


def model_lines(needs: Needs, config: TrainConfig, free: float) -> Iterator[str]:
    """Parameters, memory and disk."""
    adapters = " in adapters" if config.model.has_adapters else ""
    yield f"model: {_count(needs.parameters)} parameters, {_count(needs.trained)} trained{adapters}"
    parts = (
        f"weights {size(needs.weights)}, gradients and optimiser {size(needs.training)}, "
        f"a micro-batch of {config.optim.tokens_per_microbatch} tokens {size(needs.micro_batch)}"
    )
    yield f"memory: {parts}; {size(free)} free"
    keep = config.run.keep_checkpoints
    yield (
        f"disk: {keep + 1} checkpoints of {size(needs.checkpoint)} at most, the model "
        f"{size(needs.weights)}; {size(free_bytes(Path(config.run.output)))} free"
    )


def size(count: float) -> str:
    """A number of bytes with its unit, three digits."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            number = count / unit
            return f"{number:.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{count:.0f} B"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
