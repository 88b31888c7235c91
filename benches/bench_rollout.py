"""Rollouts of one video prompt: ours, transformers' `generate`, and vLLM where it is installed.

vLLM needs its own environment (docs/engines.md):

    PYTHONPATH=. .venv-vllm/bin/python benches/bench_rollout.py

Every engine gets the clip's features from the same encoder or encodes the clip itself, and samples
at temperature 1. Column "prompt_tokens" is how many prompt tokens each side computes. A completion
ends early by chance once in about 4000 tokens in ours and vLLM, never in `generate`.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Bench, arguments
from step_case import MODELS, NUMBERS, Case
from step_generate import generate
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.engines.vllm import LocalVllm, VllmSettings
from vcr1_fast.model.checkpoint import load, policy_weights
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.qwen2_5_vl.tiny import write_tiny
from vcr1_fast.model.rollout import SamplingConfig, rollout

PROMPT, LENGTH = 512, 32
GROUPS = (1, 8, 32)


def open_vllm(folder: Path, model, processor) -> LocalVllm | str:
    """The engine, or why there is none."""
    if importlib.util.find_spec("vllm") is None:
        return "not installed here, see docs/engines.md"
    settings = VllmSettings(str(folder), memory_gib=0.5, context=2048)
    engine = LocalVllm(model, processor, settings)
    engine.sync(policy_weights(model), 0)
    return engine


def bench_groups(bench: Bench, folder: Path) -> None:
    model, processor = load(folder, device=bench.device)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).to(bench.device).eval()
    engine = open_vllm(folder, model, processor)
    sampling = SamplingConfig(max_new_tokens=LENGTH)
    for count in GROUPS:
        case = Case.random(model, processor, PROMPT, LENGTH, count)
        prompt = case.group.prompt

        def ours(prompts: int, each: int, prompt=prompt) -> None:
            rollout(model, processor, [prompt] * prompts, each, sampling)

        def by_vllm(prompt=prompt, count=count) -> None:
            assert isinstance(engine, LocalVllm)
            engine.llm.reset_prefix_cache()  # a training step's prompts are new
            with torch.no_grad():
                features = prompt_features(model, [prompt])
            engine.rollout([prompt], count, sampling, None, features)

        entries: dict[str, Callable[[], None] | str] = {
            "transformers": lambda case=case: generate(plain, case),
            "vLLM": engine if isinstance(engine, str) else by_vllm,
            "ours, prompt read G times": lambda count=count, run=ours: run(count, 1),
            "ours": lambda count=count, run=ours: run(1, count),
        }
        size = len(prompt)
        bench.run(
            "rollout",
            f"P={size} C={LENGTH} G={count}",
            "float32",
            entries,
            0,
            rounds=2,
            memory=True,
            amounts={"tokens": count * LENGTH},
            notes={"prompt_tokens": f"ours {size}, transformers {size * count}"},
        )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("rollout", **vars(args)) as bench, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_tiny(Path(folder), texts=[NUMBERS], config=MODELS["6M"])
        bench_groups(bench, Path(folder))


if __name__ == "__main__":
    main()
