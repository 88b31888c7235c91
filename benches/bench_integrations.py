"""A training step of TRL with our ops in it, beside the same step as TRL runs it.

Text: `GRPOTrainer`'s loss with its backward pass on given completions, TRL's own fused LM head on,
without and with `patch_trl()`; trainer, model and batch are the same objects. The head's share of
the work is that of a small model with a real vocabulary. Off a GPU, TRL 1.16 sends the prompt
through its head as well, and ours does not: the first rows' ratio includes that, the second's
prompt is one token.

Video: `VideoGRPOTrainer` beside the plain repeated form, in which each completion has its own copy
of prompt and clip, as TRL trains on images, with its fused head and the batched vision encoder.

Losses and gradients are compared before anything is timed. The limit, "bare products", are the
matrix products of the model's linear layers and of the head over completion tokens, forward and
backward, and nothing else.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from harness import Bench, arguments
from peers import load_module
from torch import Tensor, nn

trl: Any = load_module("trl")
if isinstance(trl, str):
    sys.exit(f"trl {trl}: nothing to compare with")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402

from vcr1_fast.integrations.trl import patch_trl  # noqa: E402
from vcr1_fast.integrations.trl_video.trainer import Shown, VideoGRPOConfig, VideoGRPOTrainer  # noqa: E402
from vcr1_fast.model.checkpoint import load  # noqa: E402
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny  # noqa: E402

# prompt tokens, completion tokens, completions, vocabulary, width, under bfloat16 autocast
TEXT = (
    (32, 32, 4, 151_936, 256, False),
    (1, 32, 4, 151_936, 256, False),
    (32, 32, 4, 151_936, 256, True),
    (32, 128, 32, 512, 64, False),
)
# model, prompt tokens, completion tokens, completions
VIDEO = (("0.7M", 512, 64, 8), ("0.7M", 2048, 64, 8))
VIDEO_MODELS = {"0.7M": TinyConfig(hidden_size=64, layers=6, vision_hidden=48, vocab_limit=4096)}
TOKENS_A_GRID = 64  # of a frame pair of 224 x 224 pixels


@dataclass
class Clip:
    frames: np.ndarray
    fps: float = 2.0


def settings(device: str, output: str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": output,
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "loss_type": "dapo",
        **changes,
    }


def text_trainer(case: tuple, device: str, folder: str) -> Any:
    _, length, count, vocab, width, autocast = case
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    arguments = settings(
        device,
        folder,
        bf16=autocast,
        per_device_train_batch_size=count,
        num_generations=count,
        max_completion_length=length,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer,
    )


def batch_of(prompt: Tensor, completions: Tensor) -> dict[str, Tensor]:
    """What TRL's trainer hands to its loss: prompt (P,), completions (G, C)."""
    count, device = len(completions), prompt.device
    prompts = prompt.expand(count, -1)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.linspace(-1, 1, count, device=device),
        "num_items_in_batch": torch.tensor(completions.numel(), device=device),
        "shown": torch.zeros(count, dtype=torch.int64),
    }


def patched_objects() -> list[tuple[Any, str, Any]]:
    """(owner, name, what the patch puts there), to be swapped in without the patch's checks, which
    a training run makes once and not in every step."""
    trainer = trl.GRPOTrainer
    names = [(utils, "_ChunkedLogProbFunction"), (utils, "_use_triton"), (trainer, "_compute_loss")]
    with patch_trl():
        return [(owner, name, vars(owner)[name]) for owner, name in names if hasattr(owner, name)]


