"""Converters: small files in the published shapes, and the shipped annotations where they are."""

import json
import os
from pathlib import Path

import pytest

from vcr1_fast.data.convert import convert
from vcr1_fast.data.records import load_records

ANNOTATIONS = Path(os.environ.get("VCR1_TEST_DATA", "../shared/data")) / "annotations"

CHARADES = {
    "AAAAA": {
        "duration": 30.5,
        "timestamps": [[0.0, 6.9], [8, 7], [20.0, 31.0]],
        "sentences": [" A person sits. ", "a person stands.", "the person leaves"],
    },
    "BBBBB": {"duration": 12, "timestamps": [[1, 2]], "sentences": ["a dog barks."]},
}
NEXTGQA = {
    "id": "7_1",
    "video": "11/7.mp4",
    "question": "why did the boy run ",
    "options": ["(A) to play", "(B) he (maybe) fell", "(C) sleep"],
    "duration": 30,
    "glue": [[-0.1, 2.5], [4.0, 9.0]],
    "type": "CW",
    "answer": "(B)",
}
GOT = {"path": "/raw/GOT-10k/val/GOT-10k_Val_000010", "object": "sloth"}
GOT["gt"] = [[0.1, 0.0, 0.8, 0.75 + i / 100] for i in range(8)]
QUALITY = {
    "video": "12.mp4",
    "instruction": "How good is it? Choice one answer from ['low quality', 'high quality'].",
    "answer": "low quality",
}


def converted(tmp_path, kind, content):
    source, output = tmp_path / "source.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(content))
    return convert(kind, source, output, media_root=tmp_path / "media"), output


def test_charades(tmp_path):
    done, output = converted(tmp_path, "charades", CHARADES)
    assert (done.videos, done.annotations, done.records, done.quarantined) == (2, 4, 3, 1)
    records = load_records(output)
    assert [r.id for r in records] == ["AAAAA-0", "AAAAA-2", "BBBBB-0"]
    first = records[0]
    assert first.prompt == {"event": "a person sits"} and first.answer == [0.0, 6.9]
    assert first.video == str(tmp_path / "media/AAAAA.mp4") and first.metadata["duration"] == 30.5
    (refused,) = map(json.loads, output.with_suffix(".quarantine.jsonl").read_text().splitlines())
    assert refused["record_id"] == "AAAAA-1" and refused["source"].endswith("json:AAAAA[1]")
    assert "start 8 is not before end 7" in refused["reason"]
    # Once more: the list of refusals is written anew, not added to.
    assert converted(tmp_path, "charades", CHARADES)[0] == done


def test_nextgqa(tmp_path):
    (record,) = load_records(converted(tmp_path, "nextgqa", [NEXTGQA])[1])
    assert record.task == "grounded_qa" and record.video.endswith("media/11/7.mp4")
    assert record.options == ("to play", "he (maybe) fell", "sleep")
    assert record.answer == {"answer": "B", "glue": [[0.0, 2.5], [4.0, 9.0]]}
    assert record.metadata == {"duration": 30, "type": "CW"}


def test_got10k_and_quality(tmp_path):
    (record,) = load_records(converted(tmp_path, "got10k", [GOT])[1])
    assert record.task == "tracking" and record.video.endswith("media/val/GOT-10k_Val_000010")
    assert record.answer == GOT["gt"] and record.prompt == {"object": "sloth"}
    (record,) = load_records(converted(tmp_path, "quality", [QUALITY])[1])
    assert record.task == "classification" and record.options == ("low quality", "high quality")
    assert record.prompt == {"question": "How good is it?"} and record.answer == "low quality"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("coco", [], "unknown format 'coco'"),
        ("charades", [], "charades is a JSON dict"),
        ("charades", {"A": {"timestamps": [[1, 2]], "sentences": []}}, "entry 'A'"),
        ("nextgqa", [NEXTGQA, {"id": 1}], "entry 1 is not nextgqa's"),
        ("nextgqa", [NEXTGQA | {"options": ["(B) x", "(A) y"]}], "entry 0"),
        ("quality", [QUALITY | {"instruction": "Well?"}], "no list of labels"),
    ],
)
def test_other_structures_are_named(tmp_path, kind, content, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, kind, content)


# (format, file, videos, annotations, refused)
SHIPPED = [
    ("charades", "Charades/train.json", 5338, 12408, 4),
    ("charades", "Charades/charades_test.json", 1334, 3720, 0),
    ("activitynet", "ActivityNet/test.json", 4885, 17031, 0),
    ("nextgqa", "NextGQA/nextgqa_val.json", 567, 3358, 0),
    ("nextgqa", "NextGQA/nextgqa_test.json", 990, 5553, 0),
    ("got10k", "Got/got_val.json", 180, 180, 0),
    ("quality", "VideoEval/Quality_Access_100shot.json", 200, 200, 0),
    ("quality", "VideoEval/Quality_Access_test.json", 724, 724, 0),
]


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="VCR1_TEST_DATA has no annotations")
@pytest.mark.parametrize(("kind", "name", "videos", "annotations", "refused"), SHIPPED)
def test_shipped_annotations(tmp_path, kind, name, videos, annotations, refused):
    done = convert(kind, ANNOTATIONS / name, tmp_path / "out.jsonl", media_root="/media")
    assert (done.videos, done.annotations, done.quarantined) == (videos, annotations, refused)
    assert done.records == annotations - refused == len(load_records(done.path))
    if refused:
        lines = done.path.with_suffix(".quarantine.jsonl").read_text().splitlines()
        ids = sorted(json.loads(line)["record_id"].split("-")[0] for line in lines)
        assert ids == ["AKKWU", "AKKWU", "IOL8Q", "LEOL6"]
