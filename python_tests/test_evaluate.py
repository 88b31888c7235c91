"""Scores by hand, intervals against theory, resume and shards against one uninterrupted run."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.evaluate import run as run_module
from vcr1_fast.evaluate.command import launched, main_eval
from vcr1_fast.evaluate.completions import Completion, load_completions, shard_path
from vcr1_fast.evaluate.config import EvalConfig, EvalRun
from vcr1_fast.evaluate.identity import fingerprint
from vcr1_fast.evaluate.intervals import bootstrap_interval
from vcr1_fast.evaluate.run import answer_shard, cut_batches, evaluate


def grounding(name, span=(2.0, 6.0), video=None):
    return Record(
        id=name,
        task="temporal_grounding",
        video=video or f"{name}.mp4",
        prompt={"event": "the circle is visible"},
        answer=list(span),
    )


def choice(name, letter="B"):
    return Record(
        id=name,
        task="multiple_choice",
        video=f"{name}.mp4",
        prompt={"question": "Which shape moves?"},
        answer=letter,
        options=("circle", "square", "star"),
    )


def answers(texts, log=None):
    """A source of completions that reads them from a dict; an Exception in it is a bad sample."""

    def answer(batches):
        for batch in batches:
            if log is not None:
                log.append([record.id for record in batch])
            out = []
            for record in batch:
                text = texts[record.id]
                if isinstance(text, Exception):
                    out.append(Completion(record.id, error=str(text)))
                else:
                    out.append(Completion(record.id, text, tokens=len(text), finished="<" in text))
            yield out

    return answer


RECORDS = [grounding("a"), grounding("b"), choice("c"), grounding("d"), choice("e"), grounding("f")]
TEXTS = {
    "a": "<answer>2.0 to 6.0</answer>",  # IoU 1
    "b": "<answer>4.0 to 10.0</answer>",  # 2 of 8 seconds: 0.25
    "c": "<answer>B</answer>",  # right
    "d": "no idea",  # unparsed: 0
    "e": "<answer>A</answer>",  # wrong
    "f": ValueError("f.mp4: no frames"),  # quarantined: nowhere
}


def test_hand_made_predictions_score_as_by_hand():
    result = evaluate(None, None, RECORDS, EvalConfig(batch_size=4), answer=answers(TEXTS))
    grounded, chosen = result.tasks
    assert (grounded.task, grounded.n, chosen.task, chosen.n) == (
        "temporal_grounding",
        3,
        "multiple_choice",
        2,
    )
    assert grounded.metrics["mIoU"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert grounded.metrics["R@0.5"] == pytest.approx(1 / 3)
    assert chosen.metrics[chosen.primary] == pytest.approx(0.5)


def test_parse_failures_count_as_zero_and_apart_and_quarantined_samples_nowhere():
    result = evaluate(None, None, RECORDS, EvalConfig(batch_size=4), answer=answers(TEXTS))
    grounded, chosen = result.tasks
    assert (grounded.parse_failures, chosen.parse_failures) == (1, 0)
    assert grounded.parse_failure_rate == pytest.approx(1 / 3)
    assert grounded.unfinished == 1
    assert [item.record.id for item in result.predictions] == ["a", "b", "c", "d", "e"]
    assert [(q.record_id, q.reason) for q in result.quarantined] == [("f", "f.mp4: no frames")]


def test_the_blind_baseline_is_the_best_strategy_fitted_on_training_records():
    train = [grounding(f"t{i}", (0.0, 1.0)) for i in range(5)]
    same = [grounding(f"t{i}", (2.0, 6.0)) for i in range(5)]
    test, texts = RECORDS[:2], TEXTS
    far = evaluate(None, None, test, train_records=train, answer=answers(texts)).tasks[0]
    near = evaluate(None, None, test, train_records=same, answer=answers(texts)).tasks[0]
    own = evaluate(None, None, test, answer=answers(texts)).tasks[0]
    assert (far.floor_fitted_on, own.floor_fitted_on) == ("train", "evaluated")
    assert near.floor["mIoU"] > 0.95  # always answering about 2 to 6 is right without eyes
    assert far.floor["mIoU"] < near.floor["mIoU"] <= own.floor["mIoU"] + 1e-9


def test_always_answering_the_first_45_percent_of_charades_scores_as_published_arithmetic_says():
    path = Path(os.environ.get("VCR1_TEST_DATA", "../shared/data"))
    path = path / "annotations" / "Charades" / "charades_test.json"
    if not path.exists():
        pytest.skip(f"no {path}; set VCR1_TEST_DATA")
    records, texts = [], {}
    for video, entry in json.loads(path.read_text()).items():
        for i, span in enumerate(entry["timestamps"]):
            record = grounding(f"{video}-{i}", span, video)
            records.append(record)
            texts[record.id] = f"<answer>0.0 to {0.45 * entry['duration']:.6f}</answer>"
    (task,) = evaluate(None, None, records, answer=answers(texts)).tasks
    scores = [round(100 * task.metrics[name], 1) for name in ("R@0.3", "R@0.5", "R@0.7")]
    assert task.n == 3720 and scores == [48.8, 27.7, 11.9]
    assert task.metrics["mIoU"] == pytest.approx(0.3055, abs=1e-3)


def test_bootstrap_interval_of_a_coin_is_the_binomial_one():
    n, p = 400, 0.3
    values = np.zeros(n)
    values[: int(n * p)] = 1
    low, high = bootstrap_interval(values, resamples=20_000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.004)
    assert high == pytest.approx(p + half, abs=0.004)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(
            rng.normal(5.0, 2.0, size=60), level=0.8, resamples=300, seed=trial
        )
        hits += low <= 5.0 <= high
    # 400 trials: standard error 0.02; the percentile bootstrap undercovers slightly at n = 60.
    assert 0.8 - 0.065 < hits / 400 < 0.8 + 0.055


def test_questions_about_one_video_are_resampled_together():
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(50), 8)
    values = rng.normal(size=50)[videos]  # all 8 questions of a video agree: 50 facts, not 400
    alone = np.subtract(*bootstrap_interval(values)[::-1])
    grouped = np.subtract(*bootstrap_interval(values, groups=videos.tolist())[::-1])
    one_each = np.subtract(*bootstrap_interval(values[::8])[::-1])
    assert grouped == pytest.approx(one_each, rel=0.1)
    assert grouped / alone == pytest.approx(math.sqrt(8), rel=0.1)


def test_the_summary_interval_resamples_videos_not_questions():
    spans = {True: "<answer>2.0 to 6.0</answer>", False: "<answer>7.0 to 9.0</answer>"}
    records = [grounding(f"g{i}", video=f"v{i // 10}.mp4") for i in range(120)]
    texts = {record.id: spans[i // 10 % 2 == 0] for i, record in enumerate(records)}  # 12 videos
    (task,) = evaluate(None, None, records, answer=answers(texts)).tasks
    assert task.metrics["mIoU"] == pytest.approx(0.5)
    low, high = task.intervals["mIoU"]
    half = (high - low) / 2
    assert half == pytest.approx(1.96 * 0.5 / math.sqrt(12), rel=0.15)


def test_bootstrap_interval_repeats_and_refuses_nonsense():
    values = [0.0, 1.0, 0.5]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="nan"):
        bootstrap_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, level=1.0)
    with pytest.raises(ValueError, match="2 labels for 3"):
        bootstrap_interval(values, groups=["a", "b"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A records file, a stand-in checkpoint, and its answers in place of a model's."""
    records = [
        choice(f"q{i}") if i % 3 else grounding(f"q{i}", video=f"v{i // 4}.mp4") for i in range(23)
    ]
    texts = {
        record.id: ("<answer>B</answer>", "<answer>1.0 to 5.5</answer>", "?")[i % 3]
        for i, record in enumerate(records)
    }
    texts["q7"] = ValueError("v1.mp4: cannot be decoded")
    write_records(tmp_path / "test.jsonl", records)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    log = []
    monkeypatch.setattr(
        run_module, "load_answers", lambda path, config: answers(texts, log), raising=True
    )

    def start(out, **settings):
        return run_module.evaluate_checkpoint(
            model, tmp_path / "test.jsonl", tmp_path / out, EvalConfig(batch_size=4, **settings)
        )

    start.log, start.path = log, tmp_path
    return start


