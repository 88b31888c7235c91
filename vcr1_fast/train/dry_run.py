"""`vcr1 train --dry-run` and `vcr1 plan`: the plan of a run, with some of its clips decoded and
without its weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
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


def dry_run(config: TrainConfig, *, grpo: bool) -> tuple[list[str], bool]:
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
    needs = Needs.of(model, config)
    use_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    free = float(available_bytes(torch.device("cpu" if use_cpu else "cuda")))
    lines += model_lines(needs, config, free)
    work = needs.micro_batch
    if grpo:
        rollout = config.rollout
        work = max(
            work,
            rollout_bytes := round(
                Footprint.of(model).rollout_bytes(
                    [max(tokens)] * min(rollout.batch_prompts, config.optim.prompts_per_step),
                    rollout.group_size,
                    rollout.max_new_tokens,
                    truncated=bool(rollout.top_k) or rollout.top_p < 1,
                )
            ),
        )
        lines.append(f"rollout: {size(rollout_bytes)} for {rollout.batch_prompts} prompts together")
    copies = 2 if grpo and config.loss.beta != 0 and not config.model.has_adapters else 1
    total = copies * needs.weights + needs.training
    disk = (config.run.keep_checkpoints + 1) * needs.checkpoint + needs.weights
    fits = total < free and disk < free_bytes(Path(config.run.output))
    reference = ", with the reference model" if copies == 2 else ""
    lines.append(
        f"in all {size(total + work)} of memory{reference}: "
        + ("fits" if total + work < free else "a step must be cut smaller" if fits else "too much")
    )
    return lines, fits


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
