"""`vcr1 train --dry-run` and `vcr1 plan`: the plan of a run, with some of its clips decoded and
without its weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record
from vcr1_fast.data.requests import clip_key, clip_request
from vcr1_fast.data.video import ClipReader, VideoError
from vcr1_fast.files import free_bytes
from vcr1_fast.model.checkpoint import DTYPES, load_processor
from vcr1_fast.model.family import family_named
from vcr1_fast.model.files import read_json, resolve
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.vision import freeze_vision
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.ops.memory import available_bytes
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import ModelConfig, TrainConfig
from vcr1_fast.train.dataset import training_records
from vcr1_fast.train.difficulty import select
from vcr1_fast.train.plan import Needs, data_lines, model_lines, size
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.setup import add_adapters
from vcr1_fast.train.trackers import check_installed

SAMPLED_CLIPS = 32
"""Clips that are decoded to count tokens, at even distances in the records."""


@dataclass(frozen=True)
class Machines:
    """Where a run is to be planned for.

    processes: one a GPU; machine: processes of one machine, None for all of them; memory: bytes of
    each GPU (or of main memory for each process), None for what this machine has free.
    """

    processes: int = 1
    machine: int | None = None
    memory: float | None = None


def dry_run(
    config: TrainConfig, *, grpo: bool, machines: Machines = Machines()
) -> tuple[list[str], bool]:
    """(lines of the plan, whether it fits in memory and on the disk). Neither weights nor GPU time
    are used, and nothing is written. ValueError as a run would raise for its settings and data."""
    check_installed(config.run.trackers or ())
    quarantine = Quarantine()
    chosen = select(training_records(config.data, quarantine), config.data, config.run.seed)
    config = config.with_steps(len(chosen.records))
    lines = [*chosen.notes]
    lines += data_lines(config, chosen.records, len(quarantine), grpo=grpo)
    directory = resolve(config.model.path, weights=False)
    processor = load_processor(directory, mrope=config.model.mrope).with_frames(
        config.data.frames, media_first=config.data.media_first
    )
    tokens, frames, faults = clip_tokens(chosen.records, processor, config)
    lines += [f"cannot be shown: {fault}" for fault in faults[:3]]
    if not tokens:
        return [*lines, "no clip can be shown"], False
    lines.append(
        f"prompts: {statistics.median(tokens):.0f} tokens in the median, {max(tokens)} at most; "
        f"{statistics.median(frames):.0f} and {max(frames)} frames (of {len(tokens)} clips"
        f"{f', {len(faults)} more cannot be shown' if faults else ''})"
    )
    model = skeleton(directory, config.model)
    needs = Needs.of(
        model,
        config,
        machines.processes,
        machines.machine,
        prompt=max(tokens) if grpo else None,
    )
    use_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    free = machines.memory
    if free is None:
        free = float(available_bytes(torch.device("cpu" if use_cpu else "cuda")))
    lines += model_lines(needs, config, free)
    rollout_bytes = 0
    if grpo:
        rollout = config.rollout
        own_prompts = -(-config.optim.prompts_per_step // machines.processes)
        together = min(rollout.batch_prompts, own_prompts)
        rollout_bytes = round(
            Footprint.of(model).rollout_bytes(
                [max(tokens)] * together,
                rollout.group_size,
                rollout.max_new_tokens,
                truncated=bool(rollout.top_k) or rollout.top_p < 1,
            )
        )
        lines.append(f"rollout: {size(rollout_bytes)} for {together} prompts together")
    peak = needs.peak(rollout_bytes, reference=grpo)
    # What no smaller step can take away.
    least = replace(needs, micro_batch=0).peak(reference=grpo)
    model_bytes = needs.gathered or needs.weights
    disk = (config.run.keep_checkpoints + 1) * needs.checkpoint + model_bytes
    fits = least < free and disk < free_bytes(Path(config.run.output))
    reference = ", with the reference model" if grpo and needs.reference else ""
    if least >= free:
        lines += remedies(model, config, machines, free, grpo=grpo)
    lines.append(
        f"in all {size(peak)} of memory{reference}: "
        + ("fits" if peak < free else "a step must be cut smaller" if fits else "too much")
    )
    return lines, fits


def remedies(
    model: nn.Module, config: TrainConfig, machines: Machines, free: float, *, grpo: bool
) -> Iterator[str]:
    """What would make a run fit whose weights, gradients and optimiser do not."""

    def fits(settings: TrainConfig, processes: int) -> bool:
        needs = Needs.of(model, settings, processes, machines.machine)
        return replace(needs, micro_batch=0).peak(reference=grpo) < free

    sharded = replace(config, run=replace(config.run, parallel="auto"))
    for processes in (2, 4, 8, 16, 32, 64):
        if processes > machines.processes and fits(sharded, processes):
            yield f"it would fit on {processes} processes with run.parallel=fsdp"
            break
    if grpo and config.loss.beta != 0 and not config.model.has_adapters:
        without = replace(config, loss=replace(config.loss, beta=0.0))
        if fits(without, machines.processes):
            yield "it would fit with loss.beta=0, without the reference model"
    if not config.model.has_adapters:
        yield "model.lora_rank=64 trains adapters alone: the weights, and little beside them"


def clip_tokens(
    records: Sequence[Record], processor: Processor, config: TrainConfig
) -> tuple[list[int], list[int], list[str]]:
    """(prompt tokens, frames, faults) of at most SAMPLED_CLIPS records with different clips."""
    distinct = list({clip_key(record): record for record in records}.values())
    stride = max(1, -(-len(distinct) // SAMPLED_CLIPS))
    sampled = distinct[::stride]
    tokens, frames, faults = [], [], []
    data = config.data
    with ClipReader(
        backend=data.decoder,
        timeout=data.decode_timeout,
        workers=data.decode_workers,
        prefetch_bytes=data.prefetch_mb << 20,
        fit=processor.fit(),
    ) as reader:
        requests = (clip_request(record, processor.frames) for record in sampled)
        for record, clip in zip(sampled, reader.read(requests), strict=True):
            try:
                if isinstance(clip, VideoError):
                    raise clip
                text = TASKS[record.task].prompt(record, data.think)
                prompt = processor.prompt(text, [clip], system=data.system, think=data.think)
            except (ValueError, KeyError) as error:
                faults.append(f"{record.id}: {error}")
            else:
                tokens.append(len(prompt))
                frames.append(len(clip.frames))
    return tokens, frames, faults


def skeleton(directory: Path, settings: ModelConfig) -> nn.Module:
    """The model to train on the device "meta", without weights; with adapters and frozen parts."""
    from transformers import AutoConfig

    family = family_named(read_json(directory / "config.json").get("model_type"))
    with torch.device("meta"):
        model: Any = family.model_class()(AutoConfig.from_pretrained(directory))
        model.to(DTYPES[settings.dtype])
        if settings.adapter is not None:
            adapter = read_json(Path(settings.adapter) / "adapter_config.json")
            targets = adapter["target_modules"]
            settings = replace(
                settings, adapter=None, lora_rank=adapter["r"], lora_targets=tuple(targets)
            )
        if settings.lora_rank:
            model = add_adapters(model, settings)
    if settings.freeze_vision:
        freeze_vision(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model