def results(path):
    summary = json.loads((path / "summary.json").read_text())
    files = [(path / name).read_bytes() for name in ("predictions.jsonl", "quarantine.jsonl")]
    return [summary["tasks"], summary["quarantined"], *files]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_three_shards_give_the_very_files_of_one(folder, order):
    folder("one")
    whole = list(folder.log)
    folder.log.clear()
    states = [folder("three", shard_index=i, shard_count=3) is None for i in order]
    assert states == [True, True, False]
    assert results(folder.path / "three") == results(folder.path / "one")
    assert sorted(folder.log) == sorted(whole)  # the same batches, so the same rounding
    assert len(results(folder.path / "one")[2].splitlines()) == 22


@pytest.mark.parametrize("kept_bytes", [0, 40, 300, 900])
def test_a_killed_run_resumes_to_the_same_files(folder, kept_bytes):
    folder("whole")
    folder("killed")
    path = shard_path(folder.path / "killed", 0, 1)
    for name in ("predictions.jsonl", "summary.json", "quarantine.jsonl"):
        (folder.path / "killed" / name).unlink()
    path.write_bytes(path.read_bytes()[:kept_bytes])
    lines = len(load_completions(path))
    folder.log.clear()
    folder("killed")
    assert results(folder.path / "killed") == results(folder.path / "whole")
    assert len(folder.log) == 6 - lines // 4  # whole batches that were on disk are not done again


def test_a_finished_run_is_only_scored_again(folder):
    first = folder("out")
    folder.log.clear()
    second = folder("out")
    assert folder.log == [] and second.summary() == first.summary()


