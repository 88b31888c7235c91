"""Every recipe is a valid configuration, and every command of docs/reproduce.md would be taken."""

import re
import shlex
from pathlib import Path

import pytest

from vcr1_fast.cli import main, parser
from vcr1_fast.config.loader import load_config
from vcr1_fast.evaluate.config import EvalRun
from vcr1_fast.evaluate.published import benchmarks
from vcr1_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REPRODUCE = (ROOT / "docs/reproduce.md").read_text()
CONVERTED = dict(  # format -> its tasks
    re.findall(r"^\| `(\w+)` \| .* \| ([a-z_, ]+) \|$", (ROOT / "docs/data.md").read_text(), re.M)
)
LAUNCH = {
    "train": "vcr1 train --config recipes/videochat_r1.yaml",
    "sft": "vcr1 sft --config recipes/videochat_r1_sft.yaml",
    "eval": "vcr1 eval --model MODEL",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    config = load_config(TrainConfig, path)
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    tokens = {"videochat_r15": 8192, "timelens": 14336}.get(path.stem, 3584)  # of the papers
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
    re.sub(r"^(train|sft|eval)(?= )", lambda match: LAUNCH[match[1]], command)
    for command in re.findall(r"`((?:vcr1|train|sft|eval) [^`]+)`", REPRODUCE)
    if command != "vcr1 data check"
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


def test_experiments_are_covered():
    kinds = [command.split()[1] for command in COMMANDS]
    assert (kinds.count("train"), kinds.count("sft"), kinds.count("eval")) == (12, 6, 12)
    assert f"torchrun --nproc_per_node 8 -m vcr1_fast.cli {LAUNCH['eval'][5:]}" in REPRODUCE
    for recipe in ("videochat_r1", "videochat_r1_sft"):
        assert f"recipes/{recipe}.yaml" in REPRODUCE


def test_every_run_of_a_table_has_its_command_and_every_set_is_shown_its_numbers():
    training, tables = REPRODUCE.split("## Training")[1].split("## The paper's tables")
    named = set(re.findall(r"^\| ([\w+-]+) \| `(?:train|sft) ", training, re.MULTILINE))
    rows = re.findall(r"^\| ([\w+-]+)[ ,;(|]", tables.split("## What cannot")[0], re.MULTILINE)
    assert set(rows) - {"run", "base", "table"} == named
    benches = set(re.findall(r"eval\.benchmark=(\w+)", REPRODUCE))
    assert benches == set(benchmarks())
    for name, published in benchmarks().items():
        for model, scores in published.models.items():
            row = [f"{100 * value:.1f}" for value in scores.values()]
            assert all(
                re.search(rf"\b{value}\b", tables.replace("/ 0 ", "/ 0.0 ")) for value in row
            ), (
                name,
                model,
            )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_init_prints_a_recipe_whole(path, capsys, tmp_path):
    assert main(["init", path.stem]) == 0
    printed = capsys.readouterr().out
    assert printed == path.read_text()
    (tmp_path / "run.yaml").write_text(printed)
    assert load_config(TrainConfig, tmp_path / "run.yaml") == load_config(TrainConfig, path)


def test_init_lists_recipes_and_names_them_where_there_is_no_such_one(capsys):
    assert main(["init"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [path.stem for path in RECIPES]
    assert main(["init", "ppo"]) == 2
    error = capsys.readouterr().err
    assert "no recipe 'ppo'" in error and all(name in error for name in names)
