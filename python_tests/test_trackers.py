"""Experiment trackers: what they get, under which names, and that they never cost a run."""

import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from tiny_run import configure, write_inputs

from vcr1_fast.data.video import Clip
from vcr1_fast.train import trackers
from vcr1_fast.train.log import RunLog
from vcr1_fast.train.loop import train
from vcr1_fast.train.trackers import PACKAGES, Trackers, film_strip, tag, worst_samples

WANDB = """
    import json, os
    calls = []
    class Image:
        def __init__(self, array): self.shape = tuple(array.shape)
    class Table:
        def __init__(self, columns=None, data=None, dataframe=None):
            self.columns, self.data = columns, data
    class config:
        @staticmethod
        def update(values, allow_val_change=False): calls.append(("config", values))
    class Run:
        def log(self, values, step=None):
            if step == int(os.environ.get("WANDB_FAILS_AT", "-1")):
                raise RuntimeError("the server is away\\nand more")
            calls.append(("log", step, values))
        def finish(self): calls.append(("finish",))
    def init(project, **options):
        if os.environ.get("WANDB_REFUSES"):
            raise RuntimeError("no API key")
        calls.append(("init", project, options))
        return Run()
"""


@pytest.fixture(scope="module", autouse=True)
def process():
    """accelerate's trackers want to know which process this is; a run has said so by then."""
    PartialState(cpu=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module that takes what accelerate calls of wandb's; its `calls`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "wandb.py").write_text(textwrap.dedent(WANDB))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb as module

    yield module.calls
    sys.modules.pop("wandb", None)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    return board


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("reward", "reward/mean"),
        ("reward/tracking/iou", "reward/tracking/iou"),
        ("reward_spread", "reward/spread"),
        ("metric/tracking/AO", "metric/tracking/AO"),
        ("val/tracking/AO", "val/tracking/AO"),
        ("length/tracking", "rollout/length/tracking"),
        ("finished", "rollout/finished"),
        ("seconds/policy", "speed/seconds/policy"),
        ("tokens_per_second/rollout", "speed/tokens_per_second/rollout"),
        ("memory_gib", "speed/memory_gib"),
        ("loss", "train/loss"),
        ("epoch", "train/epoch"),
    ],
)
def test_tags_are_grouped(name, wanted):
    assert tag(name) == wanted


