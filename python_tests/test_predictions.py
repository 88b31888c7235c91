"""Completions made elsewhere scored by hand, parts of a split, F1, and published numbers beside."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from vcr1_fast import cli
from vcr1_fast.data.records import Record, write_records
from vcr1_fast.evaluate import run as run_module
from vcr1_fast.evaluate.completions import Completion, given_completions
from vcr1_fast.evaluate.config import EvalConfig, EvalRun
from vcr1_fast.evaluate.published import benchmarks, published_beside
from vcr1_fast.evaluate.run import evaluate, evaluate_predictions
from vcr1_fast.evaluate.score import Bootstrap, Scored, means_and_intervals, score, with_f1
from vcr1_fast.report.table import markdown_table, summary_tables
from vcr1_fast.rewards.judge import JudgeConfig
from vcr1_fast.tasks import TASKS

HALF = [0.0, 0.0, 0.5, 0.5]
QUARTER = [0.0, 0.0, 0.25, 0.5]  # half of HALF: IoU 0.5


def record(name, task, prompt, answer, **fields):
    return Record(id=name, task=task, video=f"v/{name}.mp4", prompt=prompt, answer=answer, **fields)


def grounded(name, kind, glue=((0.0, 4.0),)):
    answer = {"answer": "B", "glue": [list(span) for span in glue]}
    options, metadata = ("a", "b", "c"), {"type": kind, "duration": 10}
    question = {"question": "why?"}
    return record(name, "grounded_qa", question, answer, options=options, metadata=metadata)


EVENT = {"event": "it falls"}
RECORDS = [
    record("t1", "temporal_grounding", EVENT, [0.0, 10.0]),
    record("t2", "temporal_grounding", EVENT, [2.0, 6.0]),
    record("t3", "temporal_grounding", EVENT, [1.0, 2.0]),
    record("k1", "tracking", {"object": "cup"}, [HALF] * 4),
    record("k2", "tracking", {"object": "cup"}, [HALF] * 4),
    grounded("g1", "CW"),
    grounded("g2", "CW", ((0.0, 2.0), (6.0, 8.0))),
    grounded("g3", "TN"),
]
TEXTS = {
    "t1": "<think>long</think><answer>0.0 to 6.0</answer>",  # IoU 0.6
    "t2": "<answer>4.0 to 8.0</answer>",  # 2 of 6 s: 1/3
    "t3": "I cannot tell",  # unparsed: 0
    # The given box right, then IoU 1, 0.5 and 0.
    "k1": f"<answer>{[HALF, HALF, QUARTER, [0.6, 0.6, 0.9, 0.9]]}</answer>",
    "k2": f"<answer>{[HALF] * 3}</answer>",  # a box is missing: unparsed
    "g1": "<answer>B</answer><glue>[(1.0, 3.0)]</glue>",  # IoU 0.5, IoP 1
    "g2": "<answer>B</answer><glue>[(0.0, 8.0)]</glue>",  # IoU 0.5, IoP 0.5
    "g3": "<answer>A</answer><glue>[(2.0, 6.0)]</glue>",  # wrong; IoU 1/3, IoP 0.5
}
EXPECTED = {
    "temporal_grounding": {
        "mIoU": (0.6 + 1 / 3) / 3,
        "R@0.3": 2 / 3,
        "R@0.5": 1 / 3,
        "R@0.7": 0,
    },
    "tracking": {
        "AO": 2.5 / 4 / 2,
        "R@0.5": 1 / 2,  # 0.625
        "R@0.7": 0,
        "SR@0.5": 3 / 4 / 2,
        "SR@0.7": 2 / 4 / 2,
        "AO_unseen": 1.5 / 3 / 2,
        "R@0.5_unseen": 1 / 2,
        "R@0.7_unseen": 0,
        "SR@0.5_unseen": 2 / 3 / 2,
        "SR@0.7_unseen": 1 / 3 / 2,
    },
    "grounded_qa": {
        "accuracy": 2 / 3,
        "mIoU": (0.5 + 0.5 + 1 / 3) / 3,
        "mIoP": (1 + 0.5 + 0.5) / 3,
        "IoU@0.3": 1,
        "IoU@0.5": 2 / 3,
        "IoP@0.3": 1,
        "IoP@0.5": 1,
        "Acc@GQA": 2 / 3,
    },
}


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "test.jsonl", RECORDS)
    lines = [json.dumps({"id": name, "completion": text}) for name, text in TEXTS.items()]
    (tmp_path / "said.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return tmp_path


def test_a_hand_made_file_scores_as_by_hand(folder, capsys):
    options = ["--predictions", str(folder / "said.jsonl"), "--data", str(folder / "test.jsonl")]
    out = folder / "out"
    assert cli.main(["eval", *options, "--output", str(out), "eval.pictured=0"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {name: task["metrics"] for name, task in summary["tasks"].items()} == {
        name: pytest.approx(scores) for name, scores in EXPECTED.items()
    }
    counts = {name: (t["n"], t["parse_failures"]) for name, t in summary["tasks"].items()}
    assert counts == {"temporal_grounding": (3, 1), "tracking": (2, 1), "grounded_qa": (3, 0)}
    reported = capsys.readouterr().out
    assert "0.311" in reported and "33.3 %" in reported
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))
    assert "| accuracy" in (out / "tables.md").read_text()
    # What it wrote can be scored again, to the same numbers.
    again = evaluate_predictions(
        out / "predictions.jsonl", folder / "test.jsonl", folder / "again", EvalConfig()
    )
    assert json.loads(json.dumps(again.summary()))["tasks"] == summary["tasks"]


def test_pictures_of_shards_that_finish_together_are_whole(folder, monkeypatch):
    from vcr1_fast.evaluate import command

    paths = (str(folder / "test.jsonl"), str(folder / "out"))
    run = EvalRun(records=paths[0], output=paths[1], predictions=str(folder / "said.jsonl"))
    assert command.main_eval(run) == 0
    names = ("scores.png", "predictions.html")
    before = {name: (folder / "out" / name).read_bytes() for name in names}
    assert b"<title>predictions.html</title>" in before["predictions.html"]

    def torn(summary, path):
        path.write_bytes(b"half")
        raise OSError("killed while drawing")

    monkeypatch.setattr(command, "write_scores", torn)
    with pytest.raises(OSError, match="killed"):
        command.main_eval(run)
    assert {name: (folder / "out" / name).read_bytes() for name in names} == before
    assert not list((folder / "out").glob(".*"))


def test_parts_of_a_split_by_metadata(folder):
    result = evaluate_predictions(
        folder / "said.jsonl", folder / "test.jsonl", folder / "out", EvalConfig()
    )
    by = {task.task: task.breakdown for task in result.tasks}
    assert by["temporal_grounding"] == by["tracking"] == {}
    parts = by["grounded_qa"]["type"]
    assert list(parts) == ["CW", "TN"] and [part.n for part in parts.values()] == [2, 1]
    assert parts["CW"].metrics["accuracy"] == 1.0 and parts["CW"].interval == (1.0, 1.0)
    assert parts["TN"].metrics["mIoU"] == pytest.approx(1 / 3)
    titles = [table.title for table in summary_tables(json.loads(json.dumps(result.summary())))]
    assert "grounded_qa by type" in titles


@pytest.mark.parametrize(
    ("lines", "reported"),
    [
        ([{"id": "a", "completion": "x"}], "1 records have no completion, first 'b'"),
        ([{"id": n, "text": "x"} for n in "aab"], ":2: answers 'a' again"),
        ([{"id": n, "text": "x"} for n in "abc"], "1 ids are of no record, first 'c'"),
        ([{"id": "a"}], ":1: lacks a text `id` or `completion`"),
        ([{"id": 1, "text": "x"}], ":1: lacks"),
        ([{"id": "a", "text": "x", "tokens": None}], r"said\.jsonl:1: needs .* `tokens` None"),
        ([{"id": "a", "text": "x", "tokens": "12"}], ":1: needs .* `tokens` '12'"),
        ([{"id": "a", "text": "x", "tokens": True}], ":1: needs .* `tokens` True"),
        ([{"id": "a", "text": "x", "finished": "false"}], ":1: needs .* `finished` 'false'"),
        ([{"id": "a", "text": "x", "finished": None}], ":1: needs .* `finished` None"),
    ],
)
def test_files_that_would_change_the_denominator_are_refused(tmp_path, lines, reported):
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=reported):
        given_completions(path, ["a", "b"])


def test_a_model_or_a_file_and_folders_do_not_mix(folder):
    with pytest.raises(ValueError, match="got neither"):
        EvalRun(records="r", output="o")
    with pytest.raises(ValueError, match="got both"):
        EvalRun(records="r", output="o", model="m", predictions="p")
    paths = (folder / "said.jsonl", folder / "test.jsonl", folder / "out")
    evaluate_predictions(*paths)
    said = paths[0].read_text().replace("<answer>A", "<answer>B")
    paths[0].write_text(said)
    with pytest.raises(ValueError, match="predictions_sha256"):
        evaluate_predictions(*paths)
    again = evaluate_predictions(*paths, EvalConfig(restart=True))
    assert {task.task: task.metrics for task in again.tasks}["grounded_qa"]["accuracy"] == 1.0


def test_a_wrong_benchmark_or_judge_is_reported_before_anything_is_answered(folder, monkeypatch):
    monkeypatch.setattr(run_module, "load_answers", lambda path, config: pytest.fail("answered"))
    paths = (folder, folder / "test.jsonl", folder / "out")
    for name, reported in {
        "imagenet": "benchmark must be one of",
        "mvbench": "of multiple_choice",
    }.items():
        with pytest.raises(ValueError, match=reported):
            run_module.evaluate_checkpoint(*paths, EvalConfig(benchmark=name))
    monkeypatch.delenv("NO_KEY", raising=False)
    config = EvalConfig(judge=JudgeConfig(kind="http", model="m", api_key_env="NO_KEY"))
    with pytest.raises(ValueError, match="NO_KEY"):
        run_module.evaluate_checkpoint(*paths, config)
    with pytest.raises(ValueError, match="NO_KEY"):
        evaluate(None, None, RECORDS, config, answer=lambda batches: pytest.fail("answered"))


def test_f1_is_of_the_means_and_its_interval_of_resampled_means():
    assert with_f1({"recall": 0.279, "precision": 0.338})["F1"] == pytest.approx(0.3057, abs=1e-4)
    assert with_f1({"recall": 0.0, "precision": 0.0})["F1"] == 0.0
    assert with_f1({"recall": 1.0}) == {"recall": 1.0}
    reported = record("c", "caption", {"instruction": "tell"}, ["it falls"])
    pairs = [(1.0, 0.0), (0.0, 1.0)] * 40
    items = [
        Scored(
            replace(reported, video=str(i)),
            Completion("c"),
            "x",
            {"precision": p, "recall": r, "F1": 0.0},
        )
        for i, (p, r) in enumerate(pairs)
    ]
    means, intervals = means_and_intervals(items, Bootstrap(resamples=500))
    assert means == {"precision": 0.5, "recall": 0.5, "F1": 0.5}  # not the mean of the samples'
    # precision = 1 - recall here, so F1 = 2 p (1 - p): never above 0.5.
    low, high = intervals["F1"]
    assert 0.45 < low < high <= 0.5
    assert np.subtract(*intervals["precision"][::-1]) > 0.15


def test_all_predictions_of_a_task_are_measured_at_once_and_keep_their_order():
    answered = [
        (item, Completion(item.id, TEXTS[item.id])) for item in RECORDS[::2] + RECORDS[1::2]
    ]
    calls = []

    def measure(task, predictions, records):
        calls.append((task.name, [record.id for record in records]))
        return {"length": [float(len(str(prediction))) for prediction in predictions]}

    scored = score(answered, measure)
    assert calls == [
        ("temporal_grounding", ["t1", "t3", "t2"]),
        ("tracking", ["k2", "k1"]),
        ("grounded_qa", ["g2", "g1", "g3"]),
    ]
    assert [item.record.id for item in scored] == [record.id for record, _ in answered]
    assert all(item.metrics["length"] == len(str(item.prediction)) for item in scored)


def test_a_record_that_failed_is_asked_again_when_reported_to(tmp_path, monkeypatch):
    write_records(tmp_path / "test.jsonl", RECORDS[:3])
    (tmp_path / "model").mkdir()
    asked, broken = [], {"t2"}

    def answer(batches):
        for batch in batches:
            asked.append([item.id for item in batch])
            yield [
                Completion(item.id, error="timed out")
                if item.id in broken
                else Completion(item.id, TEXTS[item.id])
                for item in batch
            ]

    monkeypatch.setattr(run_module, "load_answers", lambda path, config: answer)

    def start(**settings):
        paths = (tmp_path / "model", tmp_path / "test.jsonl", tmp_path / "out")
        return run_module.evaluate_checkpoint(*paths, EvalConfig(batch_size=2, **settings))

    assert [item.reason for item in start().quarantined] == ["timed out"]
    broken.clear()
    assert len(start().quarantined) == 1  # stays as it was
    result = start(retry_failed=True)
    assert asked == [["t1", "t2"], ["t3"], ["t1", "t2"]]  # its batch, as a whole
    assert result.quarantined == [] and result.tasks[0].n == 3
    assert start(retry_failed=True).summary() == result.summary() and len(asked) == 3


def test_published_numbers_are_those_of_the_papers_tables():
    known = benchmarks()
    charades = known["charades_sta"].models
    assert charades["VideoChat-R1"] == pytest.approx(
        {"mIoU": 0.608, "R@0.5": 0.717, "R@0.7": 0.502}
    )
    assert known["nextgqa"].models["GRPO"] == pytest.approx({"mIoU": 0.351, "accuracy": 0.687})
    for split in known.values():
        task = TASKS[split.task]
        for scores in split.models.values():
            assert all(0 <= score <= 1 for score in scores.values())
            wanted = set(scores) - {"precision", "recall", "F1"}  # a judge's
            assert wanted <= set(_metrics_of(task))


def _metrics_of(task):
    answers = {"grounded_qa": {"answer": "A", "glue": [[0, 1]]}, "temporal_grounding": [0, 1]}
    answer = answers.get(task.name, [HALF] * 8 if task.name == "tracking" else "A")
    return task.batch_metrics([None], [record("x", task.name, {}, answer, options=("A", "B"))])


def split_of(count, **metadata):
    return [
        record(f"r{i}", "tracking", {"object": "cup"}, [HALF] * 8, metadata=metadata)
        for i in range(count)
    ]


def test_the_split_is_reported_by_setting_or_metadata_and_checked_by_size():
    shown, reasons = published_beside(split_of(180, benchmark="got10k"))
    assert shown["tracking"].name == "GOT-10k val" and reasons == []
    assert published_beside(split_of(180))[0] == {}
    assert "tracking" in published_beside(split_of(180), "got10k")[0]
    shown, reasons = published_beside(split_of(179), "got10k")
    assert shown == {} and "has 180 records, these are 179" in reasons[0]
    mixed = split_of(90, benchmark="got10k") + [
        replace(item, id=f"o{item.id}") for item in split_of(90)
    ]
    assert published_beside(mixed) == ({}, [])
    shown, reasons = published_beside(split_of(180), "got10k", unanswered={"r7"})
    assert shown == {} and "1 of 180 records of GOT-10k val are not scored" in reasons[0]
    none = {item.id for item in split_of(180)}
    assert published_beside(split_of(180), "got10k", unanswered=none)[0] == {}
    with pytest.raises(ValueError, match="charades_sta is a benchmark of temporal_grounding"):
        published_beside(split_of(180), "charades_sta")
    with pytest.raises(ValueError, match="benchmark must be one of charades_sta"):
        published_beside(split_of(180), "imagenet")


def test_published_numbers_do_not_stand_beside_a_part_of_their_split():
    records = split_of(180)

    def answer(batches, failing):
        for batch in batches:
            yield [Completion(r.id, error="torn" if r.id in failing else None) for r in batch]

    for failing in ({}, {"r3"}, {item.id for item in records}):
        config = EvalConfig(benchmark="got10k", resamples=10)
        answers = partial(answer, failing=failing)
        result = evaluate(None, None, records, config, answer=answers)
        assert set(result.published) == (set() if failing else {"tracking"})
        assert len(result.notes) == bool(failing)


def test_published_numbers_and_baselines_are_in_one_table():
    records = split_of(180, benchmark="got10k")
    text = f"<answer>{[HALF] * 8}</answer>"

    def answer(batches):
        for batch in batches:
            yield [Completion(item.id, text) for item in batch]

    result = evaluate(None, None, records, answer=answer)
    *_, table = summary_tables(json.loads(json.dumps(result.summary())))
    assert "2504.06958" in table.title
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["this run"]["AO"] == "1.000" and rows["blind baseline"]["AO"] == "1.000"
    assert rows["VideoChat-R1"]["R@0.5"] == "0.382"
    assert rows["VideoChat-R1"]["R@0.7"] == "\N{EN DASH}"
    assert "VideoChat-R1-thinking" in markdown_table(table)
    assert Counter(table.columns)["AO_unseen"] == 0  # not what was published
