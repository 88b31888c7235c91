"""One GRPO step, group-shared, beside the plain trainer's, stage by stage.

"plain" is the released trainer's form (`step_case.py`), with the batched window attention too, so
that the ratio is the sharing's own; "stock" is transformers' loop over windows; "TRL" is TRL's own
GRPOTrainer, on text. The rows "demo" are `vcr1 demo`'s: its model, clips and completions. All sides
run the same weights and data in one process, and their gradients are compared first.

"ours, torch's attention" is the shared form with torch's kernels in place of our own: what sharing
does alone. "plain, by sequence" is the same gradient from one sequence at a time: where the batch
takes gigabytes it is the faster one, for a process is given fresh memory slowly.
The limit, "bare products", are the matrix products of the shared form's linear layers, forward and
backward, and nothing else. `predicted_speedup` is the ratio of the forms' multiply-adds.

`--family` runs another family's tiny model instead, on text and on video; `ideal_token_ratio` is
G (P + C) / (P + G C), what sharing can save where every token costs the same.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Bench
from step_case import (
    MODELS,
    NUMBERS,
    Case,
    assert_same_gradient,
    bare_products,
    operations,
    plain_by_sequence,
    plain_step,
    shared_step,
)
from step_demo import bench_demo
from step_generate import generate
from step_trl import trl_step
from torch import nn

from vcr1_fast.model import checkpoint
from vcr1_fast.model.attention import Backend, prepare_attention
from vcr1_fast.model.family import families, family_named, family_of
from vcr1_fast.model.forward import completion_logps, prompt_features
from vcr1_fast.model.qwen2_5_vl.tiny import write_tiny
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.vision import prepare_vision
from vcr1_fast.ops.memory import available_bytes
from vcr1_fast.train.planner import GIB, Footprint

# model, prompt tokens, completion tokens, completions
TARGETS = [("0.7M", 2048, 64, 8), ("6M", 2048, 64, 8)]
GRID = [(p, 64, g) for p in (256, 1024, 4096) for g in (4, 8, 16)]
FAMILY_SHAPE = (2080, 64, 8)
LONG_WORK = 2e11  # multiply-adds of the unshared baseline, forward: ten seconds on two cores
LARGE_BATCH = 2 * GIB


class Models:
    """The same weights for ours, for the unshared baseline, and as transformers loads them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.ours, self.processor = checkpoint.load(folder, device=device)
        self.plain, self.stock = (
            family_of(self.ours)
            .model_class()
            .from_pretrained(folder, dtype=torch.float32)
            .to(device)
            .eval()
            for _ in range(2)
        )
        prepare_vision(self.plain)

    def clear(self) -> None:
        for model in (self.ours, self.plain, self.stock):
            model.zero_grad(set_to_none=True)

    def entry(self, run: Callable, *arguments) -> Callable[[], None]:
        """`run`, with the gradients of the call before dropped."""

        def once() -> None:
            self.clear()
            run(*arguments)

        return once


def batch_bytes(model: nn.Module, case: Case) -> float:
    """Bytes of the unshared baseline's batch, with all of its logits."""
    prompt, length, count = case.shape
    cost, rows = Footprint.of(model), count * (prompt + length)
    return cost.bytes(rows, 0, count * case.group.patches) + cost.per_label * rows


def shared(model: nn.Module, case: Case, attention: Backend) -> None:
    prepare_attention(model, attention)
    shared_step(model, case)