def test_a_board_has_the_numbers_and_samples_of_the_run_and_goes_on_after_a_resume(
    inputs, tmp_path
):
    run = tmp_path / "run"
    settings = ["run.trackers=[tensorboard]", "run.track_samples_every=2", "run.save_every=1"]
    train(configure(*inputs, run, *settings))
    train(configure(*inputs, run, *settings, "optim.steps=3"))
    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    board = events(run / "tensorboard")
    for name, column in (
        ("reward/mean", "reward"),
        ("reward/spread", "reward_spread"),
        ("train/loss", "loss"),
        ("speed/memory_gib", "memory_gib"),
        ("rollout/length", "length"),
    ):
        shown = {one.step: one.value for one in board.Scalars(name)}
        assert len(board.Scalars(name)) == 3  # no step twice
        assert shown == pytest.approx({row["step"]: row[column] for row in rows}, rel=1e-5), name
    assert not {"step", "time"} & {tag.rpartition("/")[2] for tag in board.Tags()["scalars"]}
    # Steps 0 and 2 of three, the worst completion of each of four prompts.
    images = board.Images("samples/1")
    assert [one.step for one in images] == [1, 3] and images[0].height > 96
    text = board.Tensors("samples/1/text_summary")[0].tensor_proto.string_val[0].decode()
    worst = min((row for row in read(run / "rollouts.jsonl") if row["step"] == 1),
                key=lambda row: row["reward"])  # fmt: skip
    assert worst["task"] in text and f"reward {worst['reward']:.4g}" in text
    assert (
        "optim.lr" in board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def test_rows_have_the_place_in_the_data_the_clock_the_memory_and_the_spread(inputs, tmp_path):
    run = tmp_path / "run"
    train(configure(*inputs, run))
    number = len(inputs[1].read_text().splitlines())
    completions = read(run / "rollouts.jsonl")
    before = 0.0
    for row in read(run / "metrics.jsonl"):
        assert row["epoch"] == row["step"] * 4 / number
        assert 0.05 < row["memory_gib"] < 50
        assert before < row["time"]
        before = row["time"]
        rewards = {}
        for one in completions:
            if one["step"] == row["step"]:
                rewards.setdefault(one["group"], []).append(one["reward"])
        assert len(rewards) == 4
        spread = np.mean([np.std(group) for group in rewards.values()])
        assert row["reward_spread"] == pytest.approx(spread, abs=1e-12)


def test_a_run_keeps_its_name_in_a_tracker_and_tables_have_pictures(inputs, tmp_path, wandb):
    run = tmp_path / "mine"
    settings = ["run.trackers=[wandb]", "run.project=videos", "run.save_every=1"]
    train(configure(*inputs, run, *settings, "optim.steps=1"))
    train(configure(*inputs, run, *settings, "optim.steps=2"))
    first, second = (call for call in wandb if call[0] == "init")
    assert first == second and first[1] == "videos" and first[2]["name"] == "mine"
    assert first[2]["resume"] == "allow" and len(first[2]["id"]) == 32
    (config,) = (call[1] for call in wandb if call[0] == "config")
    assert config["optim.lr"] == 1e-3
    logged = [call[1:] for call in wandb if call[0] == "log"]
    assert [step for step, values in logged if "train/loss" in values] == [1, 2]
    (table,) = (values["samples"] for _, values in logged if "samples" in values)
    assert len(table.data) == 4
    first_row = dict(zip(table.columns, table.data[0], strict=True))
    assert first_row["reward"] == min(row[table.columns.index("reward")] for row in table.data)
    assert first_row["frames"].shape[0] == 96 + 16 and first_row["frames"].shape[2] == 3
    assert json.loads(first_row["rewards"]).keys() and first_row["completion"] is not None
    assert [call for call in wandb if call[0] == "finish"] == [("finish",)] * 2


def test_another_run_has_another_name(tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Trackers(["wandb"], tmp_path / name, 0, {}, print).close()
    one, two = (call[2]["id"] for call in wandb if call[0] == "init")
    assert one != two


def test_a_tracker_that_fails_costs_nothing_and_is_named_once(
    inputs, tmp_path, wandb, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_FAILS_AT", "1")
    run = tmp_path / "run"
    train(configure(*inputs, run, "run.trackers=[wandb, tensorboard]"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(lines) == 1 and "RuntimeError: the server is away)" in lines[0]
    assert len(read(run / "metrics.jsonl")) == 2
    # The other one has all of it.
    assert len(events(run / "tensorboard").Scalars("train/loss")) == 2


def test_a_tracker_that_cannot_start_is_an_error_before_the_run(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_REFUSES", "1")
    with pytest.raises(ValueError, match=r"run\.trackers: wandb cannot start: no API key"):
        RunLog(tmp_path, 5, trackers=["tensorboard", "wandb"])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(
    inputs, tmp_path, name, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    config = configure(tmp_path / "no model", inputs[1], tmp_path / "run", f"run.trackers=[{name}]")
    with pytest.raises(ValueError, match=f"{name} is not installed.*pip install {PACKAGES[name]}"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_choice_there_is_a_board_where_it_is_installed(monkeypatch):
    assert trackers.installed_default() == ("tensorboard",)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert trackers.installed_default() == ()


def test_other_processes_open_no_tracker(tmp_path, wandb):
    with RunLog(tmp_path, 5, trackers=["wandb"], active=False) as log:
        log.step({"step": 1, "loss": 1.0})
    assert not wandb


def test_numbers_that_are_not_finite_are_left_out(tmp_path, wandb):
    board = Trackers(["wandb"], tmp_path, 0, {}, print)
    board.log(1, {"step": 1, "loss": math.nan, "kl": 0.5, "reward": None})
    assert ("log", 1, {"train/kl": 0.5}) in wandb


def colours(*values, duration=4.0):
    frames = np.stack([np.full((48, 64, 3), value, np.uint8) for value in values])
    return Clip(frames, np.arange(len(values)) * 1.0, 1.0, duration, "clip.mp4")


def test_a_strip_shows_the_frames_in_order_below_their_seconds():
    strip = film_strip(colours((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    assert strip.shape == (96 + 16, 3 * 128 + 2 * 2, 3) and strip.dtype == np.uint8
    assert [strip[60, 64 + 130 * i].tolist() for i in range(3)] == [
        [200, 0, 0],
        [0, 200, 0],
        [0, 0, 200],
    ]
    assert strip[:16].max() > 200  # the seconds
    assert film_strip(colours((1, 2, 3), duration=None)).shape == (96, 128, 3)  # an image


def test_the_worst_completion_of_each_prompt_is_shown_worst_first():
    rewards = [[0.5, 0.4], [0.9, 0.1], [0.3, 0.8], [1.0, 1.0], [0.7, 0.6]]
    rows = [
        {"id": f"r{i}", "task": "t", "prompt": "p", "target": [1, 2], "completion": f"{i}{j}",
         "reward": reward, "rewards": {"iou": reward}, "advantage": 0.0}
        for i, group in enumerate(rewards) for j, reward in enumerate(group)
    ]  # fmt: skip
    clips = [colours((0, 0, 0))] * 5
    shown = worst_samples(rows, clips)
    assert [one.completion for one in shown] == ["11", "20", "01", "41"]
    assert shown[0].target == "[1, 2]"
    assert statistics.fmean(one.reward for one in shown) == pytest.approx(0.35)


def test_text_of_a_model_cannot_be_markdown():
    (one,) = worst_samples(
        [{"id": "r", "task": "t", "prompt": "# a\n\n[b](c)", "target": "x", "completion": "*",
          "reward": 0.0, "rewards": {}, "advantage": 0.0}],
        [colours((0, 0, 0))],
    )  # fmt: skip
    lines = one.text().splitlines()
    assert "    # a" in lines and "    [b](c)" in lines and "    *" in lines