@contextmanager
def put(objects: list[tuple[Any, str, Any]]):
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in objects]
    for owner, name, value in objects:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def bare_products(
    model: nn.Module, labels: int, once: Callable[[], object], dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """A callable that multiplies what the linear layers of `once` multiply and what the head does
    over `labels` tokens, forward and backward, in `dtype`."""
    head = model.get_output_embeddings()
    sizes: list[tuple[int, nn.Linear]] = [(labels, head)]
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: sizes.append((inputs[0].numel() // module.in_features, module))
        )
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    once()
    for hook in hooks:
        hook.remove()
    work = []
    for rows, module in sizes:
        weight = module.weight.detach().to(dtype)
        x = torch.randn(rows, module.in_features, device=weight.device, dtype=dtype)
        out = torch.empty(rows, module.out_features, device=weight.device, dtype=dtype)
        work.append((x, weight, out, torch.empty_like(weight)))

    def multiply() -> None:
        for x, weight, out, gradient in work:
            torch.mm(x, weight.t(), out=out)
            torch.mm(out, weight)
            torch.mm(out.t(), x, out=gradient)

    return multiply


def assert_same(name: str, ours: nn.Module, theirs: dict[str, Tensor], tolerance: float) -> None:
    for key, parameter in ours.named_parameters():
        if key in theirs:
            gap = (parameter.grad - theirs[key]).abs().max() / theirs[key].abs().max()
            if not gap <= tolerance:
                raise ValueError(f"{name}: gradients of {key} differ by {float(gap):.1e}")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def bench_text(bench: Bench, case: tuple) -> None:
    prompt, length, count, vocab, width, autocast = case
    with tempfile.TemporaryDirectory() as folder:
        trainer = text_trainer(case, bench.device.type, folder)
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (prompt + count * length,), generator=generator)
    ids = ids.to(model.device)
    batch = batch_of(ids[:prompt], ids[prompt:].view(count, length))
    ours = patched_objects()

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    def step() -> None:
        clear()
        trainer.compute_loss(model, batch).backward()

    def patched() -> None:
        with put(ours):
            step()

    step()
    theirs = gradients(model)
    patched()
    name = f"P={prompt} C={length} G={count} V={vocab} H={width}"
    assert_same(name, model, theirs, 5e-2 if autocast else 1e-4)
    dtype = torch.bfloat16 if autocast else torch.float32
    limit = bare_products(model, count * length, step, dtype)
    bench.run(
        "TRL GRPO step, text",
        name,
        "bfloat16 autocast" if autocast else "float32",
        {f"TRL {trl.__version__}": step, "bare products": limit, "ours": patched},
        0,
        limit="bare products",
        memory=clear,
        rounds=3,
    )


def bench_video(bench: Bench, name: str, prompt: int, length: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        numbers = " ".join(f"{i / 100:.2f}" for i in range(6000))
        write_tiny(Path(folder) / name, texts=[numbers], config=VIDEO_MODELS[name])
        model, processor = load(Path(folder) / name, device=bench.device)
        args = VideoGRPOConfig(
            **settings(
                bench.device.type,
                folder,
                per_device_train_batch_size=count,
                num_generations=count,
                max_completion_length=length,
                freeze_vision=False,
                decode_workers=0,
                frame_kwargs={"min_pixels": 224 * 224, "max_pixels": 224 * 224},
            )
        )
        trainer = VideoGRPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args,
            Dataset.from_dict({"prompt": ["a"], "video": ["a"]}),
            processor=processor,
        )
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    grids = prompt // TOKENS_A_GRID
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2 * grids, 224, 224, 3), dtype=np.uint8)
    shown = processor.prompt("When is it visible?", [Clip(frames)])
    trainer._shown[True] = [Shown(shown, 1.0)]
    completions = torch.randint(250, (count, length), generator=torch.Generator().manual_seed(0))
    batch = batch_of(shown.input_ids.to(model.device), completions.to(model.device))

    positions = shown.positions
    after = positions.max() + 1 + torch.arange(length)
    positions = torch.cat([positions, after.expand(3, -1)], dim=1)
    copies = {
        "position_ids": positions[:, None].expand(-1, count, -1),
        "pixel_values_videos": shown.pixel_values_videos.repeat(count, 1),
        "video_grid_thw": shown.video_grid_thw.repeat(count, 1),
    }
    copies = {key: tensor.to(model.device) for key, tensor in copies.items()}

    def repeated(self, model, input_ids, attention_mask, logits_to_keep, **_):
        labels = input_ids.clone()
        labels[:, :-logits_to_keep] = -100
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            fused_lm_head=True,
            **copies,
        )
        return out.log_probs[:, -logits_to_keep:], out.entropy[:, -logits_to_keep:], None

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    def shared() -> None:
        clear()
        trainer.compute_loss(model, batch).backward()

    def plain() -> None:
        trainer._get_per_token_logps_and_entropies = MethodType(repeated, trainer)
        try:
            shared()
        finally:
            del trainer._get_per_token_logps_and_entropies

    ours = patched_objects()

    def patched() -> None:
        with put(ours):
            shared()

    plain()
    theirs = gradients(model)
    patched()
    shape = f"{name} P={len(shown)} C={length} G={count}"
    assert_same(shape, model, theirs, 1e-3)
    limit = bare_products(model, count * length, shared)
    bench.run(
        "TRL GRPO step, video",
        shape,
        "float32",
        {"plain repeated form": plain, "bare products": limit, "ours": patched},
        0,
        limit="bare products",
        memory=clear,
        rounds=2,
    )


def main() -> None:
    options = arguments(__doc__.partition("\n")[0])
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed")
    logging.disable(logging.WARNING)
    with Bench(
        "integrations",
        device=options.device,
        threads=options.threads,
        seconds=options.seconds,
    ) as bench:
        for case in TEXT:
            bench_text(bench, case)
        for case in VIDEO:
            bench_video(bench, *case)


main()