def bench_policy(bench: Bench, name: str, models: Models, case: Case, *, stock: bool) -> None:
    """Forward and backward of the policy."""
    prompt, length, count = case.shape
    layers, tokens = len(models.ours.model.language_model.layers), prompt + length * count
    before, after = operations(models.ours, case)
    predicted = Footprint.of(models.ours).bytes(tokens, length * count, case.group.patches)
    needed = batch_bytes(models.plain, case)
    plain: dict[str, Callable | str] = {"plain": plain_step}
    if needed > LARGE_BATCH:
        plain["plain, by sequence"] = plain_by_sequence
    if needed > 0.7 * available_bytes(models.plain.device):
        plain["plain"] = f"its batch needs {needed / GIB:.0f} GiB"
    models.clear()
    shared_step(models.ours, case)
    next(fn for fn in plain.values() if not isinstance(fn, str))(models.plain, case)
    assert_same_gradient(models.ours, models.plain)
    fns: dict[str, Callable | str] = {
        name: fn if isinstance(fn, str) else models.entry(fn, models.plain, case)
        for name, fn in plain.items()
    }
    if stock:
        fns["stock"] = models.entry(plain_step, models.stock, case)
    if bench.device.type == "cpu":
        fns["ours, torch's attention"] = models.entry(shared, models.ours, case, "merged")
    fns["bare products"] = bare_products(models.ours, case)
    bench.run(
        "policy step",
        name,
        "float32",
        {**fns, "ours": models.entry(shared, models.ours, case, "auto")},
        2 * predicted,
        limit="bare products",
        memory=models.clear,
        rounds=3 if before < LONG_WORK else 1,
        notes={
            "predicted_speedup": round(before / after, 2),
            "baseline_token_layers": count * (prompt + length) * layers,
            "ours_token_layers": tokens * layers,
            "predicted_extra_MiB": round(predicted / 2**20, 1),
        },
        amounts={"tokens": length * count},
    )


def bench_trl(bench: Bench, folder: Path, name: str, models: Models, shape: tuple) -> None:
    """The same on text, beside TRL's trainer."""
    case = Case.random(models.ours, models.processor, *shape, video=False)
    step = trl_step(folder, models.plain, case)
    before, after = operations(models.ours, case)
    models.clear()
    shared_step(models.ours, case)
    plain_step(models.stock, case)
    assert_same_gradient(models.ours, models.stock)
    fns = {"plain": models.entry(plain_step, models.stock, case), "TRL": step}
    if not isinstance(step, str):
        step()
        assert_same_gradient(models.ours, models.plain)
        fns["TRL"] = models.entry(step)
    bench.run(
        "policy step, text",
        name.replace(f"P={shape[0]}", f"P={case.shape[0]}"),
        "float32",
        {**fns, "ours": models.entry(shared_step, models.ours, case)},
        0,
        memory=models.clear,
        rounds=1,
        notes={"predicted_speedup": round(before / after, 2)},
        amounts={"tokens": int(case.mask.sum())},
    )


def encode(model: nn.Module, case: Case, copies: int) -> None:
    """The vision encoder forward and backward."""
    features = prompt_features(model, [case.group.prompt] * copies)
    torch.cat(features).square().mean().backward()


@torch.no_grad()
def plain_logps(model: nn.Module, case: Case) -> None:
    """Forward alone, as for the reference."""
    logits = model(**case.batch, use_cache=False).logits[:, :-1]
    for row, ids in zip(logits, case.batch["input_ids"][:, 1:], strict=True):
        row.log_softmax(dim=-1).gather(1, ids[:, None])


@torch.no_grad()
def shared_logps(model: nn.Module, case: Case) -> None:
    completion_logps(model, [case.group])


