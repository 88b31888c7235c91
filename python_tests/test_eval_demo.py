"""The demo's model on drawn clips: the same numbers by one process, by three, and after a kill."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.demo.settings import FRAMES, WARM_START
from vcr1_fast.evaluate.completions import load_completions, shard_path
from vcr1_fast.evaluate.config import EvalConfig, PerceptionConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint

pytest.importorskip("av")
pytest.importorskip("decord")
ROOT = Path(__file__).resolve().parents[1]

CONFIG = EvalConfig(
    frames=FRAMES,
    think=True,
    max_new_tokens=64,
    batch_size=3,
    decode_workers=0,
    device="cpu",
    dtype="float32",
    perception=PerceptionConfig(passes=2),
)
SAME = [
    "eval.frames.fps=2",
    "eval.frames.max_frames=24",
    f"eval.frames.min_pixels={FRAMES.min_pixels}",
    f"eval.frames.max_pixels={FRAMES.max_pixels}",
    "eval.frames.total_pixels=null",
    "eval.frames.rule=hf",
    "eval.think=true",
    "eval.max_new_tokens=64",
    "eval.batch_size=3",
    "eval.decode_workers=0",
    "eval.device=cpu",
    "eval.dtype=float32",
    "eval.perception.passes=2",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return write_dataset(folder, SynthConfig(train=0, val=0, test=3, seed=5, workers=0))["test"]


def numbers(out):
    """Everything that is written but what names a moment or a machine."""
    summary = json.loads((out / "summary.json").read_text())
    costs = [{k: v for k, v in cost.items() if k != "seconds"} for cost in summary["cost"]]
    return summary["tasks"], costs, (out / "predictions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = evaluate_checkpoint(WARM_START, records, out, CONFIG)
    assert len(result.predictions) >= 12 and not result.quarantined
    return numbers(out)


def test_looks_cost_what_they_cost(whole):
    tasks, costs, lines = whole
    assert lines.count(b'"spans": [[') > 1  # some clips were looked at more closely
    assert {cost["number"] for cost in costs} == {0, 1, 2}
    asked = sum(tasks[name]["n"] for name in ("grounded_qa", "multiple_choice"))
    second = next(cost for cost in costs if cost["number"] == 2)
    assert second["records"] == asked < sum(task["n"] for task in tasks.values())


def test_three_processes_and_one_give_the_same_numbers(records, tmp_path, whole):
    for index in (2, 0, 1):
        config = replace(CONFIG, shard_index=index, shard_count=3)
        done = evaluate_checkpoint(WARM_START, records, tmp_path, config)
        assert (done is None) == (index != 1)
    assert numbers(tmp_path) == whole


def test_a_killed_process_and_its_successor_give_the_same_numbers(records, tmp_path, whole):
    paths = ["--model", str(WARM_START), "--data", str(records), "--output", str(tmp_path)]
    command = [sys.executable, "-m", "vcr1_fast.cli", "eval", *paths, *SAME]
    path = shard_path(tmp_path, 0, 1)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "summary.json").exists()
    assert 0 < len(load_completions(path)) < len(whole[2].splitlines())
    with path.open("a") as file:
        file.write('{"id": "torn')  # what a kill in the middle of a line leaves
    evaluate_checkpoint(WARM_START, records, tmp_path, CONFIG)
    assert numbers(tmp_path) == whole
