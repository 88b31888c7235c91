"""Each family learns: fine-tuning, then GRPO, raises the grounding score on unseen clips.

    python python_tests/learn.py --output runs/learn [--family NAME ...]

Runs the demo (`vcr1 demo`) with a tiny random model of each family, fewer steps, and compares mIoU
of temporal grounding after fine-tuning on imprecise labels with that after GRPO on the rewards.
Prints one line a family; exit status 1 where GRPO has not raised it. pytest does not collect this
file: it takes some minutes a family on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from vcr1_fast.data.synth import SynthConfig
from vcr1_fast.demo.run import run_demo
from vcr1_fast.demo.settings import FAMILY, DemoConfig
from vcr1_fast.model.family import families

SHORT = DemoConfig(
    clips=SynthConfig(train=200, val=0, test=60),
    scratch_steps=250,
    sft_steps=20,
    grpo_steps=100,
)


def learn(family: str, output: Path, config: DemoConfig = SHORT) -> dict[str, float]:
    """mIoU of temporal grounding on unseen clips, by stage."""
    stages = run_demo(replace(config, family=family, output=str(output)))["stages"]
    grounding = {stage: scores["tasks"]["temporal_grounding"] for stage, scores in stages.items()}
    return {stage: one["metrics"]["mIoU"] for stage, one in grounding.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/learn"))
    known = sorted(families())
    parser.add_argument("--family", nargs="+", choices=known, default=known)
    options = parser.parse_args()
    rose = True
    for family in options.family:
        scores = learn(family, options.output / family)
        rose &= scores["GRPO"] > scores["SFT"]
        shipped = family in FAMILY.model_types
        print(json.dumps({"family": family, "shipped": shipped, "mIoU": scores}), flush=True)
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
