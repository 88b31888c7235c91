"""Checkpoints of a run, each complete or absent, from which a run resumes bit for bit.

    <output>/checkpoints/step-00000100/
        state.pt        step, place in the data, settings; trained weights and optimiser, if whole
        shards/         these by torch.distributed.checkpoint, each rank its part, of a sharded run
        random-0.pt     random states of rank 0, one such file a rank
        manifest.json   bytes and SHA-256 of the files above; written last

The folder is written under another name and renamed, so a folder whose files differ from its
manifest was left by a crash. The learning rate is a function of the step and needs no state. Whole
or in shards, a checkpoint resumes on any number of processes, sharded or not.
"""

import errno
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from vcr1_fast.files import flush, rename_flushed, write_atomic

PREFIX = "step-"
_PARTIAL = ".partial-"
_MARGIN = 64 * 2**20
"""Free bytes that a checkpoint leaves on the disk, for logs and file-system metadata."""


KINDS = ("weights", "exp_avg", "exp_avg_sq")
"""What a sharded run saves of each trained parameter, as <kind>/<name>."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's file that differs from its manifest or cannot be read; names the file."""


def save_checkpoint(
    folder: str | Path,
    state: dict[str, Any],
    *,
    keep: int,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
    gather: Callable[[list[Any]], list[Any]] = lambda own: own,
    shards: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `state` (tensors and plain values, with its "step"), this rank's random state, and its
    part of `shards`, sharded tensors by name.

    Every rank calls this; `barrier` makes them wait for each other, `gather` joins their lists;
    rank 0 writes the state, names the folder and deletes all but the newest `keep`. Returns the
    checkpoint's folder. OSError, before anything is written, where the disk has too little space; a
    write that fails leaves no partial folder behind.
    """
    folder = Path(folder)
    final = folder / f"{PREFIX}{state['step']:08d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        # A crash may have left it; the check counts its space as free.
        shutil.rmtree(partial, ignore_errors=True)
        check_space(folder, state_bytes(state) + state_bytes(dict(shards or {})))
        partial.mkdir()
    barrier()
    try:
        _write(partial / f"random-{rank}.pt", random_state())
        written = [f"random-{rank}.pt"]
        if rank == 0:
            _write(partial / "state.pt", state)
            written.append("state.pt")
        if shards is not None:
            _save_shards(partial / "shards", shards)
            # Files of this rank; the index of all is rank 0's.
            patterns = [f"shards/__{rank}_*", *(["shards/.metadata"] if rank == 0 else [])]
            found = (file for pattern in patterns for file in partial.glob(pattern))
            written += [file.relative_to(partial).as_posix() for file in found]
        # Each rank reads its own files back: one process would take minutes for a large model.
        listed = gather([(name, _fingerprint(partial / name)) for name in sorted(written)])
        if rank == 0:
            manifest = dict(sorted(listed))
            write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            # A resumed run may reach the step of a checkpoint that was found damaged.
            shutil.rmtree(final, ignore_errors=True)
            rename_flushed(partial, final)
    except OSError:
        # A full disk stays full as long as the partial folder is there.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        for old in checkpoints(folder)[0][:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(path: str | Path, *, rank: int = 0, whole: bool = True) -> dict[str, Any]:
    """The state saved in a checkpoint, on the CPU; this rank's random states are set as well.

    Its tensors are views of the file: the ranks of a machine share one copy in the page cache,
    where a copy per rank would fill a node's memory. Those of a checkpoint in shards are read only
    if `whole`. DamagedCheckpoint, naming the file, where it cannot be read.
    """
    path = Path(path)
    state = load_state(path, whole=whole)
    own = path / f"random-{rank}.pt"
    if own.exists():
        set_random_state(_read(own))
    return state


def load_state(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """The state of `load_checkpoint` alone; random states stay as they are."""
    state: dict[str, Any] = _read(path / "state.pt", mmap=True)
    if whole and (path / "shards").is_dir():
        # As a run without shards writes it: float32 weights are masters too.
        weights, first, second = _whole_shards(path / "shards", state["names"])
        updates = torch.tensor(float(state["updates"]))
        moments = {
            i: {"step": updates.clone(), "exp_avg": m, "exp_avg_sq": v}
            for i, (m, v) in enumerate(zip(first, second, strict=True))
        }
        state["model"] = dict(zip(state["names"], weights, strict=True))
        state["optimizer"] = {
            "adamw": {"state": moments, "param_groups": state["param_groups"]},
            "masters": weights,
        }
    return state


def load_shards(path: Path, shards: Mapping[str, Tensor]) -> None:
    """Fill sharded tensors, by name, from a checkpoint's, whatever number of ranks wrote it. Every
    rank calls this. DamagedCheckpoint, naming the folder, where a tensor is missing or differs in
    shape."""
    try:
        dcp.load(dict(shards), checkpoint_id=path / "shards")
    except Exception as error:  # a collective error holds the ranks' own
        raise DamagedCheckpoint(f"{path / 'shards'}: cannot be read ({_line(error)})") from error


def copy_into(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be sharded; no collective."""
    mesh = getattr(target, "device_mesh", None)
    with torch.no_grad():
        if mesh is not None:
            sharded: Any = target
            whole = whole.to(mesh.device_type, target.dtype)
            whole = distribute_tensor(whole, mesh, sharded.placements, src_data_rank=None)
        target.copy_(whole)


def _save_shards(folder: Path, shards: Mapping[str, Tensor]) -> None:
    try:
        dcp.save(dict(shards), checkpoint_id=folder)
    except Exception as error:  # every rank gets the error of any
        raise OSError(errno.EIO, f"cannot be written ({_line(error)})", str(folder)) from error


def _whole_shards(folder: Path, names: list[str]) -> list[list[Tensor]]:
    """Whole tensors on the CPU, lists of weights, first and second moments in the order of
    `names`."""
    try:
        reader = dcp.FileSystemReader(folder)
        found: Any = reader.read_metadata().state_dict_metadata
        whole = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in found.items()
        }
        dcp.load(whole, storage_reader=reader, no_dist=True)
    except Exception as error:  # a damaged file fails in zip, pickle or tensor code alike
        raise DamagedCheckpoint(f"{folder}: cannot be read ({_line(error)})") from error
    return [[whole[f"{kind}/{name}"] for name in names] for kind in KINDS]


