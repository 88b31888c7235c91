"""Evaluation while training: its numbers, that training does not notice, the best model, and the
early stop."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.config.section import ConfigError
from vcr1_fast.data.records import load_records
from vcr1_fast.evaluate.run import evaluate
from vcr1_fast.model.checkpoint import load
from vcr1_fast.tasks import TASKS
from vcr1_fast.train import scoring, validation
from vcr1_fast.train.as_trained import read as read_description
from vcr1_fast.train.export import export
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft
from vcr1_fast.train.validation import Validation, evaluation_settings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def any_reward(monkeypatch):
    """A reward that differs between almost any two completions, so that every step trains."""

    def reward_text(answers, config, judge):
        return [({"text": sum(map(ord, text)) % 97 / 97}, {}) for _, text in answers]

    monkeypatch.setattr(scoring, "own_rewards", reward_text)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations whose score is a given one by step, without a model: no clip is read."""

    def use(*scores):
        def evaluate(self, run):
            seen.append(run._completed if not seen else seen[-1] + 1)
            return {"val/score": scores[seen[-1]]}

        seen: list[int] = []
        monkeypatch.setattr(Validation, "evaluate", evaluate)
        return seen

    return use


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights(folder):
    return load(folder)[0].state_dict()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


def test_training_is_the_same_bit_for_bit_and_the_numbers_are_those_of_an_evaluation(
    inputs, tmp_path
):
    model, records = inputs
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    train(configure(model, records, plain))
    config = configure(
        model, records, watched, f"data.val={records}", "run.eval_every=1", "run.eval_records=5"
    )
    train(config)
    assert (plain / "rollouts.jsonl").read_bytes() == (watched / "rollouts.jsonl").read_bytes()
    assert same(weights(plain / "model"), weights(watched / "model"))

    zero, _, last = read(watched / "metrics.jsonl")
    assert [zero["step"], last["step"]] == [0, 2] and "loss" not in zero
    # The same five records, answered by the finished model on the way that vcr1 eval takes.
    rows = load_records(records)
    chosen = [rows[round(i * (len(rows) - 1) / 4)] for i in range(5)]
    for row, path in ((zero, model), (last, watched / "model")):
        found = evaluate(*load(path), chosen, evaluation_settings(config))
        assert {one.task for one in found.tasks} == {record.task for record in chosen}
        for one in found.tasks:
            for name, value in one.metrics.items():
                assert row[f"val/{one.task}/{name}"] == pytest.approx(value, abs=1e-9)
        watch = [one.metrics[TASKS[one.task].primary] for one in found.tasks]
        assert row["val/score"] == pytest.approx(sum(watch) / len(watch))
        assert row["val/unanswered"] == 0
        assert row["seconds/validation"] > 0


def test_an_evaluation_leaves_random_states_and_the_mode_as_they_were(
    inputs, tmp_path, monkeypatch
):
    real, evaluate_before = validation.greedy_answers, Validation.evaluate
    seen = []

    def careless(model, processor, config):
        assert not model.training
        torch.rand(3), np.random.rand(3), random.random()
        return real(model, processor, config)

    def watched(self, run):
        states = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
        found = evaluate_before(self, run)
        same_states = torch.equal(states[0], torch.get_rng_state()) and (
            np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()
        )
        seen.append((same_states, run.model.training))
        return found

    monkeypatch.setattr(validation, "greedy_answers", careless)
    monkeypatch.setattr(Validation, "evaluate", watched)
    one = ("run.eval_records=1", "optim.steps=1", f"data.val={inputs[1]}")
    train(configure(*inputs, tmp_path / "run", *one))
    assert seen == [(True, True)] * 2


