"""The policy step of a group that does not fit: its prompt once, its completions suffix by suffix.

Rows compare "ours", the schedule that the planner chooses within the memory of a group of 8, with
the same group packed in one pass ("packed") and with each suffix running the prompt again ("prompt
per suffix"); "ours, twice" is the schedule that holds one of the two graphs at a time. All run the
same weights and data in one process, in turn; the gradients are compared first.

`cpu_ms` are medians of the process's own seconds, which other processes disturb less. Peaks come
from a process each: a heap that earlier passes have fragmented does not give its memory back.
`predicted_MiB` is the planner's formula for each form.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import Bench
from machine import peak_extra
from step_case import MODELS, NUMBERS, STEP_LOSS, Case
from torch import Tensor, nn

from vcr1_fast.model import checkpoint
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.qwen2_5_vl.tiny import write_tiny
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.train.config import OptimConfig
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.loop import forward_backward
from vcr1_fast.train.optim import MasterAdamW
from vcr1_fast.train.planner import MicroBatch, Planner, Schedule

MODEL, PROMPT, LENGTH, COUNT, SMALL, SUFFIX = "6M", 4096, 64, 64, 8, 8
SMALL_FORM = "packed, small group"
FORMS = ("packed", "prompt per suffix", "split", "twice", SMALL_FORM)
_MIB = 1 << 20


def policy_group(model: nn.Module, processor: Processor, *shape: int) -> PolicyGroup:
    """A clip of noise with completions of noise; shape: as of `Case.random`."""
    case = Case.random(model, processor, *shape)
    return PolicyGroup(case.group, case.advantages, torch.zeros(int(case.mask.sum())))


@dataclass(eq=False)
class Steps:
    """The forms of one group's step on one model; `small`: its first completions."""

    model: nn.Module
    group: PolicyGroup
    planner: Planner

    @classmethod
    def load(cls, folder: Path, *, recomputed: bool, device: torch.device) -> "Steps":
        model, processor = checkpoint.load(folder, device=device)
        if recomputed:
            checkpoint_activations(model)
        prepare_attention(model)
        model.train()
        # Gradients are there before, as from a run's second step on.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        planner = Planner(model, MasterAdamW(model.parameters(), OptimConfig()), 10**9, memory=1e18)
        # A short step first, for what libraries allocate once and for all.
        cls(model, policy_group(model, processor, 128, 8, 2), planner).run("packed")
        return cls(model, policy_group(model, processor, PROMPT, LENGTH, COUNT), planner)

    @property
    def small(self) -> PolicyGroup:
        return self.group.part(0, SMALL)

    def batches(self, form: str) -> list[MicroBatch[PolicyGroup]]:
        """The micro-batches of a form."""
        edges = tuple(range(0, COUNT + 1, SUFFIX))
        if form == "prompt per suffix":
            return [MicroBatch([self.group.part(a, a + SUFFIX)]) for a in edges[:-1]]
        if form == SMALL_FORM:
            return [MicroBatch([self.small])]
        schedule: dict[str, Schedule] = {"split": "split", "twice": "twice"}
        if form in schedule:
            return [MicroBatch([self.group], schedule[form], edges)]
        return [MicroBatch([self.group])]

    def run(self, form: str) -> None:
        """Forward, loss and backward; gradients are added to those there."""
        group = self.small if form == SMALL_FORM else self.group
        settings = step_loss_config(STEP_LOSS, len(group.lengths), sum(group.lengths))
        run: Any = SimpleNamespace(
            model=self.model,
            config=SimpleNamespace(rollout=SimpleNamespace(temperature=1.0)),
            check_overdue=lambda: None,
        )
        for batch in self.batches(form):
            forward_backward(run, batch, settings, on_policy=True)

    def entry(self, form: str) -> Callable[[], None]:
        return lambda: self.run(form)

    def predicted(self, form: str) -> float:
        return max(map(self.planner.predict, self.batches(form)))

    def gradients(self, form: str) -> list[Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.run(form)
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def check(self) -> float:
        """The planner's choice is the form that is measured; the largest error of a gradient of it,
        relative to that gradient's largest value."""
        self.planner.memory = 1.05 * self.predicted(SMALL_FORM)
        (chosen,) = self.planner.parts([self.group])
        assert chosen.schedule == "split" and chosen.edges[1] >= SUFFIX, chosen
        packed = self.gradients("packed")
        errors = [
            float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
            for form in ("split", "twice")
            for ours, theirs in zip(self.gradients(form), packed, strict=True)
        ]
        assert max(errors) < 1e-3, max(errors)
        return max(errors)


def peak(folder: Path, form: str, *, recomputed: bool, device: str) -> int | None:
    """Bytes at the peak of a form's step, measured in a process by itself."""
    command = [sys.executable, __file__, "--device", device, "--peak", form, "--model", str(folder)]
    out = subprocess.run(
        command + ["--recomputed"] * recomputed, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def bench_kind(bench: Bench, folder: Path, *, recomputed: bool, quick: bool, rounds: int) -> None:
    """All forms, with activations kept or recomputed."""
    steps = Steps.load(folder, recomputed=recomputed, device=bench.device)
    error = steps.check()
    forms = [form for form in FORMS if not (quick and form == "prompt per suffix")]
    peaks = {
        form: peak(folder, form, recomputed=recomputed, device=bench.device.type) for form in forms
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms if form != SMALL_FORM}
    cpu_ms: dict[str, int] = {}

    def timed(form: str) -> Callable[[], None]:
        def once() -> None:
            start = time.process_time()
            steps.run(form)
            seconds[form].append(time.process_time() - start)
            cpu_ms[form] = round(1e3 * statistics.median(seconds[form]))

        return once

    names = {"split": "ours", "twice": "ours, twice"}
    kept = "recomputed" if recomputed else "kept"
    bench.run(
        f"policy step in suffixes, activations {kept}",
        f"{MODEL} P={len(steps.group.group.prompt)} C={LENGTH} G={COUNT}, suffixes of {SUFFIX}",
        "float32",
        {names.get(form, form): timed(form) for form in seconds},
        0,
        rounds=rounds,
        notes={
            "gradient_error": float(f"{error:.1e}"),
            "cpu_ms": cpu_ms,
            "peak_MiB": {form: value and round(value / _MIB, 1) for form, value in peaks.items()},
            "predicted_MiB": {form: round(steps.predicted(form) / _MIB, 1) for form in forms},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="without the prompt per suffix")
    parser.add_argument("--peak", choices=FORMS, help="print one form's peak bytes, and end")
    parser.add_argument("--model", type=Path, help="the checkpoint of --peak")
    parser.add_argument("--recomputed", action="store_true", help="for --peak")
    parser.add_argument("--kept", action="store_true", help="without recomputed activations")
    given = parser.parse_args()
    if given.peak is not None:
        torch.set_num_threads(1)
        device = torch.device(given.device)
        steps = Steps.load(given.model, recomputed=given.recomputed, device=device)
        print(json.dumps(peak_extra(steps.entry(given.peak), device)))
        return
    with (
        tempfile.TemporaryDirectory() as parent,
        Bench("split", device=given.device, threads=given.threads, seconds=0.0) as bench,
    ):
        folder = Path(parent) / MODEL
        write_tiny(folder, texts=[NUMBERS], config=MODELS[MODEL])
        for recomputed in (False,) if given.kept else (False, True):
            bench_kind(bench, folder, recomputed=recomputed, quick=given.quick, rounds=given.rounds)


if __name__ == "__main__":
    main()