def test_another_evaluation_in_the_same_folder_is_refused(folder):
    folder("out")
    with pytest.raises(ValueError, match="max_new_tokens was 256, now 8"):
        folder("out", max_new_tokens=8)
    weights = folder.path / "model" / "config.json"
    weights.write_text("{}")  # written again, the same contents: the same model
    folder("out")
    weights.write_text("{ }")
    with pytest.raises(ValueError, match="model_files"):
        folder("out")
    folder("other")


def test_restart_deletes_the_other_evaluation_and_nothing_else(folder):
    folder("out")
    mine = folder.path / "out" / "notes.txt"
    mine.write_text("mine")
    folder.log.clear()
    folder("out", max_new_tokens=8, restart=True)
    assert len(folder.log) == 6 and mine.exists()  # every batch is answered again
    assert (
        json.loads((folder.path / "out" / "summary.json").read_text())["run"]["max_new_tokens"] == 8
    )
    folder.log.clear()
    folder("out", max_new_tokens=8, restart=True)
    assert folder.log == []  # the same evaluation goes on


def test_fingerprints_see_every_part_of_a_large_file(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # sparse
    first = fingerprint(path)
    assert fingerprint(path) == first
    for offset in (0, (200 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        assert fingerprint(path) != first
        first = fingerprint(path)


def test_a_malformed_line_in_the_middle_is_named(folder):
    folder("out")
    path = shard_path(folder.path / "out", 0, 1)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b'{"id": '
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(f"{path}:3:")):
        folder("out")


def test_line_separators_in_model_text_do_not_split_lines(tmp_path):
    texts = dict(TEXTS, a="<answer>2.0 to 6.0</answer>\u2028\x85\r\n\x0b")
    answer_shard(answers(texts), RECORDS, tmp_path, EvalConfig())
    done = answer_shard(None, RECORDS, tmp_path, EvalConfig())
    assert done[0].text == texts["a"]


def test_bad_rows_of_the_records_file_are_listed_and_not_scored(folder):
    with (folder.path / "test.jsonl").open("a") as file:
        file.write('{"id": "bad", "task": "temporal_grounding", "video": "v"}\n')
    result = folder("out")
    assert [q.record_id for q in result.quarantined] == ["bad", "q7"]
    assert sum(task.n for task in result.tasks) == 22


def test_ids_must_differ_and_settings_be_possible():
    with pytest.raises(ValueError, match="'a' occurs twice"):
        evaluate(None, None, [grounding("a"), grounding("a")], answer=answers(TEXTS))
    for bad in ({"batch_size": 0}, {"shard_index": 2, "shard_count": 2}, {"level": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EvalConfig(**bad)
    assert [len(b) for b in cut_batches(range(7), 3)] == [3, 3, 1]


def test_main_eval_prints_scores_baseline_and_quarantine(folder, capsys):
    run = EvalRun(
        model=str(folder.path / "model"),
        records=str(folder.path / "test.jsonl"),
        output=str(folder.path / "out"),
    )
    assert main_eval(run) == 0
    out = capsys.readouterr().out
    assert "blind baseline" in out and "mIoU" in out and "multiple_choice" in out
    assert "quarantined q7: v1.mp4: cannot be decoded" in out


def test_processes_of_a_launcher_are_shards(folder, monkeypatch, capsys):
    run = EvalRun(
        model=str(folder.path / "model"),
        records=str(folder.path / "test.jsonl"),
        output=str(folder.path / "launched"),
        eval=EvalConfig(batch_size=4, pictured=0),
    )
    folder("one")
    for rank in ("1", "0"):
        for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert main_eval(run) == 0
    reported = capsys.readouterr()
    assert (
        "shard 1 of 2 is done" in reported.out and "evaluate, shard 0 of 2: 12/12" in reported.err
    )
    assert results(folder.path / "launched") == results(folder.path / "one")
    own = EvalConfig(shard_index=1, shard_count=3)
    assert launched(own, {}) == own
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 .* shard_count=3"):
        launched(own, {"WORLD_SIZE": "2", "RANK": "0"})
    assert launched(EvalConfig(), {}) == EvalConfig()


def test_a_process_of_a_launcher_makes_its_gpu_the_current_one(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    world = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (launched(EvalConfig(), world).device, made) == ("auto", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launched(EvalConfig(device="cpu"), world).device == "cpu" and made == []
    assert launched(EvalConfig(), world).device == "cuda:1" and made == ["cuda:1"]


def test_an_evaluation_that_scores_nothing_fails(folder, capsys):
    (folder.path / "bad.jsonl").write_text('{"id": "bad", "task": "tracking", "video": "v"}\n')
    run = EvalRun(
        model=str(folder.path / "model"),
        records=str(folder.path / "bad.jsonl"),
        output=str(folder.path / "nothing"),
    )
    assert main_eval(run) == 1
    assert "no sample could be scored" in capsys.readouterr().out
