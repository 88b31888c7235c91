"""The model remembers what it was shown and asked; evaluation and chat take it as defaults."""

import dataclasses
import json

import pytest
import yaml
from tiny_run import configure, write_inputs

from vcr1_fast import cli
from vcr1_fast.config.loader import load_config
from vcr1_fast.evaluate import chat, command
from vcr1_fast.evaluate.config import ChatConfig, EvalRun
from vcr1_fast.train import as_trained
from vcr1_fast.train.sft import sft

PROMPT = {
    "temporal_grounding": {
        "think": "Reason in <think></think>. When: {event}? <answer>12.54 to 17.83</answer>",
        "no_think": "When does {event} happen? Answer in <answer></answer> as 1.0 to 2.0.",
    }
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    prompts = folder / "mine.json"
    prompts.write_text(json.dumps(PROMPT))
    settings = ("optim.steps=1", "data.system=Be brief.", "data.media_first=true")
    sft(configure(*inputs, folder / "run", *settings, f"data.prompts={prompts}"))
    prompts.unlink()  # the model must be usable without the run's files
    return folder / "run"


@pytest.fixture
def evaluated(monkeypatch):
    """The configuration that `vcr1 eval` would run."""
    seen = []
    monkeypatch.setattr(command, "main_eval", lambda config: seen.append(config) or 0)
    return seen


@pytest.fixture
def asked(monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "main_chat", lambda config: seen.append(config) or 0)
    return seen


def arguments(run, tmp_path, *more):
    return ["eval", "--model", str(run), "--data", "d", "--output", str(tmp_path), *more]


def test_the_description_says_where_the_model_comes_from(run, inputs):
    made = yaml.safe_load((run / "model" / "vcr1.yaml").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert made["shown"]["frames"] == config["data"]["frames"]
    assert (made["kind"], made["step"], made["base"]) == ("sft", 1, str(inputs[0]))
    assert made["data"]["records"] == str(inputs[1]) and made["data"]["number"] == 18
    assert len(made["data"]["sha256"]) == 16
    import vcr1_fast

    assert made["vcr1_fast"] == vcr1_fast.__version__


def test_eval_takes_what_the_model_was_trained_with(run, tmp_path, evaluated, capsys):
    assert cli.main(arguments(run, tmp_path)) == 0
    told = capsys.readouterr().err
    assert told == (
        "as trained: no think, 4 frames, 784 to 3136 pixels, system, prompts, media first\n"
    )
    config = evaluated[0]
    assert config.model == str(run / "model")
    assert config.eval.frames.num_frames == 4 and config.eval.frames.max_pixels == 3136
    assert config.eval.system == "Be brief." and config.eval.media_first
    assert config.eval.prompts == str(run / "model" / "vcr1.prompts.json")
    assert json.loads((run / "model" / "vcr1.prompts.json").read_text()) == PROMPT
    # All else is as without a memory.
    untouched = load_config(EvalRun, None, ["model=m", "records=d", "output=o"]).eval
    for name in ("max_new_tokens", "decoder", "batch_size", "seed", "mrope", "video_text"):
        assert getattr(config.eval, name) == getattr(untouched, name)


def test_what_is_given_wins_and_the_difference_is_said(run, tmp_path, evaluated, capsys):
    words = ["eval.think=true", "eval.frames.max_pixels=1568", "eval.system=null"]
    assert cli.main(arguments(run, tmp_path, *words)) == 0
    config = evaluated[0].eval
    assert config.think and config.frames.max_pixels == 1568 and config.system is None
    assert config.frames.num_frames == 4  # of a section only the given fields
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert sorted(warnings) == [
        "warning: eval.frames.max_pixels is 1568, trained with 3136",
        'warning: eval.system is null, trained with "Be brief."',
        "warning: eval.think is true, trained with false",
    ]


def test_a_file_of_settings_wins_too(run, tmp_path, evaluated, capsys):
    path = tmp_path / "eval.yaml"
    path.write_text("eval: {frames: {num_frames: 6}}\n")
    assert cli.main(arguments(run, tmp_path, "--config", str(path))) == 0
    assert evaluated[0].eval.frames.num_frames == 6
    assert "warning: eval.frames.num_frames is 6, trained with 4" in capsys.readouterr().err


def test_the_same_prompts_in_another_file_are_no_difference(run, tmp_path, evaluated, capsys):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPT))
    assert cli.main(arguments(run, tmp_path, "--prompts", str(path))) == 0
    assert "warning" not in capsys.readouterr().err
    path.write_text(json.dumps({}))
    assert cli.main(arguments(run, tmp_path, "--prompts", str(path))) == 0
    assert "warning: eval.prompts is" in capsys.readouterr().err


def test_chat_takes_what_concerns_it(run, asked, capsys):
    assert cli.main(["chat", "--model", str(run), "--question", "What?", "frames.fps=1.0"]) == 0
    config = asked[0]
    assert config.frames.num_frames == 4 and config.system == "Be brief." and config.media_first
    told = capsys.readouterr().err
    assert (
        told.startswith("as trained: ") and "warning: frames.fps is 1.0, trained with 2.0" in told
    )


def test_training_another_way_is_said(run, inputs, tmp_path, capsys, monkeypatch):
    from vcr1_fast.train import sft as module

    monkeypatch.setattr(module, "sft", lambda config: "done")
    words = ["--model", str(run / "model"), "--data", str(inputs[1]), "--output", str(tmp_path)]
    assert cli.main(["sft", *words, "data.think=true"]) == 0
    assert "warning: data.think is true, trained with false" in capsys.readouterr().err


def test_a_model_without_a_description_is_as_before(inputs, tmp_path, evaluated, capsys):
    assert cli.main(arguments(inputs[0], tmp_path)) == 0
    assert capsys.readouterr().err == ""
    assert evaluated[0] == load_config(
        EvalRun, None, [f"model={inputs[0]}", "records=d", f"output={tmp_path}"]
    )


@pytest.mark.parametrize("text", ["[1]", "a: [", "shown: {frames: {}}", "kind: sft"])
def test_a_file_that_is_no_description_is_named(tmp_path, text):
    (tmp_path / as_trained.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"vcr1\.yaml: "):
        as_trained.read(tmp_path)


def test_every_remembered_setting_is_one_of_the_commands():
    known = {
        field.name
        for field in dataclasses.fields(
            load_config(EvalRun, None, ["model=m", "records=d", "output=o"]).eval
        )
    }
    assert known >= cli.EVALUATED == {*as_trained.SHOWN, *as_trained.WRITTEN}
    assert {field.name for field in dataclasses.fields(ChatConfig)} >= cli.CHATTED
