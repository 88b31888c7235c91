"""Checkpoints as models: a run's folder, or one of its checkpoints, written as a Hugging Face model
or as a LoRA adapter, and found where a command names one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from vcr1_fast.config.loader import build
from vcr1_fast.files import write_atomic
from vcr1_fast.model.checkpoint import save, save_adapter
from vcr1_fast.train import as_trained
from vcr1_fast.train.checkpoint import (
    PREFIX,
    check_checkpoint,
    checkpoints,
    load_state,
    load_trained_state,
)
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.resume import read_settings
from vcr1_fast.train.setup import prepare_model


def export(
    run: str | Path, step: int | None = None, *, adapter: bool = False, output: str | Path | None
) -> Path:
    """Write a checkpoint of a run as a model, adapters merged, or its adapter alone; the folder.

    run: the run's folder, or one checkpoint's. step: None takes the newest checkpoint. output: None
    writes `exports/step-N` (`exports/step-N-adapter`) in the run's folder. The base model is loaded
    from where the run had it. ValueError names what is not there; a folder that exists is replaced.
    """
    path = checkpoint_folder(Path(run), step)
    check_checkpoint(path)
    state = load_state(path)
    config = build(TrainConfig, read_settings(state["settings"]))
    if adapter and not config.model.has_adapters:
        raise ValueError(f"{path} has no adapter: the run trained the weights (model.lora_rank 0)")
    # On the CPU: a GPU may be busy with the run itself.
    settings = replace(config.model, attention="auto", gradient_checkpointing=False)
    model, processor = prepare_model(replace(config, model=settings), torch.device("cpu"))
    load_trained_state(model, state["model"])
    others = as_trained.files(config, state["identity"], state["step"])
    if output is None:
        name = f"{path.name}-adapter" if adapter else path.name
        output = path.parents[1] / "exports" / name
    if adapter:
        save_adapter(model, output, base=config.model.path, others=others)
    else:
        save(model, processor, output, others=others)
    return Path(output)


def checkpoint_folder(path: Path, step: int | None = None) -> Path:
    """The checkpoint that a run's folder and a step name. ValueError lists those that there are."""
    if path.name.startswith(PREFIX) and (path / "manifest.json").is_file():
        if step is not None and path.name != f"{PREFIX}{step:08d}":
            raise ValueError(f"{path} is not the checkpoint of step {step}")
        return path
    found, _ = checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"{path}: no run with a checkpoint")
    if step is None:
        return found[-1]
    for one in found:
        if one.name == f"{PREFIX}{step:08d}":
            return one
    steps = ", ".join(str(int(one.name.removeprefix(PREFIX))) for one in found)
    raise ValueError(f"{path}: no checkpoint of step {step}; there are {steps}")


def model_folder(name: str | Path) -> Path | None:
    """The folder of the model that a command names; None for a name that is no folder here.

    It names a model's own folder, a run's (its finished model, else its newest checkpoint), or a
    checkpoint's. A checkpoint is exported once, beside the run's other files. ValueError for an
    adapter alone.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return None
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is an adapter alone: name its run, or what vcr1 export --merged writes"
        )
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    is_checkpoint = path.name.startswith(PREFIX) and (path / "manifest.json").is_file()
    if not is_checkpoint and not (path / "checkpoints").is_dir():
        return path  # what is missing there is said when it is loaded
    found = checkpoint_folder(path)
    exported = found.parents[1] / "exports" / found.name
    written = exported / as_trained.FILE
    # A run that started again in the same folder has other weights under the same step.
    if not written.is_file() or _written_at(written) < _written_at(found / "manifest.json"):
        print(f"exporting {found} to {exported}", file=sys.stderr)
        return export(found, output=exported)
    return exported


def check_push(name: str) -> None:
    """ValueError where a folder cannot be uploaded under a name: offline mode, no such name, or no
    account. Asks the hub who the user is."""
    from huggingface_hub import HfApi, constants

    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"--push {name}: expected USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {name}: the hub is switched off (HF_HUB_OFFLINE)")
    try:
        HfApi().whoami()
    except Exception as error:  # no network, no token, a refused one: each of another class
        line = str(error).partition("\n")[0]
        raise ValueError(
            f"--push {name}: the hub does not know you ({type(error).__name__}: {line}); log in "
            "with hf auth login, or set HF_TOKEN"
        ) from error


def push(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload an exported model or adapter to the hub, with a model card; its address.

    ValueError with the hub's reason; the folder stays as it is, and the command may be run again.
    """
    from huggingface_hub import HfApi

    write_atomic(folder / "README.md", model_card(folder))
    api = HfApi()
    try:
        created = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"vcr1 export {folder.name}"
        )
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"--push {name}: {type(error).__name__}: {line}") from error
    return str(created)


def model_card(folder: Path) -> str:
    """The hub's page of a model: its base, its training, and the prompts it was trained on."""
    trained = as_trained.read(folder)
    assert trained is not None  # every export holds the file
    made, base = trained.made, str(trained.made["base"])
    is_adapter = (folder / "adapter_config.json").is_file()
    # A folder of this machine is no name on the hub.
    known = not Path(base).exists()
    head = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["vcr1_fast", str(made["kind"])],
        **({"base_model": base} if known else {}),
    }
    kind, records = str(made["kind"]).upper(), made["data"]["number"]
    origin = "LoRA adapter of" if is_adapter else "Trained from"
    lines = [
        f"# {folder.name}",
        f"{origin} {base if known else Path(base).name} by {kind} ({made['step']} steps on "
        f"{records} records), with vcr1_fast {made['vcr1_fast']}.",
        f"As trained: {trained.text()}. `vcr1 eval` and `vcr1 chat` take these from "
        f"`{as_trained.FILE}`.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(lines) + "\n"


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns
