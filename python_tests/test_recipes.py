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
CONVERTED = dict(  # format -> its tasks
    re.findall(r"^\| `(\w+)` \| .* \| ([a-z_, ]+) \|$", (ROOT / "docs/data.md").read_text(), re.M)
)
LAUNCH = "vcr1 train --config recipes/videochat_r1.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    config = load_config(TrainConfig, path)
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    tokens = 8192 if path.stem == "videochat_r15" else 3584  # of the paper, each
    assert config.data.frames.total_pixels == tokens * 28 * 28


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_field_says_where_it_comes_from(path):
    fields = [line for line in path.read_text().splitlines() if re.match(r" +\w+: *[^ #]", line)]
    assert len(fields) > 8
    assert [line for line in fields if not re.search(r" # \w", line)] == []


@pytest.mark.parametrize("name", ["videochat_r1", "videochat_r1_sft"])
def test_the_variants_that_a_recipe_names_load(name):
    path = ROOT / f"recipes/{name}.yaml"
    variants = re.findall(r"^#   .*?  ((?:\w+\.\w+=\S+ ?)+)$", path.read_text(), re.MULTILINE)
    assert len(variants) >= 5
    configs = [load_config(TrainConfig, path, variant.split()) for variant in variants]
    sizes = {"got_train": 9335, "nextgqa_val": 3358, "nextgqa_val_answer": 3358}
    sizes |= {"sta_gqa": 15762, "joint": 25097, "quality_100shot": 200}
    for config in configs:
        size = sizes.get(Path(config.data.train).stem, 12404)
        assert config.optim.steps in (-(-size // 8), -(-3 * size // 8))


def test_the_mixture_is_of_the_later_version():
    config = load_config(TrainConfig, ROOT / "recipes/videochat_r15.yaml")
    assert config.data.media_first and not config.data.think
    assert set(config.data.tasks) == set(CONVERTED["videochat_r15"].split(", "))
    assert config.rewards.weight("image_grounded_qa", "iou") == 0.2
    assert config.rewards.weight("grounded_qa", "iou") == 1.0


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
