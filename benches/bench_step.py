"""One GRPO policy step, group-shared, beside the plain trainer's: G copies of prompt and clip.

The plain form is what the released VideoChat-R1 trainer runs: every completion with its own copy of
the prompt and its own pass of the vision tower, logits over prompt and completion, log-softmax row
by row. "plain" gets the batched window attention too, so that the ratio is the sharing's own;
"stock" is transformers' loop over windows. Both sides run the same weights and data in one process,
and their gradients are compared first.

The limit, "bare products", are the matrix products of the shared form's linear layers, forward and
backward, and nothing else. `predicted` is the ratio of the two forms' floating-point operations.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Bench
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.model import checkpoint
from vcr1_fast.model.forward import completion_hidden, prompt_features
from vcr1_fast.model.packing import Group, prompt_positions
from vcr1_fast.model.positions import SpecialIds
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.tiny import TinyConfig, write_tiny
from vcr1_fast.model.vision import prepare_vision
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.step import PolicyGroup, loss_config, policy_loss

MODELS = {
    "0.7M": TinyConfig(hidden_size=64, layers=6, vision_hidden=48, vocab_limit=4096),
    "6M": TinyConfig(
        hidden_size=256, layers=6, heads=8, kv_heads=4, vision_hidden=96, vocab_limit=4096
    ),
}
# One token each, as far as the vocabulary goes.
NUMBERS = " ".join(f"{i / 100:.2f}" for i in range(6000))
TOKENS_A_GRID = 64  # of a frame pair of 224 x 224 pixels
# model, prompt tokens, completion tokens, completions
TARGETS = [("0.7M", 2048, 64, 8), ("6M", 2048, 64, 8)]
GRID = [("0.7M", p, 64, g) for p in (256, 1024) for g in (4, 8, 16)]
LONG = [("0.7M", 4096, 64, g) for g in (4, 8, 16)]


@dataclass
class Clip:
    frames: np.ndarray
    fps: float


@dataclass(eq=False)
class Case:
    """A prompt with its completions, and the same as a batch of G sequences."""

    group: Group
    advantages: Tensor
    batch: dict[str, Tensor]

    @classmethod
    def make(cls, model: nn.Module, processor, prompt: int, length: int, count: int) -> "Case":
        device = model.device
        grids = prompt // TOKENS_A_GRID
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (2 * grids, 224, 224, 3), dtype=np.uint8)
        generator = torch.Generator().manual_seed(0)
        text = processor.prompt("When is it visible?", [Clip(frames, 2.0)])
        completions = torch.randint(250, (count, length), generator=generator)
        positions = prompt_positions(text, SpecialIds.from_config(model.config), "trained")
        after = positions.max() + 1 + torch.arange(length)
        positions = torch.cat([positions, after.expand(3, -1)], dim=1)
        tokens = torch.cat([text.input_ids.expand(count, -1), completions], dim=1)
        batch = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "position_ids": positions[:, None].expand(-1, count, -1),
            "pixel_values_videos": text.pixel_values_videos.repeat(count, 1),
            "video_grid_thw": text.video_grid_thw.repeat(count, 1),
        }
        return cls(
            Group(text, list(completions)),
            torch.linspace(-1, 1, count),
            {name: tensor.to(device) for name, tensor in batch.items()},
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Prompt tokens, completion tokens, completions."""
        completions = self.group.completions
        return len(self.group.prompt), len(completions[0]), len(completions)


def plain_step(model: nn.Module, case: Case) -> None:
    """Forward and backward as in `_get_per_token_logps` and `compute_loss` of the R1-V family."""
    length = case.shape[1]
    logits = model(**case.batch, use_cache=False).logits[:, :-1]
    rows = [
        row.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        for row, ids in zip(logits, case.batch["input_ids"][:, 1:], strict=True)
    ]
    logps = torch.stack(rows)[:, -length:]
    ratio = torch.exp(logps - logps.detach())
    loss = -(ratio * case.advantages.to(logps.device)[:, None]).mean(dim=1).mean()
    loss.backward()


def shared_step(model: nn.Module, case: Case) -> None:
    """What `vcr1 train` runs for a micro-batch."""
    _, length, count = case.shape
    sampled = torch.zeros(length * count)
    loss, _ = policy_loss(
        model,
        [PolicyGroup(case.group, case.advantages, sampled)],
        loss_config(GRPOLossConfig(loss_type="grpo", beta=0.0), count, length * count),
        temperature=1.0,
        on_policy=True,
        convention="trained",
    )
    loss.backward()


