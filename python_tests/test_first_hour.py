"""What a new user met in the first hour: defects D1 to D12, each gone, and the hour in one go."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pictures import data_of
from tiny_run import configure, write_inputs

from vcr1_fast import cli
from vcr1_fast.config.loader import load_config, suggestion
from vcr1_fast.config.section import ConfigError
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.evaluate.config import EvalRun
from vcr1_fast.report.rollouts import write_rollouts_html
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.health import PATIENCE, Health
from vcr1_fast.train.log import RunLog
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


# D1


def test_nothing_needs_decord(inputs, tmp_path):
    # In a process, and workers, in which the package cannot be imported.
    (tmp_path / "decord.py").write_text("raise ImportError('hidden')\n")
    code = f"""
from importlib import metadata
from vcr1_fast import cli, doctor
from vcr1_fast.data.video import probe, read_clip
if __name__ == "__main__":
    clip = {str(next(inputs[1].parent.rglob("*.mp4")))!r}
    assert probe(clip).frames and len(read_clip(clip).frames)
    assert cli.main(["data", "check", {str(inputs[1])!r}, "--decode"]) == 0
    version = metadata.version
    def hidden(name):
        if name == "decord":
            raise metadata.PackageNotFoundError(name)
        return version(name)
    metadata.version, problems = hidden, []
    doctor.packages(problems)
    doctor.decoders(problems)
    assert not [text for text in problems if "decord" in text], problems
    assert cli.main(["data", "check", {str(inputs[1])!r}, "--decode", "--decoder", "decord"]) == 2
