"""Checkpoints of a run: whole or not there, and enough to go on as if nothing had happened.

    <output>/checkpoints/step-00000100/
        state.pt        step, place in the data, trained weights, optimiser
        random-0.pt     random states of process 0, one such file a process
        manifest.json   sizes of the files above; written last

The folder is written under another name and renamed, so a folder without a true manifest is what a
crash left behind. The learning rate is a function of the step and needs no state.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vcr1_fast.files import flush, rename_flushed

PREFIX = "step-"
_PARTIAL = ".partial-"


def save_checkpoint(
    folder: str | Path,
    state: dict[str, Any],
    *,
    keep: int,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write `state` (tensors and plain values, with its "step") and this process's random state.

    Every process calls this; `barrier` makes them wait for each other, process 0 writes the state,
    names the folder and deletes all but the newest `keep`. Returns the checkpoint's folder.
    """
    folder = Path(folder)
    final = folder / f"{PREFIX}{state['step']:08d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    barrier()
    _write(partial / f"random-{rank}.pt", random_state())
    if rank == 0:
        _write(partial / "state.pt", state)
    barrier()
    if rank == 0:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(sizes, indent=1) + "\n")
        flush(partial / "manifest.json")
        shutil.rmtree(final, ignore_errors=True)
        rename_flushed(partial, final)
        for old in checkpoints(folder)[0][:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(path: str | Path, *, rank: int = 0) -> dict[str, Any]:
    """The state saved in a checkpoint, on the CPU; this process's random states are set as well.

    Its tensors are views of the file: the processes of a machine share one copy, read as each is
    put in its place, where every process with one of its own would fill the memory of a node.
    """
    path = Path(path)
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    own = path / f"random-{rank}.pt"
    if own.exists():
        set_random_state(torch.load(own, map_location="cpu", weights_only=True))
    return state


def checkpoints(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """(whole checkpoints by ascending step, what interrupted writes left) in a folder."""
    whole, broken = [], []
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith((PREFIX, _PARTIAL)):
            (whole if path.name.startswith(PREFIX) and _is_whole(path) else broken).append(path)
    return whole, broken


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / "manifest.json").read_text())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name; the others are those of the base checkpoint."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Undo `trained_state`. ValueError when another set of parameters was trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != state.keys():
        different = sorted(parameters.keys() ^ state.keys())
        raise ValueError(
            f"the checkpoint trained other parameters: {len(different)} differ, e.g. {different[0]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def random_state() -> dict[str, Any]:
    """States of torch's (all devices), numpy's and Python's global generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy_state,
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])


def _write(path: Path, value: Any) -> None:
    torch.save(value, path)
    flush(path)
