"""Identity of a run: settings that must equal the checkpoint's, and settings that may change."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vcr1_fast.config.loader import dump_config
from vcr1_fast.data.records import Record
from vcr1_fast.files import write_atomic
from vcr1_fast.train.config import TrainConfig

FIXED = (
    "run.seed",
    "optim.prompts_per_step",
    "data.order",
    "data.order_window",
    "data.difficulty_range",
    "model.adapter",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_targets",
    "model.freeze_vision",
)
"""Settings without which the saved weights, moments or place in the data mean something else."""
_SAMPLE = 64  # values hashed per parameter: reading all of a 7B model takes minutes


def identity(kind: str, records: Sequence[Record], order: str, model: nn.Module) -> dict[str, Any]:
    """A run's identity besides its settings: kind ("grpo" or "sft"), records, order, base weights.

    `model` must hold the base weights, before a checkpoint is loaded.
    """
    return {
        "kind of run": kind,
        # Before the records: other scores choose others, and the setting is the cause to name.
        "data.difficulty or data.order": order,
        "number of records in data.train": len(records),
        "content of data.train": _records_digest(records),
        "base weights in model.path": _weights_digest(model),
    }


def check_same_run(
    path: Path, state: Mapping[str, Any], config: TrainConfig, own: Mapping[str, Any]
) -> list[str]:
    """Lines that name each changed setting that may change.

    ValueError, naming the first difference, where the checkpoint is of another run: other data,
    base weights, kind, or one of the `FIXED` settings; or where it is past the last step.
    """
    saved, given = flat_settings(state["settings"]), flat_settings(dump_config(config))
    pairs = [(name, state["identity"].get(name), value) for name, value in own.items()]
    pairs += [(name, saved.get(name), given.get(name)) for name in FIXED]
    # The first difference is enough: they have one remedy.
    for name, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{path} was written with another {name} ({json.dumps([before, now])}): it cannot "
                "be resumed with this one; use another run.output"
            )
    if state["step"] > config.optim.steps:
        raise ValueError(
            f"{path} is {state['step']} steps in, optim.steps is {config.optim.steps}: "
            "use another run.output"
        )
    return [
        f"{name} changes from {json.dumps(saved.get(name))} to {json.dumps(given.get(name))} after "
        f"step {state['step']}"
        for name in sorted({*saved, *given})
        if saved.get(name) != given.get(name) and name != "run.output"
    ]


def keep_settings(output: Path, config: TrainConfig, step: int) -> None:
    """Write config.yaml; settings that held until `step` stay as config-until-step-N.yaml."""
    path, text = output / "config.yaml", dump_config(config)
    if path.exists() and (old := path.read_text(encoding="utf-8")) != text:
        write_atomic(path.with_name(f"config-until-step-{step:08d}.yaml"), old)
    write_atomic(path, text)


def read_settings(text: str) -> dict[str, Any]:
    """Settings of a `dump_config`, nested."""
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def flat_settings(text: str) -> dict[str, Any]:
    """Settings of a `dump_config` by dotted name."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from walk(inner, f"{prefix}.{name}" if prefix else str(name))
        else:
            yield prefix, value

    return dict(walk(yaml.safe_load(text), ""))


def _records_digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        # Not the folder of the media: a data set may move. The file's name counts.
        row = [record.id, record.task, Path(record.media).name, record.prompt, record.answer]
        row += [record.options, record.start, record.end, record.boxes]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # random numbers of run.seed
            continue
        # In bfloat16, so that the same checkpoint loaded in another dtype is the same.
        values = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(str(tuple(parameter.shape)).encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
