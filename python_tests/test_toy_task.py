"""A user's task: one file outside the package and one call, then it trains and evaluates."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import toy_task
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, RecordError, load_records, write_records
from vcr1_fast.evaluate.check import check
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint
from vcr1_fast.tasks import TASKS, ask, register
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft


@pytest.fixture
def module(tmp_path):
    """The task's file in a temporary folder, imported from there."""
    path = tmp_path / "toy_task_of_a_user.py"
    shutil.copy(toy_task.__file__, path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def task(module):
    yield register(module.TASK)
    del TASKS[module.TASK.name]


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
    user = f"rewards.functions=['{tmp_path}/toy_task_of_a_user.py:effort']"
    model = train(configure(*inputs, tmp_path / "run", user))
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    names = ("format", "way", "axis", "effort")
    columns = {f"reward/direction/{name}" for name in names}
    assert columns | {"metric/direction/accuracy"} <= set(rows[0])
    sampled = [
        json.loads(row) for row in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()
    ]
    assert {row["prompt"] for row in sampled} == {
        "Which way does the circle move? Reply like <way>left</way>."
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


def test_a_block_of_its_tag_is_the_answer(task):
    record = task.example
    assert task.score("<way> left </way>", record) == {"format": 1.0, "way": 1.0, "axis": 1.0}
    assert task.score("<way>right</way>", record) == {"format": 1.0, "way": 0.0, "axis": 1.0}
    assert set(task.score("<answer>left</answer>", record).values()) == {0.0}
    reasoned = "<think><way>up</way></think><way>left</way>"
    # Tags inside the reasoning are no answer, and are not well formed.
    assert task.score(reasoned, record, think=True) == {"format": 0.0, "way": 1.0, "axis": 1.0}
    clean = "<think>so</think> <way>left</way>"
    assert set(task.score(clean, record, think=True).values()) == {1.0}
    assert task.score(clean, record, think=False)["format"] == 0.0


def test_a_name_is_taken_once_and_prompts_must_fit(task):
    with pytest.raises(ValueError, match="a task 'direction' already"):
        register(task)
    other = dataclasses.replace(toy_task.TASK, name="other", fields={})
    with pytest.raises(ValueError, match=r"task 'other': other\.think: unknown field \{thing\}"):
        register(other)
    with pytest.raises(ValueError, match="ask for <glue>"):
        register(dataclasses.replace(toy_task.TASK, name="other", tags=("way", "glue")))
    assert "other" not in TASKS


def old_reward(completion, record, duration=None, *, think=False):
    return 1.0


FAULTS = {
    "a tag that is not read": (
        {"tags": ("answer",), "prompt_template": ask("{thing}? <answer>", "as <way>left</way>")},
        r"the prompt asks for <way>, which the parser does not read: tags are \('answer',\)",
    ),
    "a target in another tag": (
        {"target": lambda record: f"<answer>{record.answer}</answer>"},
        "its own target '<answer>left</answer>' cannot be read",
    ),
    "a target that is wrong": (
        {"target": lambda record: "<way>right</way>"},
        "earns 0 in way, expected 1",
    ),
    "text beside the target": (
        {"target": lambda record: "It is <way>left</way>"},
        "earns 0 in format, expected 1",
    ),
    "an example that does not fit": (
        {"example": dataclasses.replace(toy_task.TASK.example, answer="north")},
        "field 'answer': expected one of",
    ),
    "an old reward": (
        {"rewards": {"way": old_reward}},
        r"reward 'way' takes \(completion, record, duration, think\): rewards take \(predictions,",
    ),
    "a second format": ({"rewards": {"format": toy_task.way_reward}}, "none named 'format'"),
    "no reward": ({"rewards": {}}, "at least one reward"),
    "the tag of the reasoning": ({"tags": ("think",)}, "tag 'think' must be a plain name"),
    "a tag with brackets": ({"tags": ("<way>",)}, "tag '<way>' must be a plain name"),
    "a tag twice": ({"tags": ("way", "way")}, "each once"),
    "one value for two samples": (
        {"rewards": {"way": lambda predictions, records, durations: [1.0]}},
        "reward 'way' must be 2 finite numbers for 2 samples",
    ),
    "a reward that is not a number": (
        {"rewards": {"way": lambda predictions, records, durations: [1.0, float("nan")]}},
        "reward 'way' must be 2 finite numbers",
    ),
    "no primary metric": ({"primary": "recall"}, "primary 'recall' is no metric: accuracy"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_task_that_cannot_work_is_refused(name):
    changes, message = FAULTS[name]
    with pytest.raises(ValueError, match=f"^task 'direction': .*{message}"):
        register(dataclasses.replace(toy_task.TASK, **changes))
    assert "direction" not in TASKS