def bare_products(model: nn.Module, case: Case):
    """A callable that multiplies what the linear layers multiply, forward and backward."""
    sizes: list[tuple[int, nn.Linear]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: sizes.append((inputs[0].numel() // module.in_features, module))
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        completion_hidden(model, [case.group])
    for hook in hooks:
        hook.remove()
    _, length, count = case.shape
    sizes.append((length * count, model.get_output_embeddings()))
    products = [
        (torch.randn(rows, layer.in_features, device=model.device), layer.weight.detach())
        for rows, layer in sizes
    ]

    def run() -> None:
        for x, weight in products:
            out = x @ weight.t()
            out @ weight
            out.t() @ x

    return run


def operations(model: nn.Module, case: Case) -> tuple[float, float]:
    """Multiply-adds of the plain and of the shared form, forward (backward is twice both)."""
    text, visual = model.config.text_config, model.model.visual
    prompt, length, count = case.shape
    patches = len(case.group.prompt.pixel_values_videos)

    def linear(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    layers = sum(map(linear, model.model.language_model.layers))
    per_pair = 2 * text.num_hidden_layers * text.hidden_size
    # In the merger four patches are one row.
    tower = patches * (linear(visual.patch_embed) + sum(map(linear, visual.blocks)))
    tower += patches / 4 * linear(visual.merger)
    grid = case.group.prompt.video_grid_thw[0]
    for i in range(len(visual.blocks)):
        full = i in model.config.vision_config.fullatt_block_indexes
        seen = int(grid[1] * grid[2]) if full else 64
        tower += 2 * patches * seen * model.config.vision_config.hidden_size
    head = text.hidden_size * text.vocab_size
    row = prompt + length
    plain = count * (tower + row * (layers + head) + per_pair * row * row / 2)
    answers = count * length
    pairs = prompt**2 / 2 + answers * prompt + count * length**2 / 2
    return plain, tower + (prompt + answers) * layers + answers * head + per_pair * pairs


def assert_same_gradient(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-3 * scale + 1e-7, msg=name)


def encode(model: nn.Module, case: Case, copies: int) -> None:
    """The vision tower forward and backward."""
    features = prompt_features(model, [case.group.prompt] * copies)
    torch.cat(features).square().mean().backward()


def generate(model: nn.Module, case: Case) -> None:
    """transformers' own loop on G copies, every completion to its full length."""
    prompt, length, _ = case.shape
    names = ("pixel_values_videos", "video_grid_thw")
    kept = {name: case.batch[name] for name in names}
    kept |= {name: case.batch[name][:, :prompt] for name in ("input_ids", "attention_mask")}
    kinds = 2 * (kept["input_ids"] == model.config.video_token_id).long()
    model.generate(
        **kept,
        mm_token_type_ids=kinds,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        eos_token_id=len(model.lm_head.weight) - 1,
        pad_token_id=0,
    )


def bench_case(bench: Bench, folder: Path, shape: tuple[int, int, int], *, whole: bool) -> None:
    """One prompt with its group; `whole`: the other stages and the stock tower too."""
    model, processor = checkpoint.load(folder, device=bench.device)
    plain, stock = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        .to(bench.device)
        .eval()
        for _ in range(2)
    )
    prepare_vision(plain)
    case = Case.make(model, processor, *shape)
    prompt, length, count = case.shape
    name = f"{folder.name} P={prompt} C={length} G={count}"
    layers, tokens = len(model.model.language_model.layers), prompt + length * count
    before, after = operations(model, case)
    predicted = Footprint.of(model).bytes(tokens, length * count, case.group.patches)

    def clear() -> None:
        for one in (model, plain, stock):
            one.zero_grad(set_to_none=True)

    def entry(run, *arguments):
        def once() -> None:
            clear()
            run(*arguments)

        return once

    shared_step(model, case)
    plain_step(plain, case)
    assert_same_gradient(model, plain)
    fns = {"plain": entry(plain_step, plain, case)}
    if whole:
        fns["stock"] = entry(plain_step, stock, case)
    fns["bare products"] = bare_products(model, case)
    bench.run(
        "policy step",
        name,
        "float32",
        {**fns, "ours": entry(shared_step, model, case)},
        2 * predicted,
        limit="bare products",
        memory=clear,
        rounds=1,
        notes={
            "predicted_speedup": round(before / after, 2),
            "baseline_token_layers": count * (prompt + length) * layers,
            "ours_token_layers": tokens * layers,
            "predicted_extra_MiB": round(predicted / 2**20, 1),
        },
    )
    if not whole:
        return
    bench.run(
        "vision tower, forward + backward",
        name,
        "float32",
        {"plain": entry(encode, plain, case, count), "ours": entry(encode, model, case, 1)},
        0,
        rounds=1,
        memory=clear,
        notes={"predicted_speedup": count},
    )
    sampling = SamplingConfig(max_new_tokens=length)
    banned = processor.stop_id
    with torch.no_grad():
        model.lm_head.bias = nn.Parameter(torch.zeros(model.config.text_config.vocab_size))
        model.lm_head.bias[banned] = -1e4  # no completion ends early, as on the other side
    bench.run(
        "rollout",
        name,
        "float32",
        {
            "plain": lambda: generate(plain, case),
            "ours": lambda: rollout(model, processor, [case.group.prompt], count, sampling),
        },
        0,
        rounds=1,
        memory=True,
        notes={"tokens": length * count},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row, at least")
    parser.add_argument("--all", action="store_true", help="the long prompts and large groups too")
    arguments = vars(parser.parse_args())
    shapes = [*TARGETS, *GRID, *(LONG if arguments.pop("all") else ())]
    with tempfile.TemporaryDirectory() as parent, Bench("step", **arguments) as bench:
        for kind, *shape in shapes:
            folder = Path(parent) / kind
            if not folder.exists():
                write_tiny(folder, texts=[NUMBERS], config=MODELS[kind])
            bench_case(bench, folder, tuple(shape), whole=(kind, *shape) == TARGETS[0])


if __name__ == "__main__":
    main()