def bench_stages(bench: Bench, name: str, models: Models, case: Case) -> None:
    """The step's other stages: vision encoder, reference, rollout."""
    _, length, count = case.shape
    bench.run(
        "vision encoder, forward + backward",
        name,
        "float32",
        {
            "plain": models.entry(encode, models.plain, case, count),
            "ours": models.entry(encode, models.ours, case, 1),
        },
        0,
        rounds=1,
        memory=models.clear,
        notes={"predicted_speedup": count},
    )
    before, after = operations(models.ours, case)
    bench.run(
        "reference forward",
        name,
        "float32",
        {
            "plain": lambda: plain_logps(models.plain, case),
            "ours": lambda: shared_logps(models.ours, case),
        },
        0,
        rounds=1,
        memory=True,
        notes={"predicted_speedup": round(before / after, 2)},
    )
    head = models.ours.lm_head
    with torch.no_grad():
        head.bias = nn.Parameter(torch.zeros(len(head.weight), device=head.weight.device))
        head.bias[models.processor.stop_id] = -1e4  # none ends early, as on the other side
    prompts = [case.group.prompt]
    for decoding in ("dynamic", "static"):
        sampling = SamplingConfig(max_new_tokens=length, decoding=decoding)
        bench.run(
            "rollout" if decoding == "dynamic" else "rollout, static shapes",
            name,
            "float32",
            {
                "plain": lambda: generate(models.plain, case),
                "ours": lambda s=sampling: rollout(
                    models.ours, models.processor, prompts, count, s
                ),
            },
            0,
            rounds=1,
            memory=True,
            amounts={"tokens": length * count},
        )
    head.bias = None


def bench_family(bench: Bench, folder: Path, family: str) -> None:
    """The policy step of a family's model of 8 layers, on text and on video."""
    kind = family_named(family)
    # A clip's budget that leaves its frames as they are.
    sizes = {"hidden_size": 64, "layers": 8, "vision_hidden": 48, "max_pixels": 2**24}
    kind.write_tiny(folder, texts=[NUMBERS], config=kind.tiny_config(**sizes))
    models = Models(folder, bench.device)
    for video in (False, True):
        case = Case.random(models.ours, models.processor, *FAMILY_SHAPE, video=video)
        prompt, length, count = case.shape
        models.clear()
        shared_step(models.ours, case)
        plain_by_sequence(models.plain, case)
        assert_same_gradient(models.ours, models.plain)
        bench.run(
            "policy step" if video else "policy step, text",
            f"{family} P={prompt} C={length} G={count}",
            "float32",
            {
                "plain, by sequence": models.entry(plain_by_sequence, models.plain, case),
                "bare products": bare_products(models.ours, case),
                "ours": models.entry(shared, models.ours, case, "auto"),
            },
            0,
            limit="bare products",
            memory=models.clear,
            rounds=3,
            notes={
                "ideal_token_ratio": round(count * (prompt + length) / (prompt + count * length), 2)
            },
            amounts={"tokens": length * count},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row, at least")
    parser.add_argument(
        "--large", action="store_true", help="the 20 M model instead; half an hour on two cores"
    )
    parser.add_argument("--family", choices=sorted(families()), help="another family's tiny model")
    arguments = vars(parser.parse_args())
    large, family = arguments.pop("large"), arguments.pop("family")
    if family is not None:
        with (
            tempfile.TemporaryDirectory() as parent,
            Bench(f"step_{family}", **arguments) as bench,
        ):
            bench_family(bench, Path(parent) / "model", family)
        return
    shapes = [("20M", *shape) for shape in GRID]
    if not large:
        shapes = [*TARGETS, *(("0.7M", *shape) for shape in GRID)]
    with (
        tempfile.TemporaryDirectory() as parent,
        Bench("step_20m" if large else "step", **arguments) as bench,
    ):
        for kind, *shape in shapes:
            folder = Path(parent) / kind
            if not folder.exists():
                write_tiny(folder, texts=[NUMBERS], config=MODELS[kind])
            models = Models(folder, bench.device)
            case = Case.random(models.ours, models.processor, *shape)
            name = "{} P={} C={} G={}".format(kind, *case.shape)
            first = (kind, *shape) == TARGETS[0]
            bench_policy(bench, name, models, case, stock=first)
            if first:
                bench_stages(bench, name, models, case)
                bench_trl(bench, folder, name, models, tuple(shape))
        if not large:
            bench_demo(bench, Path(parent))


if __name__ == "__main__":
    main()
