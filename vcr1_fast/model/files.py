"""The files of a checkpoint directory: found, read, and checked before use."""

import json
import struct
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# A safetensors header is JSON that lists the tensors; the format allows at most 100 MB of it.
_MAX_HEADER = 100_000_000
_WEIGHT_FILES = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message starts with the file at fault."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: `path` itself, or the snapshot of a hub name.

    "owner/name" is a hub name unless such a directory exists; it is downloaded to the Hugging Face
    cache on first use, without weight files where `weights` is False. Anything else that is not a
    directory is a CheckpointError.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    name = str(path)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise CheckpointError(path, "no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=None if weights else _WEIGHT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            path, f"neither a directory here nor a model that could be downloaded ({error})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(path, "missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(path, f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"expected a JSON object, found {type(value).__name__}")
    return value


def check_weights(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, each one whole (its length is what its header says).

    One `model.safetensors`, which transformers prefers, or the shards that
    `model.safetensors.index.json` names.
    """
    single, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if index.exists() and not single.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(index, 'no "weight_map"')
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [single]
    for file in files:
        _check_safetensors(file)
    return files


def _check_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or not 0 < length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(path, f"truncated or not safetensors ({size} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise CheckpointError(path, "missing") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, f"damaged safetensors header ({error})") from error
    expected = 8 + length + data
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(path, f"{what}: {size} bytes, its header describes {expected}")
