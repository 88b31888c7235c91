"""A tiny model of each family, clips and groups for it, and transformers' own model beside it."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from exact_model import without_casts

from vcr1_fast.model import checkpoint
from vcr1_fast.model.family import family_named
from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group

_SIZES = {
    "hidden_size": 32,
    "heads": 2,
    "kv_heads": 1,
    "vision_hidden": 16,
    "vision_heads": 1,
    "vocab_limit": 400,
    # Norms and softmax that matter: at 0.05 nearly everything is a copy of its input.
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2_5_vl": {"layers": 2},
    "qwen3_vl": {"layers": 4, "head_dim": 16, "position_grid": 5},
    # Two layers with attention, and Gated DeltaNet layers before, between and behind them.
    "qwen3_5": {
        "layers": 5,
        "full_attention_interval": 2,
        "head_dim": 16,
        "position_grid": 5,
        "linear_key_dim": 8,
        "linear_value_dim": 12,
    },
}
FAMILIES = sorted(CONFIGS)
TIMED = [name for name in FAMILIES if name != "qwen2_5_vl"]
"""Families that write the times of a clip as text."""


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None
    times: np.ndarray | None = None


def clip(frames, height=64, width=64, fps=2.0, seed=0, times=None):
    shape = (frames, height, width, 3)
    return Clip(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), fps, times)


def image(height=64, width=64, seed=0):
    return clip(1, height, width, None, seed)


def write(path, name, **sizes):
    """A random checkpoint of the family `name`."""
    family = family_named(name)
    config = family.tiny_config(**{**_SIZES, **CONFIGS[name], **sizes})
    family.write_tiny(path, texts=["When is it visible? From 1.5 to 3.5 seconds."], config=config)
    return path


def load_exact(monkeypatch, path, name):
    """The checkpoint in float64, without casts to float32, with biases and norms that are not 0
    and 1. Its positions are those of the installed transformers."""
    without_casts(monkeypatch, name)
    model, processor = checkpoint.load(path, dtype=torch.float64, mrope="installed")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise
    return model, processor


def shapes(name):
    """(clips, lengths of completions) of each group, by the name of the case."""
    odd = int(name in TIMED)  # the others take even numbers of frames alone
    return {
        "one group": [([clip(6 - odd, 64, 96)], [5, 3, 8])],
        "ragged pack": [
            ([clip(4)], [4, 1, 7, 2]),
            ([], [1, 1]),
            ([clip(4 - odd, 64, 32), clip(2, 32, 64, seed=3)], [3, 6]),
        ],
        "images": [([image(64, 96)], [4, 2]), ([image(), clip(4 - odd), image(32, 64)], [3, 3])],
    }


def groups(processor, shape, seed=0):
    rng = random.Random(seed)
    return [
        Group(
            processor.prompt("x" * rng.randint(1, 9), clips),
            [torch.tensor([rng.randrange(256) for _ in range(n)]) for n in lengths],
        )
        for clips, lengths in shape
    ]


def media(prompt):
    """Keyword arguments of transformers' model."""
    given = {}
    if prompt.pixel_values_videos is not None:
        given["pixel_values_videos"] = prompt.pixel_values_videos
        given["video_grid_thw"] = prompt.video_grid_thw
    if prompt.pixel_values is not None:
        given["pixel_values"] = prompt.pixel_values
        given["image_grid_thw"] = prompt.image_grid_thw
    return given


def rope(model, prompt):
    """Arguments by which transformers' model counts positions itself; forgets the last prompt's."""
    model.model.rope_deltas = None
    if model.config.model_type in TIMED or prompt.pixel_values_videos is None:
        return {}
    return {"second_per_grid_ts": prompt.second_per_grid_ts}


def stock(model):
    """The same weights in transformers' model as it comes: SDPA, its own layers."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "sdpa"
    other = family_named(config.model_type).model_class()(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    return other


def alone(model, given):
    """(N,) log-probs of each completion with its own prompt, positions by transformers."""
    found = []
    for group in given:
        prompt = group.prompt
        for completion in group.completions:
            types = [prompt.mm_token_type_ids, torch.zeros_like(completion)]
            logits = model(
                input_ids=torch.cat([prompt.input_ids, completion])[None],
                mm_token_type_ids=torch.cat(types)[None],
                use_cache=False,
                **rope(model, prompt),
                **media(prompt),
            ).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(found)


def shared(model, given):
    """(N,) log-probs of the same completions, each prompt once."""
    hidden, labels, _ = completion_hidden(model, given)
    rows = F.linear(hidden, *lm_head(model)).log_softmax(-1)
    return rows.gather(1, labels[:, None])[:, 0]


def difference(model, given):
    with torch.no_grad():
        return float((shared(model, given) - alone(stock(model), given)).abs().max())


def gradients(model, logps):
    model.zero_grad(set_to_none=True)
    (logps * torch.linspace(-1.0, 1.0, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).abs().max())
        assert error <= tolerance * float(gradient.abs().max()), (name, error)
