"""Every recipe is a valid configuration, and every command of docs/reproduce.md would be taken."""

import re
import shlex
from pathlib import Path

import pytest

from vcr1_fast.cli import parser
from vcr1_fast.evaluate.config import EvalRun
from vcr1_fast.train.build import load_config
from vcr1_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REPRODUCE = (ROOT / "docs/reproduce.md").read_text()
LAUNCH = "vcr1 train --config recipes/videochat_r1.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    config = load_config(TrainConfig, path)
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.data.frames.total_pixels == 3584 * 28 * 28  # the 3,584 tokens of the paper


def test_the_published_recipe_has_the_published_values():
    config = load_config(TrainConfig, ROOT / "recipes/videochat_r1.yaml")
    assert (config.loss.loss_type, config.loss.kl, config.loss.beta) == ("grpo", "k3", 0.04)
    assert (config.rollout.group_size, config.optim.prompts_per_step) == (8, 8)
    assert (config.optim.lr, config.optim.schedule, config.optim.max_grad_norm) == (
        1e-6,
        "linear",
        1.0,
    )
    assert config.optim.steps == -(-12_404 // 8)


COMMANDS = [
    re.sub(r"^train(?= )", LAUNCH, command)
    for command in re.findall(r"`((?:vcr1|train) [^`]+)`", REPRODUCE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command):
    options = parser().parse_args(shlex.split(command)[1:])
    if options.command in ("train", "sft"):
        config = load_config(TrainConfig, ROOT / options.config, options.overrides)
        assert config.data.train.endswith(".jsonl")
    elif options.command == "eval":
        names = [f"model={options.model}", f"records={options.data}", f"output={options.output}"]
        load_config(EvalRun, None, [*names, *options.overrides])


def test_experiments_are_covered_and_shards_have_these_names():
    assert sum(command.startswith(("vcr1 train", "vcr1 sft")) for command in COMMANDS) >= 6
    (shards,) = re.findall(r"`(eval\.shard[^`]+)`", REPRODUCE)
    run = load_config(EvalRun, None, ["model=m", "records=r", "output=o", *shards.split()])
    assert (run.eval.shard_index, run.eval.shard_count) == (0, 8)
