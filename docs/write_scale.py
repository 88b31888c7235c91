"""Write the memory tables of docs/scale.md from the plan of a run: `python docs/write_scale.py`."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vcr1_fast.config.loader import load_config
from vcr1_fast.model.family import family_named
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.plan import Needs
from vcr1_fast.train.planner import GIB, Footprint
from vcr1_fast.train.setup import add_adapters

PAGE = Path(__file__).parent / "scale.md"
GPUS = {"80 GB": 79.6, "141 GB": 139.8}
"""GiB that a GPU of that name has."""
USABLE = 0.94
"""Share left beside the CUDA context, communication buffers and fragments of the allocator."""
PROCESSES = (1, 8, 16, 64)
PROMPT, COMPLETION = 4096, 1024
# Published shapes of Qwen2.5-VL: hidden, layers, heads, key heads, MLP, vocabulary, tied head;
# MLP of the vision encoder.
SHAPES = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}


@cache
def model_of(name: str) -> Any:
    """The model on the device "meta", in bfloat16, its vision encoder trained."""
    from transformers import Qwen2_5_VLConfig

    hidden, layers, heads, keys, mlp, vocabulary, tied, vision_mlp = SHAPES[name]
    config = Qwen2_5_VLConfig(
        tie_word_embeddings=tied,
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "intermediate_size": mlp,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": vision_mlp,
            "out_hidden_size": hidden,
        },
    )
    with torch.device("meta"):
        model = family_named("qwen2_5_vl").model_class()(config).to(torch.bfloat16)
    checkpoint_activations(model)
    return model


@cache
def adapted(name: str) -> Any:
    """The same with adapters of rank 64, its vision encoder frozen."""
    model_of.cache_clear()  # peft changes the model in place
    settings = settings_of("model.lora_rank=64", "model.freeze_vision=true").model
    with torch.device("meta"):
        model = add_adapters(model_of(name), settings)
    model_of.cache_clear()
    return model


def settings_of(*overrides: str) -> TrainConfig:
    """A run of the defaults, with gradient checkpointing."""
    given = ("model.path=m", "data.train=d", "run.output=o", "model.gradient_checkpointing=true")
    return load_config(TrainConfig, None, [*given, *overrides])


@cache
def needs_of(name: str, processes: int, lora: bool) -> tuple[Needs, int, float, float]:
    """(what a process holds, bytes of the rollout, bytes of a micro-batch of no and of one more
    token)."""
    model = adapted(name) if lora else model_of(name)
    found = []
    for tokens in (16384, 32768):
        # Half of the tokens are the prompt's, the other half its completions'.
        more = f"rollout.max_new_tokens={tokens // 16}"
        config = settings_of(f"optim.tokens_per_microbatch={tokens}", more)
        if lora:
            config = replace(config, model=replace(config.model, lora_rank=64))
        found.append(Needs.of(model, config, processes, prompt=tokens // 2))
    token = (found[1].micro_batch - found[0].micro_batch) / 16384
    rollout = Footprint.of(model).rollout_bytes([PROMPT], 8, COMPLETION, truncated=False)
    return found[0], round(rollout), found[0].micro_batch - 16384 * token, token


def peak(name: str, processes: int, tokens: int = 8192, *, lora: bool = False) -> float:
    """GiB of one process at the busiest moment of a step with micro-batches of `tokens` tokens."""
    needs, rollout, nothing, token = needs_of(name, processes, lora)
    # All but the head's chunks, which are as large from a few thousand tokens on, is linear.
    return replace(needs, micro_batch=round(nothing + tokens * token)).peak(rollout) / GIB


def fits(gib: float) -> str:
    """The names of the GPUs that hold so much."""
    return ", ".join(gpu for gpu, size in GPUS.items() if gib <= USABLE * size) or "none"


def longest(name: str, processes: int, gpu: str, *, lora: bool) -> int:
    """Tokens of the longest micro-batch, in steps of 1,024, at most 128 Ki."""
    tokens = 0
    while tokens < 2**17 and peak(name, processes, tokens + 1024, lora=lora) <= USABLE * GPUS[gpu]:
        tokens += 1024
    return tokens


def tables() -> str:
    """Both tables."""
    head = ["model", "trained", *(f"{n} GPU{'s' * (n > 1)}" for n in PROCESSES)]
    rows = [head, ["---"] * len(head)]
    for name in SHAPES:
        for lora in (False, True):
            cells = [f"Qwen2.5-VL-{name}", "LoRA" if lora else "all weights"]
            for n in PROCESSES:
                gib = peak(name, n, lora=lora)
                cells.append(f"{gib:.0f} GiB: {fits(gib)}")
            rows.append(cells)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    head = ["model", "trained", *(f"8 GPUs of {gpu}" for gpu in GPUS)]
    rows = [head, ["---"] * len(head)]
    for name in ("3B", "7B", "32B"):
        for lora in (False, True):
            cells = [f"Qwen2.5-VL-{name}", "LoRA" if lora else "all weights"]
            cells += [f"{longest(name, 8, gpu, lora=lora):,}" for gpu in GPUS]
            rows.append(cells)
    longer = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", LONG, "", *longer])


LONG = (
    """Tokens of the longest micro-batch that fits, in steps of 1,024, looked for up to 131,072:"""
)
BEGIN = "<!-- tables: written by docs/write_scale.py -->\n"
END = "\n<!-- end of tables -->"


def text() -> str:
    """The page with its tables of today."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
