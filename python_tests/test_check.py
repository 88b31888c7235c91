"""The data set doctor, on records with one fault each, and the published floors."""

import json
import os
from pathlib import Path

import pytest

from vcr1_fast import cli
from vcr1_fast.data.convert import convert
from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.evaluate.check import check, report_text

ANNOTATIONS = Path(os.environ.get("VCR1_TEST_DATA", "../shared/data")) / "annotations"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder, SynthConfig(train=3, val=0, test=2, workers=0))


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def with_faults(path):
    """The train split with one of every fault; kinds and records of what was planted."""
    lines = rows(path)
    spans = [row for row in lines if row["task"] == "temporal_grounding"]
    letters = [row for row in lines if row["task"] == "multiple_choice"]
    tracks = [row for row in lines if row["task"] == "tracking"]
    spans[0]["answer"][1] = spans[0]["metadata"]["duration"] + 2.0
    spans[1]["metadata"]["duration"] += 5.0
    lines.append(letters[0] | {"id": "again"})
    lines.append(letters[0] | {"id": "lost", "video": "videos/none.mp4"})
    lines.append(letters[0] | {"id": "broken", "video": "videos/broken.mp4"})
    lines.append(letters[0] | {"id": "row", "answer": "Z"})
    del tracks[0]["metadata"]["times"]
    (path.parent / "videos/broken.mp4").write_bytes(b"no video")
    output = path.with_name("faults.jsonl")
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return output, {
        ("answer past the end", spans[0]["id"]),
        ("duration mismatch", spans[1]["id"]),
        ("repeated question", "again"),
        ("missing video", "lost"),
        ("unreadable video", "broken"),
        ("malformed row", "row"),
        ("boxes without times", tracks[0]["id"]),
    }


def test_every_fault_is_found_and_nothing_else(dataset):
    assert check(dataset["train"], train=dataset["test"]).faults == []
    path, planted = with_faults(dataset["train"])
    report = check(path)
    assert {(fault.kind, fault.record) for fault in report.faults} == planted
    assert len(report.faults) == len(planted)
    text = report_text(report)
    assert "answer past the end: 1" in text and "none.mp4: no such file" in text
    assert report.records == len(rows(dataset["train"])) + 3


def test_training_videos_are_told(dataset):
    report = check(dataset["test"], train=dataset["test"], media=False)
    assert report.counts() == {"video also trained on": report.records}


def test_balance_and_command(dataset, tmp_path, capsys):
    output = tmp_path / "report.json"
    arguments = ["data", "check", str(dataset["train"]), "--no-media", "--json", str(output)]
    assert cli.main(arguments) == 0
    saved = json.loads(output.read_text())
    answers = [r["answer"] for r in rows(dataset["train"]) if r["task"] == "multiple_choice"]
    shares = saved["balance"]["multiple_choice"]
    assert shares == {a: pytest.approx(answers.count(a) / len(answers)) for a in set(answers)}
    assert set(saved["tasks"]) == set(saved["floors"]) and saved["faults"] == {}
    assert "without looking at the video" in capsys.readouterr().out


# (format, file, task, strategy, {metric: percent}): from the annotations, by VideoChat-R1's metrics
FLOORS = [
    (
        "got10k",
        "Got/got_val.json",
        "first box repeated",
        {"AO": 42.4, "R@0.5": 32.2, "R@0.7": 5.6},
    ),
    (
        "charades",
        "Charades/charades_test.json",
        "constant span",
        {"mIoU": 30.6, "R@0.3": 48.8, "R@0.5": 27.7, "R@0.7": 11.9},
    ),
    (
        "activitynet",
        "ActivityNet/test.json",
        "whole video",
        {"mIoU": 34.6, "R@0.3": 48.0, "R@0.5": 21.2, "R@0.7": 12.4},
    ),
    ("nextgqa", "NextGQA/nextgqa_test.json", "most frequent letter, whole video", {"mIoU": 22.6}),
]


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="VCR1_TEST_DATA has no annotations")
@pytest.mark.parametrize(("kind", "name", "strategy", "expected"), FLOORS)
def test_published_floors(tmp_path, kind, name, strategy, expected):
    path = convert(kind, ANNOTATIONS / name, tmp_path / "out.jsonl", media_root="/media").path
    report = check(path, media=False)
    (strategies,) = report.floors.values()
    got = {metric: 100 * strategies[strategy][metric] for metric in expected}
    assert got == pytest.approx(expected, abs=0.06)  # published to one decimal
    if kind == "charades":
        assert report.counts() == {"answer past the end": 562}  # 15.1 %
