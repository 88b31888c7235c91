"""Makes the demo's initial checkpoint: a random tiny model, fine-tuned until its answers
depend on the video. The demo then fine-tunes it on imprecise labels, and GRPO starts there.

Without it the demo would spend its minutes on this phase: before it, answers stay at the blind
baseline, and GRPO cannot leave that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.demo.reasoning import with_reasoning
from vcr1_fast.demo.settings import FAMILY, FRAMES, MODEL, WARM_START, WarmStartConfig
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vcr1_fast.train.sft import right_answer, sft


def make_warm_start(work: Path, config: WarmStartConfig | None = None) -> Path:
    """Train in the folder `work`, resuming a run there, and replace the shipped checkpoint."""
    config = config or WarmStartConfig()
    clips = SynthConfig(train=config.clips, val=0, test=0, seed=config.seed)
    exact = load_records(write_dataset(work / "data", clips)["train"])
    # A tracking answer has ten times the tokens of the others, so fewer of them weigh as much.
    chosen = [r for i, r in enumerate(exact) if r.task != "tracking" or i % config.tracking == 0]
    records = work / "data" / "train" / "chosen.jsonl"
    chosen = with_reasoning(chosen)
    write_records(records, chosen)
    FAMILY.write_tiny(
        work / "random", texts=tokenizer_texts(chosen), seed=config.seed, config=MODEL
    )
    trained = sft(
        TrainConfig(
            model=ModelConfig(path=str(work / "random"), dtype="float32", freeze_vision=False),
            data=DataConfig(train=str(records), frames=FRAMES, think=True, cache_mb=4096),
            run=RunConfig(output=str(work / "sft"), seed=config.seed, save_every=200),
            optim=OptimConfig(
                steps=config.steps,
                prompts_per_step=config.prompts,
                tokens_per_microbatch=4096,
                lr=config.lr,
                betas=(0.9, 0.98),
                schedule="cosine",
                warmup_steps=config.warmup_steps,
                final_lr_ratio=0.05,
            ),
        )
    )
    shutil.rmtree(WARM_START, ignore_errors=True)
    shutil.copytree(trained, WARM_START)
    return WARM_START


def tokenizer_texts(records: list[Record]) -> list[str]:
    """The tokenizer's corpus: prompts and answers, and every number an answer can hold."""
    texts = [TASKS[r.task].prompt(r, True) + right_answer(r, think=True) for r in records]
    seconds = [f"{i / 2:.1f}" for i in range(41)]
    coordinates = [f"{i / 100:.2f}" for i in range(101)]
    return [*texts, " ".join(seconds), " ".join(coordinates)]