"""
    script = tmp_path / "hour.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # The advice is one that helps: the extra that holds decord does not exist on all machines.
    assert "data.decoder=pyav" in done.stderr and "vcr1_fast[train" not in done.stderr


# D2


def test_frames_scroll_below_the_filters(tmp_path):
    """In a browser: test_viewer.py. The order of painting is a matter of two rules."""
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, [{"step": 1, "task": "t", "id": "a", "completion": "x", "rewards": {}}])
    page = write_rollouts_html(path, tmp_path / "page.html").read_text()
    style = page.split("<style>")[1].split("</style>")[0]
    form = style.split("form {")[1].split("}")[0]
    # A positioned element without a z-index is painted in document order: after the form.
    assert "position: sticky" in form and "z-index: 10" in form and style.count("z-index") == 1


# D3


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 60, 80, 110, 140, 200])
def test_a_narrow_terminal_shows_the_step_and_the_time_left(tmp_path, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    metrics = {
        "reward": 0.3125, "finished": 0.5, "loss": -5.588e-09, "kl": 0.1576, "length": 15.75,
        "grad_norm": 0.09508, "tokens_per_second": 1390.0,
    }  # fmt: skip
    with RunLog(tmp_path, 1000, stream=stream) as log:
        log.step({"step": 437, **metrics})
        log.message("quarantined z3: no such file")
    lines = [line for part in stream.getvalue().split("\r") for line in part.split("\n")]
    shown = [plain(line) for line in lines]
    bars = [line for line in shown if "437/1000" in line]
    assert bars, shown
    for line in bars:
        assert "-:--:--" in line and ("reward 0.3125" in line or width < 60), line
        assert len(line.rstrip()) <= width, line
        # Metrics are whole or absent.
        assert all(word in line or name not in line for name, word in WORDS.items()), line
    assert ("tokens_per_second 1390" in bars[-1]) == (width >= 200)
    # A message has its line to itself.
    assert any(line.strip() == "quarantined z3: no such file" for line in shown), shown


WORDS = {"loss": "loss -5.588e-09", "kl": "kl 0.1576", "grad_norm": "grad_norm 0.09508"}


def plain(text):
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# D4


def test_settings_stand_anywhere_among_the_options():
    words = [
        "train",
        "optim.steps=1",
        "--reward",
        "mine.py:f",
        "data.think=true",
        "--debug",
        "a.b=1",
    ]
    options = cli.parse(words)
    assert options.overrides == ["optim.steps=1", "data.think=true", "a.b=1"]
    assert options.reward == ["mine.py:f"] and options.debug
    options = cli.parse(["data", "synth", "train=1", "out", "val=0"])
    assert (options.output, options.overrides) == ("train=1", ["out", "val=0"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "optim.steps=1", "--data", "d", "steps"], "unrecognized arguments: steps"),
        (["train", "--learning_rate", "1e-5"], "section.field=value; did you mean optim.lr?"),
        (["train", "--learning-rate=1e-5"], "section.field=value; did you mean optim.lr?"),
        (["train", "--lr=1"], "section.field=value; did you mean optim.lr?"),
        (["doctor", "a.b=1"], "unrecognized arguments: a.b=1"),
    ],
)
def test_other_words_are_refused_with_a_hint(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(words)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--version"])
    import vcr1_fast

    assert capsys.readouterr().out == f"vcr1 {vcr1_fast.__version__}\n"


# D5 (more in test_resume.py)


def test_resuming_with_other_settings_is_refused_or_said_and_the_old_ones_kept(
    inputs, tmp_path, capsys
):
    run = tmp_path / "run"
    sft(configure(*inputs, run, "optim.steps=1"))
    with pytest.raises(ValueError, match="another number of records"):
        less = write_rows(inputs[1].with_name("less.jsonl"), rows(inputs[1])[:-1])
        sft(configure(inputs[0], less, run))
    sft(configure(*inputs, run, "optim.lr=5e-3"))
    assert "optim.lr changes from 0.001 to 0.005" in capsys.readouterr().err
    assert "lr: 0.001" in (run / "config-until-step-00000001.yaml").read_text()


# D6


def test_check_fails_on_faults_and_counts_them_in_rows_read(inputs, tmp_path, capsys):
    good = rows(inputs[1])
    bad = [{"id": f"bad{number}"} for number in range(len(good))]
    path = write_rows(inputs[1].with_name("half.jsonl"), good + bad)
    assert cli.main(["data", "check", str(path), "--no-media"]) == 1
    assert f"malformed row: {len(bad)} (50.0 %)" in capsys.readouterr().out
    all_bad = write_rows(tmp_path / "bad.jsonl", bad[:5])
    assert cli.main(["data", "check", str(all_bad), "--no-media"]) == 1
    assert "malformed row: 5 (100.0 %)" in capsys.readouterr().out
    assert cli.main(["data", "check", str(inputs[1]), "--no-media"]) == 0


# D9


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.leraning", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("rollout.num_generations", "rollout.group_size"),
        ("optim.num_train_epochs", "optim.epochs"),
        ("optim.gradient_accumulation_steps", "optim.tokens_per_microbatch"),
        ("optim.stepss", "optim.steps"),
        ("group_size", "rollout.group_size"),
        ("optim.max_new_tokens", "rollout.max_new_tokens"),
        ("data.num_frames", "data.frames.num_frames"),
    ],
)
def test_the_hint_names_the_setting_that_is_meant(given, meant):
    assert suggestion(TrainConfig, given) == f"; did you mean {meant}?"


def test_every_alias_names_a_setting():
    from test_settings import leaves

    known = set(leaves(TrainConfig))
    for name, meant in TrainConfig.ALIASES.items():
        assert meant in known, (name, meant)
        assert name not in {setting.rpartition(".")[2] for setting in known}, name


def test_without_a_similar_field_the_section_is_listed(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^advantage\.zzz: unknown field; the fields of advantage"
    ):
        load_config(TrainConfig, None, ["model.path=m", "advantage.zzz=1"])
    with pytest.raises(ConfigError, match=r"^zzzzzz: unknown field; the sections are model, data"):
        load_config(TrainConfig, None, ["zzzzzz=1"])
    path = tmp_path / "run.yaml"
    path.write_text("optim: {learning_rate: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    told = "optim.learning_rate: unknown field; did you mean optim.lr?"
    assert str(caught.value) == f"{told} ({path})"
    with pytest.raises(ConfigError, match=r"did you mean eval\.think\?"):
        load_config(EvalRun, None, ["think=true"])


def test_a_missing_setting_names_its_option(capsys):
    assert cli.main(["train", "--model", "m", "--data", "d"]) == 2
    assert "run.output: missing; give --output FOLDER" in capsys.readouterr().err
    assert cli.main(["eval", "--model", "m", "--output", "o"]) == 2
    assert "records: missing; give --data FILE" in capsys.readouterr().err


# D10


def test_clips_that_cannot_be_shown_are_said_while_training_and_at_the_end(
    inputs, tmp_path, capsys
):
    good = rows(inputs[1])
    gone = {**good[0], "id": "gone", "video": "nowhere.mp4"}
    path = write_rows(inputs[1].with_name("gone.jsonl"), [gone, *good[:3]])
    run = tmp_path / "run"
    sft(configure(inputs[0], path, run, "optim.steps=3"))
    said = capsys.readouterr().err
    assert said.count("quarantined gone: ") == 1 and "no such file" in said
    assert f"1 records were left out, with the reason of each: {run}/quarantine.jsonl" in said
    assert f"vcr1 eval --model {run}" in said.splitlines()[-1]


def test_a_quarantined_sample_is_said_once():
    said = []
    quarantine = Quarantine(log=said.append)
    for _ in range(2):
        quarantine.add("a", "a.mp4", "broken")
    assert said == ["quarantined a: broken"]


# D11


def test_a_run_that_learns_nothing_says_why(inputs, tmp_path, monkeypatch, capsys):
    steps = PATIENCE + 2
    train(configure(*inputs, tmp_path / "run", f"optim.steps={steps}", "rollout.max_new_tokens=2"))
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert sum("no reward gave a gradient" in line for line in said) == 1, said
    assert sum("100 % of the completions were cut off" in line for line in said) == 1, said
    assert any("reward format 0" in line for line in said), said
    row = rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["zero_advantage_groups"] == 1.0 and row["skipped_groups"] == 0


def test_a_trouble_is_said_once_while_it_lasts_and_again_after_it_was_gone():
    said = []
    health = Health(10, said.append)
    bad = {"zero_advantage_groups": 1.0, "finished": 1.0, "reward": 0.0}
    good = {**bad, "zero_advantage_groups": 0.5}
    for metrics in [bad] * (PATIENCE - 1) + [good] + [bad] * (PATIENCE - 1):
        health.check(1, metrics)
    assert not said
    health.check(2, bad)
    health.check(3, bad)
    assert len(said) == 1
    for metrics in [good] + [bad] * PATIENCE:
        health.check(4, metrics)
    assert len(said) == 2
    # Fine-tuning has none of these metrics.
    quiet = Health(10, pytest.fail)
    for step in range(9):
        quiet.check(step, {"loss": 1.0, "grad_norm": 1.0})


# D12


def test_a_record_twice_in_a_step_is_two_groups_on_the_page(inputs, tmp_path):
    first = rows(inputs[1])[:1]
    path = write_rows(inputs[1].with_name("one.jsonl"), first)
    run = tmp_path / "run"
    train(configure(inputs[0], path, run, "optim.steps=1"))
    logged = rows(run / "rollouts.jsonl")
    assert len(logged) == 16 and {row["id"] for row in logged} == {first[0]["id"]}
    assert [row["group"] for row in logged] == np.repeat(range(4), 4).tolist()
    path = write_rollouts_html(run / "rollouts.jsonl", tmp_path / "page.html")
    assert "4 of 4 prompts, 16 completions" in path.read_text()
    assert [group["count"] for group in data_of(path)["groups"]] == [4] * 4
    # Ranks number their groups apart: they are written one rank after the other.
    from vcr1_fast.train.metrics import rollout_rows

    assert rollout_rows.__kwdefaults__ == {"ranks": (0, 1)}


# The hour in one go


def test_the_first_hour_takes_three_minutes_and_no_setting_twice(tmp_path):
    import first_hour

    assert first_hour.main(tmp_path / "hour") < first_hour.LIMIT
