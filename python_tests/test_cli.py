"""The command line: each command end to end on tiny inputs, and mistakes reported in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import SETTINGS, write_inputs

from vcr1_fast import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_synth_sft_train_eval(tmp_path, inputs, capsys):
    small = ["scene.max_seconds=2", "scene.min_seconds=2", "scene.sizes=[[56, 56]]"]
    data = tmp_path / "data"
    sizes = ["train=1", "val=0", "test=1", "workers=0"]
    assert cli.main(["data", "synth", str(data), *sizes, *small]) == 0
    records = str(data / "train" / "records.jsonl")
    assert records in capsys.readouterr().out
    model = str(inputs[0])
    for command in ("sft", "train"):
        output = tmp_path / command
        arguments = ["--model", model, "--data", records, "--output", str(output)]
        assert cli.main([command, *arguments, *SETTINGS, "optim.steps=1"]) == 0
        model = capsys.readouterr().out.strip()
        assert model == str(output / "model")
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
        assert f"path: {arguments[1]}" in (output / "config.yaml").read_text()
    assert cli.main(["report", str(output)]) == 0
    reported = capsys.readouterr().out.splitlines()
    assert str(output / "curves" / "reward.png") in reported and reported[-1].endswith(
        "rollouts.html"
    )
    page = (output / "rollouts.html").read_text()
    assert page.count("data:image/jpeg") >= 4 and "no frames" not in page
    settings = [
        "eval.max_new_tokens=4",
        "eval.device=cpu",
        "eval.dtype=float32",
        "eval.frames.num_frames=4",
        "eval.frames.min_pixels=784",
        "eval.frames.max_pixels=3136",
    ]
    test = str(data / "test" / "records.jsonl")
    output = tmp_path / "eval"
    arguments = ["--model", model, "--data", test, "--output", str(output)]
    assert cli.main(["eval", *arguments, *settings]) == 0
    assert "temporal_grounding" in capsys.readouterr().out
    assert "data:image/jpeg" in (output / "predictions.html").read_text()
    assert "tasks" in json.loads((output / "summary.json").read_text())


def test_a_saved_config_runs_again(inputs, tmp_path, capsys):
    arguments = ["--model", str(inputs[0]), "--data", str(inputs[1])]
    first = tmp_path / "first"
    assert cli.main(["train", *arguments, "--output", str(first), *SETTINGS]) == 0
    again = ["--config", str(first / "config.yaml"), "--output", str(tmp_path / "second")]
    assert cli.main(["train", *again]) == 0
    rewards = [
        [json.loads(line)["length"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (first, tmp_path / "second")
    ]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["train"], "vcr1 train: model.path: missing"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "optim.lr=x"], "optim.lr: "),
        (["sft", "optim.speed=1"], "optim.speed: unknown field"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", "."], "Is a directory"),
        (["eval", "--model", "m"], "vcr1 eval: records: missing"),
        (["data", "synth", "out", "train=-1"], "train must not be negative"),
        (["report", "."], "holds no training run"),
        (["chat"], "vcr1 chat: model: missing"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, reported, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert reported in message
    assert len(message.splitlines()) == 1


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "vcr1_fast.config.loader", raising=False)
    assert cli.main(["train"]) == 2
    reported = capsys.readouterr().err
    assert "yaml" in reported
    assert "vcr1_fast[train,report]" in reported


def test_bad_checkpoints_and_data_are_named(inputs, tmp_path, capsys):
    model, records = inputs
    arguments = ["--output", str(tmp_path / "run"), *SETTINGS]
    assert (
        cli.main(["train", "--model", str(tmp_path / "no"), "--data", str(records), *arguments])
        == 2
    )
    assert str(tmp_path / "no") in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["train", "--model", str(broken), "--data", str(records), *arguments]) == 2
    assert f"{weights}: truncated" in capsys.readouterr().err
    assert cli.main(["train", "--model", str(model), "--data", "no.jsonl", *arguments]) == 2
    assert "no.jsonl" in capsys.readouterr().err


def test_a_path_is_not_read_as_yaml(inputs, tmp_path):
    options = cli.parser().parse_args(["train", "--output", "[1, 2]", "--model", "1e5"])
    given = cli._overrides({"run.output": options.output, "model.path": options.model}, options)
    assert given == ['run.output="[1, 2]"', 'model.path="1e5"']


def test_help_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "vcr1_fast.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in ("data", "sft", "train", "eval", "chat", "report", "bench", "demo", "doctor"):
        assert name in done.stdout
