"""The GRPO step of `vcr1 demo`, shared and plain: its warm start, its clips, its settings."""

import dataclasses
from pathlib import Path

import torch
from harness import Bench
from step_case import Case, assert_same_gradient, operations, plain_step
from step_generate import generate
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.demo.run import grpo_config
from vcr1_fast.demo.settings import WARM_START, DemoConfig
from vcr1_fast.model.vision import prepare_vision
from vcr1_fast.train import loop, rollouts, setup
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.log import Stopwatch


def bench_demo(bench: Bench, folder: Path) -> None:
    """Rollout, gradient, and both together, of the prompts of the first step.

    The plain side goes prompt by prompt, as the released trainer does, and is spared all that is
    neither rollout nor policy; its completions are as long as ours were.
    """
    clips = SynthConfig(train=24, val=0, test=0, workers=0)
    demo = DemoConfig(output=str(folder / "demo"), clips=clips)
    records = write_dataset(folder / "clips", clips)["train"]
    config = grpo_config(demo, WARM_START, records)
    quiet = dataclasses.replace(config.run, trackers=(), device=bench.device.type)
    config = dataclasses.replace(config, run=quiet)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(WARM_START, dtype=torch.float32)
    plain = plain.to(bench.device).train()
    prepare_vision(plain)
    with setup.open_run(config, reference=False) as run:
        samples = next(iter(run.batches()))

        def sample() -> list[rollouts.Rollout]:
            parts = rollouts.sample_completions(run, samples, 0, Stopwatch())
            return [one for chunk in parts for one in chunk.rollouts]

        def groups_of(sampled: list[rollouts.Rollout]) -> list:
            # No group has zero advantages, so that both sides run all of them.
            count = demo.group_size * len(samples)
            advantages = torch.linspace(-1, 1, count)
            return PolicyGroup.with_advantages(
                list(map(PolicyGroup.from_rollout, samples, sampled)), advantages
            )

        sampled = sample()
        groups = groups_of(sampled)
        cases = [Case.make(plain, one.group, one.advantages) for one in groups]
        tokens = sum(sum(one.lengths) for one in groups)
        settings = step_loss_config(config.loss, demo.group_size * len(samples), tokens)

        def policy(of: list) -> None:
            run.optimizer.zero_grad()
            loop.accumulate_gradients(run, of, settings, on_policy=True)

        def plain_policy() -> None:
            plain.zero_grad(set_to_none=True)
            for case in cases:
                plain_step(plain, case, 1 / len(cases))

        def plain_rollout() -> None:
            for case in cases:
                generate(plain, case)

        unencoded = [one.with_vision(None) for one in groups]
        policy(unencoded)
        plain_policy()
        assert_same_gradient(run.model, plain)
        forms = [operations(plain, case) for case in cases]
        predicted = sum(one[0] for one in forms) / sum(one[1] for one in forms)
        name = "demo {} prompts P={}..{} C={}..{} G={}".format(
            len(cases),
            *(f(case.shape[0] for case in cases) for f in (min, max)),
            *(f(n for one in groups for n in one.lengths) for f in (min, max)),
            demo.group_size,
        )
        for op, fns, notes in (
            ("rollout", {"plain": plain_rollout, "ours": sample}, {}),
            (
                "policy step",
                {"plain": plain_policy, "ours": lambda: policy(unencoded)},
                {"predicted_speedup": round(predicted, 2)},
            ),
            (
                "GRPO step",
                {
                    "plain": lambda: (plain_rollout(), plain_policy()),
                    "ours": lambda: policy(groups_of(sample())),
                },
                {},
            ),
        ):
            bench.run(
                op, name, "float32", fns, 0, rounds=1, notes=notes, amounts={"tokens": tokens}
            )
