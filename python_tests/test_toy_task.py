"""A task in one file (toy_task.py), registered by one call, trains and evaluates like any other."""

import dataclasses
import json

import pytest
import toy_task
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, RecordError, load_records, write_records
from vcr1_fast.evaluate.check import check
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint
from vcr1_fast.tasks import TASKS, register
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft


@pytest.fixture
def task():
    yield register(toy_task.TASK)
    del TASKS[toy_task.TASK.name]


@pytest.fixture
def inputs(task, tmp_path):
    """(checkpoint, records of the toy task on three clips)."""
    model, videos = write_inputs(tmp_path)
    clips = sorted({record.video for record in load_records(videos)})
    records = [
        Record(str(i), "direction", clip, {"thing": "circle"}, toy_task.WAYS[i % 2])
        for i, clip in enumerate(clips)
    ]
    write_records(tmp_path / "toy.jsonl", records)
    return model, tmp_path / "toy.jsonl"


def test_it_trains_two_steps_and_evaluates(inputs, tmp_path):
    model = train(configure(*inputs, tmp_path / "run"))
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert {"reward/direction/way", "metric/direction/accuracy"} <= set(rows[0])
    drawn = [json.loads(row) for row in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in drawn} == {
        "Which way does the circle move? Reply like <answer>left</answer>."
    }
    config = EvalConfig(max_new_tokens=8, decode_workers=0)
    evaluation = evaluate_checkpoint(model, inputs[1], tmp_path / "out", config)
    (summary,) = evaluation.tasks
    assert (summary.task, summary.n, summary.primary) == ("direction", 3, "accuracy")
    assert summary.floor_strategy == "most frequent way"
    assert summary.floor["accuracy"] == pytest.approx(2 / 3)


def test_it_fine_tunes_and_then_answers_rightly(inputs, tmp_path):
    settings = ("optim.steps=60", "optim.lr=1e-2", "optim.prompts_per_step=3")
    model = sft(configure(*inputs, tmp_path / "run", *settings))
    config = EvalConfig(max_new_tokens=12, decode_workers=0)
    evaluation = evaluate_checkpoint(model, inputs[1], tmp_path / "out", config)
    assert evaluation.tasks[0].parse_failures == 0
    assert evaluation.tasks[0].metrics["accuracy"] >= 2 / 3


def test_its_records_are_checked_by_it(inputs, tmp_path):
    report = check(inputs[1])
    assert report.faults == []
    assert report.balance["direction"] == {
        "left": pytest.approx(2 / 3),
        "right": pytest.approx(1 / 3),
    }
    row = json.loads(inputs[1].read_text().splitlines()[0]) | {"answer": "north"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=r":1: field 'answer': expected one of .* got 'north'"):
        load_records(tmp_path / "bad.jsonl")


def test_a_name_is_taken_once_and_prompts_must_fit(task):
    with pytest.raises(ValueError, match="a task 'direction' already"):
        register(toy_task.TASK)
    other = dataclasses.replace(toy_task.TASK, name="other", fields={})
    with pytest.raises(ValueError, match=r"other\.think: unknown field \{thing\}"):
        register(other)
    with pytest.raises(ValueError, match="ask for <glue>"):
        register(dataclasses.replace(toy_task.TASK, name="other", tags=("answer", "glue")))
    assert "other" not in TASKS
