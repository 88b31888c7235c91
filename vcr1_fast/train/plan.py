"""The plan of a run before it starts: records, tokens, steps, memory and disk, without the weights.

Bytes are those of one process, P all parameters and T trained ones, of b bytes each in the model's
dtype (4 for float32, whose parameters are their own masters), on n processes:

                        whole copies (one process, ddp)     shards (fsdp)
    weights             b P                                 b (P - T) / n + 4 T / n
    optimiser           12 T, and 4 T of masters            12 T / n: gradients, two moments
    gathered            -                                   b P: whole weights of a step's passes
    gradients           -                                   4 T: whole, until they are reduced
    reference model     b P, without adapters               b P / n, and b P while it runs

    micro-batch         forward and backward of `optim.tokens_per_microbatch` tokens (planner.py)
    rollout             keys and values of `rollout.batch_prompts` prompts and their groups

With `hybrid`, n is the number of processes of a machine. Gradients, the reference model's whole
weights, the rollout and the reduction's buffer come one after another: the peak takes the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vcr1_fast.data.records import Record
from vcr1_fast.files import free_bytes
from vcr1_fast.model.family import family_of
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.sharding import unit_modules


@dataclass(frozen=True)
class Needs:
    """What each process of a run takes: counts of parameters, and bytes.

    processes: that hold the model; shards: that it is sharded over, 0 for whole copies.
    """

    parameters: int
    trained: int
    weights: int
    training: int
    gathered: int
    gradients: int
    buffer: int
    """Of the largest unit's gradients while they are reduced."""
    reference: int
    micro_batch: int
    checkpoint: int
    processes: int = 1
    shards: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: TrainConfig,
        processes: int = 1,
        machine: int | None = None,
        *,
        prompt: int | None = None,
    ) -> Needs:
        """From a model, whose weights need not be there (device "meta") and are not sharded yet.
        machine: processes of a machine, None: all are on one; prompt: tokens of the longest one,
        None: not known, and every token of a micro-batch may be a clip's."""
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count = sum(p.numel() for p in trained)
        masters = sum(4 * p.numel() for p in trained if p.dtype != torch.float32)
        whole = sum(p.nbytes for p in parameters)
        frozen = whole - sum(p.nbytes for p in trained)
        has_copy = config.loss.beta != 0 and not config.model.has_adapters
        tokens = config.optim.tokens_per_microbatch
        seen = tokens
        if prompt is not None:
            group = prompt + config.rollout.group_size * config.rollout.max_new_tokens
            seen = min(tokens, prompt * max(1, tokens // group))
        patches = seen * family_of(model).layout.merge ** 2
        needs = cls(
            parameters=sum(p.numel() for p in parameters),
            trained=count,
            weights=whole,
            training=masters + 12 * count,
            gathered=0,
            gradients=0,
            buffer=0,
            reference=whole if has_copy else 0,
            micro_batch=round(Footprint.of(model).bytes(tokens, tokens, patches)),
            checkpoint=sum(p.nbytes for p in trained) + masters + 8 * count,
            processes=processes,
        )
        if processes == 1 or config.run.parallel == "ddp":
            return needs
        n = processes if config.run.parallel != "hybrid" else machine or processes
        return replace(
            needs,
            weights=-(-(frozen + 4 * count) // n),
            training=-(-12 * count // n),
            gathered=whole,
            gradients=4 * count,
            buffer=4 * largest_unit(model),
            reference=-(-needs.reference // n),
            checkpoint=12 * count,
            shards=n,
        )

    def peak(self, rollout: int = 0, *, reference: bool = True) -> int:
        """Bytes at the busiest moment of a step. reference: whether the loss has a KL term."""
        held = self.weights + self.training + self.gathered + (self.reference if reference else 0)
        whole_reference = self.gathered if reference and self.reference else 0
        return held + max(
            self.gradients + max(self.micro_batch, self.buffer), whole_reference, rollout
        )


def largest_unit(model: nn.Module) -> int:
    """Trained parameters of the largest unit that is sharded by itself."""
    base = unwrap(model)
    seen: set[int] = set()
    sizes = []
    for module in [*unit_modules(base), base]:
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        sizes.append(sum(p.numel() for p in own if p.requires_grad))
    return max(sizes)


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
    batch = f"a micro-batch of {config.optim.tokens_per_microbatch} tokens"
    parts = (
        f"weights {size(needs.weights)}, gradients and optimiser {size(needs.training)}, "
        f"{batch} {size(needs.micro_batch)}"
    )
    if needs.shards:
        parts = (
            f"of each of {needs.processes} processes, in {needs.shards} shards: {parts}; whole "
            f"while a step runs: weights {size(needs.gathered)}, gradients {size(needs.gradients)}"
        )
    yield f"memory: {parts}; {size(free)} free"
    keep = config.run.keep_checkpoints
    yield (
        f"disk: {keep + 1} checkpoints of {size(needs.checkpoint)} at most, the model "
        f"{size(needs.gathered or needs.weights)}; {size(free_bytes(Path(config.run.output)))} free"
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
