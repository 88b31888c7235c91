"""`vcr1 demo`: renders clips, fine-tunes on imprecise labels, runs GRPO, prints a table of scores.

Reads top to bottom: clips -> (scratch) -> SFT -> evaluate -> GRPO -> evaluate -> table, curves,
summary.json. A family without a shipped checkpoint has the stage "scratch".
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vcr1_fast
from vcr1_fast.data.records import load_records, write_records
from vcr1_fast.data.synth import write_dataset
from vcr1_fast.demo.blur import blur_records
from vcr1_fast.demo.reasoning import with_reasoning
from vcr1_fast.demo.settings import FAMILY, WARM_START, DemoConfig, frames_of
from vcr1_fast.demo.warm_start import tokenizer_texts
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint
from vcr1_fast.files import write_atomic
from vcr1_fast.model.family import family_named
from vcr1_fast.report.curves import write_curves
from vcr1_fast.report.rollouts import write_rollouts_html
from vcr1_fast.report.table import print_table, stages_table
from vcr1_fast.train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)

_STAGES = ("data", "random", "scratch", "sft", "grpo")


def main_demo(config: DemoConfig) -> int:
    """Run the demo into `config.output`; returns exit status 0. An interrupted demo resumes; a
    finished one, or one with other settings, starts again."""
    out = Path(config.output)
    settings = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    kept = out / "demo.json"
    if (out / "summary.json").exists() or not kept.exists() or kept.read_text() != settings:
        for stage in _STAGES:
            shutil.rmtree(out / stage, ignore_errors=True)
        (out / "summary.json").unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, settings)
    summary = run_demo(config)
    print_table(stages_table([summary["stages"]]))
    print(f"{sum(summary['seconds'].values()):.0f} s in total; wrote {out}/summary.json")
    return 0


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run every stage; returns the summary that is also written to summary.json."""
    from vcr1_fast.train.loop import train
    from vcr1_fast.train.sft import sft

    out, family = Path(config.output), family_named(config.family)
    seconds: dict[str, float] = {}
    with _timed("clips", seconds):
        splits = write_dataset(out / "data", dataclasses.replace(config.clips, seed=config.seed))
        imprecise = splits["train"].with_name("imprecise.jsonl")
        vague = blur_records(load_records(splits["train"]), config.seed, config.blur)
        write_records(imprecise, with_reasoning(vague))
    start = WARM_START
    if family is not FAMILY:
        with _timed("scratch", seconds):
            start = _from_scratch(config, splits["train"])
    with _timed("sft", seconds):
        sft(_sft(config, "sft", start, imprecise, config.sft_steps, config.sft_lr))
    stages = {}
    with _timed("evaluate", seconds):
        stages["SFT"] = _evaluate(out / "sft", splits, config)
    with _timed("grpo", seconds):
        train(grpo_config(config, out / "sft" / "model", splits["train"]))
    with _timed("evaluate", seconds):
        stages["GRPO"] = _evaluate(out / "grpo", splits, config)
    write_curves(out / "grpo" / "metrics.jsonl", out)
    write_rollouts_html(
        out / "grpo" / "rollouts.jsonl",
        out / "rollouts.html",
        pictured=200,  # whose frames take some 5 MB
        records={record.id: record for record in load_records(splits["train"])},
    )
    packages = ("torch", "transformers", "numpy")
    summary = {
        "seed": config.seed,
        "stages": stages,
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "versions": {
            "vcr1_fast": vcr1_fast.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "config": dataclasses.asdict(config),
    }
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _from_scratch(config: DemoConfig, records: Path) -> Path:
    """A random model of the family, fine-tuned on the right answers of `records`."""
    from vcr1_fast.train.sft import sft

    out = Path(config.output)
    exact = with_reasoning(load_records(records))
    chosen = records.with_name("reasoned.jsonl")
    write_records(chosen, exact)
    # Written again where the demo resumes: the same seed gives the same weights.
    family_named(config.family).write_tiny(
        out / "random", texts=tokenizer_texts(exact), seed=config.seed
    )
    steps, lr = config.scratch_steps, config.scratch_lr
    return sft(_sft(config, "scratch", out / "random", chosen, steps, lr))


def _sft(
    config: DemoConfig, stage: str, model: Path, records: Path, steps: int, lr: float
) -> TrainConfig:
    return TrainConfig(
        model=_model(model),
        data=_data(config, records),
        run=_run(config, stage),
        optim=OptimConfig(
            steps=steps,
            prompts_per_step=config.sft_prompts,
            tokens_per_microbatch=config.tokens_per_microbatch,
            lr=lr,
            schedule="cosine",
            warmup_steps=steps // 10,
        ),
    )


def grpo_config(config: DemoConfig, model: Path, records: Path) -> TrainConfig:
    """Settings of the GRPO stage, which starts from the checkpoint `model`."""
    return TrainConfig(
        model=_model(model),
        data=_data(config, records),
        run=_run(config, "grpo"),
        rollout=RolloutConfig(
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            batch_prompts=config.grpo_prompts,
        ),
        loss=config.loss,
        rewards=config.rewards,
        optim=OptimConfig(
            steps=config.grpo_steps,
            prompts_per_step=config.grpo_prompts,
            tokens_per_microbatch=config.tokens_per_microbatch,
            lr=config.grpo_lr,
            schedule="linear",
            warmup_steps=min(10, config.grpo_steps - 1),
            final_lr_ratio=0.1,
        ),
    )


def _model(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), dtype="float32", freeze_vision=False)


def _data(config: DemoConfig, records: Path) -> DataConfig:
    frames = frames_of(family_named(config.family))
    return DataConfig(train=str(records), frames=frames, think=True)


def _run(config: DemoConfig, stage: str) -> RunConfig:
    return RunConfig(output=str(Path(config.output) / stage), seed=config.seed)


def _evaluate(stage: Path, splits: dict[str, Path], config: DemoConfig) -> dict[str, Any]:
    settings = EvalConfig(
        frames=frames_of(family_named(config.family)),
        think=True,
        train_records=str(splits["train"]),
        max_new_tokens=config.max_new_tokens,
        batch_size=32,
        restart=True,
    )
    evaluation = evaluate_checkpoint(stage / "model", splits["test"], stage / "eval", settings)
    assert evaluation is not None  # there is one shard
    return evaluation.summary()


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