def check_checkpoint(path: Path) -> None:
    """DamagedCheckpoint, naming the file, where a file differs from the manifest's SHA-256."""
    for name, expected in _manifest(path).items():
        if _fingerprint(path / name) != expected:
            raise DamagedCheckpoint(f"{path / name}: differs from its SHA-256 in manifest.json")


def checkpoints(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """(complete checkpoints by ascending step, leftovers of interrupted writes) in a folder.

    Complete: every file has the size that the manifest says; `check_checkpoint` reads them too.
    """
    whole: list[Path] = []
    broken: list[Path] = []
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith((PREFIX, _PARTIAL)):
            (whole if path.name.startswith(PREFIX) and _is_whole(path) else broken).append(path)
    return whole, broken


def state_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(state_bytes, value.values()))
    return sum(map(state_bytes, value)) if isinstance(value, list | tuple) else 0


def check_space(folder: Path, needed: int) -> None:
    """OSError (ENOSPC), with the numbers, where `needed` bytes do not fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        reason = f"{needed / 2**30:.2f} GiB are needed here, {free / 2**30:.2f} GiB are free"
        raise OSError(errno.ENOSPC, reason, str(folder))


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries. OSError or ValueError where it is missing or not one."""
    manifest = json.loads((path / "manifest.json").read_text())
    if not isinstance(manifest, dict) or "state.pt" not in manifest:
        raise ValueError(f"{path / 'manifest.json'}: lists no state.pt")
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        files = _manifest(path).items()
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters by name; the others are the base checkpoint's."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a `trained_state`. ValueError where it holds other parameters, or other shapes."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != state.keys():
        different = sorted(parameters.keys() ^ state.keys())
        raise ValueError(
            f"the checkpoint trained other parameters: {len(different)} differ, e.g. {different[0]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"the checkpoint trained {name} of shape {tuple(state[name].shape)}, the run has "
                f"{tuple(parameter.shape)} (model.lora_rank?)"
            )
    for name, parameter in parameters.items():
        copy_into(parameter, state[name])


def random_state() -> dict[str, Any]:
    """RNG states of torch (all devices), numpy and Python."""
    state: Any = np.random.get_state()  # annotated as a tuple or a dict
    kind, keys, position, has_gauss, cached = state
    numpy_state = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy_state,
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a `random_state`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])


def _write(path: Path, value: Any) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # torch's writer does not raise OSError on a full disk
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
    flush(path)


def _read(path: Path, *, mmap: bool = False) -> Any:
    try:
        # weights_only: a checkpoint from elsewhere must not run code.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in zip, pickle or tensor code alike
        raise DamagedCheckpoint(f"{path}: cannot be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