def test_the_best_model_is_kept_and_the_run_ends_early_with_a_reason(
    inputs, tmp_path, scripted, capsys
):
    run = tmp_path / "run"
    settings = (
        f"data.val={inputs[1]}", "run.eval_every=1", "run.keep_best=val/score", "run.patience=2",
        "run.save_every=1", "run.keep_checkpoints=9", "optim.steps=9",
    )  # fmt: skip
    scripted(0.1, 0.5, 0.3, 0.6, 0.2, 0.6, 0.9)
    train(configure(*inputs, run, *settings))
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert json.loads((run / "best.json").read_text()) == {
        "metric": "val/score", "step": 3, "value": 0.6,
    }  # fmt: skip
    reason = "stopped after step 5: val/score has not risen above 0.6, of step 3, in 2 evaluations"
    assert reason in capsys.readouterr().err
    third = weights(export(run, 3, output=tmp_path / "third"))
    assert same(weights(run / "best"), third) and not same(weights(run / "model"), third)
    assert read_description(run / "best").made["step"] == 3
    # The same command again does not train on.
    train(configure(*inputs, run, *settings))
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_a_resumed_run_has_the_best_model_of_one_that_was_not_interrupted(
    inputs, tmp_path, scripted
):
    settings = (
        f"data.val={inputs[1]}", "run.eval_every=1", "run.keep_best=val/score", "run.patience=3",
        "run.save_every=2", "optim.schedule=constant",
    )  # fmt: skip
    scores = (0.1, 0.7, 0.3, 0.75, 0.2, 0.3, 0.4)
    scripted(*scores)
    train(configure(*inputs, tmp_path / "whole", *settings, "optim.steps=8"))
    # Killed after step 3, whose model was the best: it goes on after step 2.
    seen = scripted(*scores)
    evaluate_before = Validation.keep_best

    def killed(self, run, step, metrics):
        evaluate_before(self, run, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Validation, "keep_best", killed)
        train(configure(*inputs, tmp_path / "cut", *settings, "optim.steps=8"))
    assert json.loads((tmp_path / "cut/best.json").read_text())["step"] == 3
    seen[:] = [2]
    train(configure(*inputs, tmp_path / "cut", *settings, "optim.steps=8"))
    for name in ("best.json", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert same(weights(tmp_path / "cut/best"), weights(tmp_path / "whole/best"))
    assert [row["step"] for row in read(tmp_path / "cut/metrics.jsonl")] == list(range(7))


def test_an_untrained_model_that_stays_the_best_is_not_copied(inputs, tmp_path, scripted):
    scripted(0.9, 0.5, 0.3)
    (tmp_path / "run/best").mkdir(parents=True)  # left by another run
    keep = (f"data.val={inputs[1]}", "run.eval_every=1", "run.keep_best=val/score")
    train(configure(*inputs, tmp_path / "run", *keep))
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] == 0
    assert not (tmp_path / "run/best").exists()


def test_a_metric_that_there_is_not_ends_the_run_before_its_first_step(inputs, tmp_path, scripted):
    scripted(0.5)
    keep = (f"data.val={inputs[1]}", "run.keep_best=val/mIoU")
    with pytest.raises(ValueError, match=r"no metric 'val/mIoU' in this data, there are val/score"):
        train(configure(*inputs, tmp_path / "run", *keep))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["run.keep_best=val/score"], "run.keep_best: needs data.val"),
        (["run.keep_best=mIoU"], "run.keep_best: must be a metric val/"),
        (["run.patience=2"], "run.patience: needs keep_best"),
        (["data.val=x.jsonl", "run.eval_every=0"], "run.eval_every"),
    ],
)
def test_settings_that_do_nothing_are_refused(inputs, tmp_path, settings, field):
    with pytest.raises(ConfigError, match=field):
        configure(*inputs, tmp_path / "run", *settings)


def test_records_that_cannot_be_used_are_named(inputs, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"data\.val: .*val\.jsonl has no usable record, 1 ref"):
        train(configure(*inputs, tmp_path / "run", f"data.val={tmp_path / 'val.jsonl'}"))


def test_a_clip_that_cannot_be_shown_is_counted_and_in_no_mean(inputs, tmp_path):
    rows = [json.loads(line) for line in inputs[1].read_text().splitlines()]
    for row in rows:
        row["video"] = str(inputs[1].parent / row["video"])
    rows[0]["video"] = str(tmp_path / "broken.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft(configure(*inputs, tmp_path / "run", f"data.val={path}", "optim.steps=1"))
    zero, one = read(tmp_path / "run/metrics.jsonl")
    assert zero["val/unanswered"] == one["val/unanswered"] == 1
    assert "loss" in one and "val/score" in one


def test_evaluation_halves_its_batches_where_memory_is_short(inputs, tmp_path, monkeypatch, capsys):
    sizes = []
    real = validation.greedy_answers

    def short(model, processor, config):
        answer = real(model, processor, config)

        def answers(batches):
            sizes.append(len(batches[0]))
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError("no memory")
            return answer(batches)

        return answers

    monkeypatch.setattr(validation, "greedy_answers", short)
    train(configure(*inputs, tmp_path / "run", f"data.val={inputs[1]}", "optim.steps=1"))
    assert sizes == [8, 4, 2] * 2
    assert "out of memory while evaluating: 2 prompts" in capsys.readouterr().err
    assert all("val/score" in row for row in read(tmp_path / "run/metrics.jsonl"))


def test_a_signal_does_not_wait_for_a_long_evaluation(inputs, tmp_path, monkeypatch):
    real = validation.greedy_answers
    number = len(inputs[1].read_text().splitlines())
    asked = []

    def slow(model, processor, config):
        def answers(batches):
            for batch in batches:
                asked.append(len(batch))
                if len(asked) == number + 2:  # in the evaluation after the first step
                    os.kill(os.getpid(), signal.SIGTERM)
                yield from real(model, processor, config)([batch])

        return answers

    monkeypatch.setattr(validation, "greedy_answers", slow)
    settings = (f"data.val={inputs[1]}", "run.stop_grace=0", "run.eval_every=1")
    config = configure(*inputs, tmp_path / "run", *settings, "rollout.batch_prompts=1")
    with pytest.raises(Exception, match="stopped by SIGTERM after step"):
        train(config)
    assert len(asked) == number + 2
