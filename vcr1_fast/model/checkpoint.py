"""Load and save checkpoints of any family: the standard Hugging Face directory, nothing else.

config.json, generation_config.json, (sharded) safetensors, tokenizer, chat template and
preprocessor settings. A directory written here loads in transformers, vLLM and the rest.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vcr1_fast.files import flush, rename_flushed
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.family import Family, family_named
from vcr1_fast.model.files import CheckpointError, check_weights, read_json, resolve
from vcr1_fast.model.processor import Mrope, Processor, VideoText
from vcr1_fast.model.vision import prepare_vision
from vcr1_fast.model.wrapping import unwrap

__all__ = ["CheckpointError", "load", "save", "unwrap"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    mrope: Mrope = "trained",
    video_text: VideoText = "trained",
) -> tuple[Any, Processor]:
    """Load a checkpoint for training or inference (in evaluation mode; no dropout is configured).

    Args:
        path: directory, or a name on the Hugging Face hub.
        dtype: of the weights; float64 is for tests.
        device: where the weights go.
        attention: the language model's attention in transformers' terms: "sdpa", "eager", ...
        mrope: positions as the checkpoints were trained with, or as the installed transformers has
            them; the processor writes them into every prompt.
        video_text: the same choice for the text that stands for a clip.

    Returns:
        (model, processor): transformers' model and our `Processor`, of the family that config.json
        names in `model_type`.

    Raises:
        CheckpointError: naming the file that is missing, truncated or does not fit the model.
        ValueError: for an unknown dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    directory = resolve(path)
    family = _family(directory)
    files = check_weights(directory)
    processor = family.load_processor(directory, mrope=mrope, video_text=video_text)
    with _quiet():
        model, info = family.model_class().from_pretrained(
            directory, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    # transformers fills missing tensors with random numbers and only logs it.
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:4])
            raise CheckpointError(files[0], f"{len(info[kind])} {kind.replace('_', ' ')}: {names}")
    prepare_vision(model)
    if attention == "sdpa":
        prepare_attention(model)
    return model.to(device).eval(), processor


def load_processor(
    path: str | Path, *, mrope: Mrope = "trained", video_text: VideoText = "trained"
) -> Processor:
    """The processor of a checkpoint alone; arguments and errors as `load`."""
    directory = resolve(path)
    return _family(directory).load_processor(directory, mrope=mrope, video_text=video_text)


def save(
    model: nn.Module,
    processor: Processor,
    path: str | Path,
    *,
    others: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all; an older one at `path` is replaced.

    LoRA adapters (peft) are added into the weights that are written; the model in memory does not
    change. `others`: text of further files by name. Files are flushed to disk before the directory
    takes its name.
    """
    base = unwrap(model)
    with _staged(Path(path), others) as staging:
        with _quiet():
            base.save_pretrained(staging, state_dict=merged_state_dict(model))
        processor.save_pretrained(staging)


def save_adapter(
    model: Any, path: str | Path, *, base: str, others: Mapping[str, str] | None = None
) -> None:
    """Write the trained adapter of a peft model as peft does, whole or not at all:
    adapter_config.json, which names the checkpoint `base`, and adapter_model.safetensors."""
    model.peft_config["default"].base_model_name_or_path = base
    with _staged(Path(path), others) as staging:
        # "auto" would ask the hub whether the base model's vocabulary is larger.
        model.save_pretrained(
            staging,
            state_dict=whole_tensors(model),
            selected_adapters=["default"],
            save_embedding_layers=False,
        )


@contextmanager
def _staged(path: Path, others: Mapping[str, str] | None) -> Iterator[Path]:
    """A folder to write to, which takes the name `path` when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        for name, text in (others or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
            flush(file)
        rename_flushed(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """State of the base model with its active adapters added in; None where there are none, and the
    model's own `state_dict` serves."""
    base = unwrap(model)
    if base is model or not hasattr(model, "peft_config"):
        sharded: Any = base if isinstance(base, FSDPModule) else None
        return None if sharded is None else whole_tensors(sharded)
    return dict(_merged(model))


def policy_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter with active adapters added in, one at a time; a tied head
    is left out. Names are transformers'."""
    base = unwrap(model)
    if base is model or not hasattr(model, "peft_config"):
        yield from base.named_parameters()
        return
    for name, tensor in _merged(model):
        if not (base.config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, tensor


def _merged(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """State of a peft model's base, adapters added in: a layer's weight becomes W + scale * B A, as
    `merge_adapter` of peft would make it, out of place."""
    base = unwrap(model)
    layers = {
        name: layer for name, layer in base.named_modules() if hasattr(layer, "get_delta_weight")
    }
    for key, value in whole_tensors(base).items():
        if ".lora_" in key or ".lora_magnitude_vector." in key or ".original_module." in key:
            continue
        key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
        owner, _, leaf = key.rpartition(".base_layer.")
        if owner not in layers:
            yield key, value
            continue
        if leaf == "weight":
            layer = layers[owner]
            for adapter in layer.active_adapters:
                value = value + layer.get_delta_weight(adapter).to(value.dtype)
        yield f"{owner}.{leaf}", value


def whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of `state_dict`, tied ones under each name, as the modules hold them: FSDP2's own
    `state_dict` would give shards of a model whose weights are gathered."""
    found = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _family(directory: Path) -> Family:
    """The family that config.json names."""
    path = directory / "config.json"
    try:
        return family_named(read_json(path).get("model_type"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars of transformers: the caller has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
