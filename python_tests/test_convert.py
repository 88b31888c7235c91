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
    # Once more: the list of refusals is overwritten, not added to.
    assert converted(tmp_path, "charades", CHARADES)[0] == done


def test_nextgqa(tmp_path):
    (record,) = load_records(converted(tmp_path, "nextgqa", [NEXTGQA])[1])
    assert record.task == "grounded_qa" and record.video.endswith("media/11/7.mp4")
    assert record.options == ("to play", "he (maybe) fell", "sleep")
    assert record.answer == {"answer": "B", "glue": [[0.0, 2.5], [4.0, 9.0]]}
    assert record.metadata == {"duration": 30, "type": "CW"}


def test_timelens(tmp_path):
    """Entries in the shape of the published files."""
    bench = {"3MSZA": {"duration": 31.0, "spans": [[25, 30], [1, 24]],
                       "queries": ["A woman flips  the switch.", " She walks "]}}  # fmt: skip
    first, second = load_records(converted(tmp_path, "timelens_bench", bench)[1])
    assert (first.task, first.answer) == ("temporal_grounding", [25, 30])
    assert first.prompt == {"event": "A woman flips the switch"} and first.metadata == {
        "duration": 31.0
    }
    assert first.video.endswith("media/3MSZA.mp4") and second.prompt == {"event": "She walks"}
    train = {"source": "cosmo_cap", "video_path": "cosmo_cap/BVs52yd-RUQ.mp4", "duration": 117.42,
             "events": [{"query": "When does he speak?", "span": [[0.0, 5.0]]},
                        {"query": "A bottle.", "span": [[8.0, 12.0], [20.0, 21.5]]},
                        {"query": "Nothing", "span": [[9.0, 3.0]]}]}  # fmt: skip
    source, output = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(train) + "\n")
    done = convert("timelens_100k", source, output, media_root=tmp_path)
    assert (done.videos, done.annotations, done.quarantined) == (1, 3, 1)
    one, several = load_records(output)
    assert (one.id, one.answer) == ("cosmo_cap/BVs52yd-RUQ-0", [0.0, 5.0])
    assert one.video == str(tmp_path / "cosmo_cap/BVs52yd-RUQ.mp4")
    assert (several.task, several.answer) == ("moment_retrieval", [[8.0, 12.0], [20.0, 21.5]])
    assert several.metadata == {"duration": 117.42, "source": "cosmo_cap"}


def test_got10k_and_quality(tmp_path):
    (record,) = load_records(converted(tmp_path, "got10k", [GOT])[1])
    assert record.task == "tracking" and record.video.endswith("media/val/GOT-10k_Val_000010")
    assert record.answer == GOT["gt"] and record.prompt == {"object": "sloth"}
    (record,) = load_records(converted(tmp_path, "quality", [QUALITY])[1])
    assert record.task == "classification" and record.options == ("low quality", "high quality")
    assert record.prompt == {"question": "How good is it?"} and record.answer == "low quality"


MVBENCH = {
    "video": "ABCDE.mp4",
    "question": "What happened?",
    "candidates": ["Sat down.", "Stood up.", "Ate."],
    "answer": "Stood up.",
    "start": 3.5,
    "end": 9.0,
}
PERCEPTION = {
    "video_10": {
        "metadata": {"split": "valid", "video_id": "video_10"},
        "mc_question": [
            {
                "id": 0,
                "question": "Is the camera moving or static?",
                "options": ["I don't know", "moving", "static or shaking"],
                "answer_id": 2,
                "area": "physics",
                "reasoning": "descriptive",
                "tag": ["motion"],
            },
            {
                "id": 1,
                "question": "What will happen?",
                "options": ["a", "b", "c"],
                "area": "memory",
                "reasoning": "predictive",
                "tag": [],
            },
        ],
    }
}
VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity",
    "url": "https://example.org/x",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many?",
    "options": ["A. Two.", "B. Three.", "C. Four.", "D. None."],
    "answer": "C",
}
DREAM = {
    "idx": 7,
    "dataset": "DREAM/movie_animation",
    "text": {"prompt": "<video>", "response": "Two birds hover. A horse appears."},
    "video_file": "<placeholder>",
    "extra_info": {"duration": 8.22, "events": ["Two birds hover", "A horse appears"]},
    "vid": 7,
}


def test_mvbench_is_a_folder_of_tasks(tmp_path):
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "action_sequence.json").write_text(json.dumps([MVBENCH, MVBENCH | {"answer": "x"}]))
    frames = {key: MVBENCH[key] for key in ("video", "question", "candidates", "answer")}
    (folder / "episodic_reasoning.json").write_text(json.dumps([frames | {"video": "s01/e02"}]))
    done = convert("mvbench", folder, tmp_path / "out.jsonl", media_root="/m/video")
    assert (done.records, done.quarantined) == (2, 1)
    clip, frames = load_records(done.path)
    assert clip.id == "action_sequence-0" and clip.answer == "B" and clip.options[2] == "Ate."
    assert clip.video == "/m/video/star/Charades_v1_480/ABCDE.mp4"
    assert (clip.start, clip.end) == (3.5, 9.0)
    assert clip.metadata == {"type": "action sequence", "benchmark": "mvbench"}
    assert frames.video == "/m/video/tvqa/frames_fps3_hq/s01/e02" and frames.metadata["fps"] == 3.0
    single = convert("mvbench", folder / "action_sequence.json", done.path, media_root="/m")
    assert single.records == 1


def test_perception_test(tmp_path):
    done, output = converted(tmp_path, "perception_test", PERCEPTION)
    assert (done.records, done.quarantined) == (1, 1)
    (record,) = load_records(output)
    assert (record.id, record.answer) == ("video_10-0", "C")
    # No benchmark: the published numbers do not tell their split, and this may be the train file.
    assert record.metadata == {"type": "descriptive", "domain": "physics"}
    refused = output.with_suffix(".quarantine.jsonl").read_text()
    assert "'video_10-1'" not in refused and "field 'answer'" in refused  # the test split's rows


def test_videomme_as_json_and_as_parquet(tmp_path):
    long = VIDEOMME | {"question_id": "900-3", "duration": "long"}
    done, output = converted(tmp_path, "videomme", [VIDEOMME, long])
    short, other = load_records(output)
    assert short.video == str(tmp_path / "media/fFjv93ACGo8.mp4") and short.answer == "C"
    assert short.options == ("Two.", "Three.", "Four.", "None.")
    assert short.metadata["benchmark"] == "videomme_short" and short.metadata["length"] == "short"
    assert "benchmark" not in other.metadata
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([VIDEOMME, long]), tmp_path / "test.parquet")
    again = convert("videomme", tmp_path / "test.parquet", output, media_root=tmp_path / "media")
    assert again == done and load_records(output) == [short, other]


def test_dream1k_from_json_lines(tmp_path):
    source = tmp_path / "DREAM-1k.jsonl"
    source.write_text(json.dumps(DREAM) + "\n\n" + json.dumps(DREAM | {"idx": 8}) + "\n")
    done = convert("dream1k", source, tmp_path / "out.jsonl", media_root="/m")
    assert done.tasks == {"caption": 2}
    record = load_records(done.path)[0]
    assert record.video == "/m/7.mp4" and record.answer == ["Two birds hover", "A horse appears"]
    assert record.metadata["domain"] == "movie_animation" and record.metadata["duration"] == 8.22


def test_only_newlines_end_the_lines_of_json_lines(tmp_path):
    said = DREAM["text"] | {"response": "Two\u2028birds\x85hover.\x1c"}
    source = tmp_path / "DREAM-1k.jsonl"
    text = json.dumps(DREAM | {"text": said}, ensure_ascii=False)
    source.write_bytes(f"{text}\r\n{json.dumps(DREAM | {'idx': 8})}\n".encode())
    done = convert("dream1k", source, tmp_path / "out.jsonl", media_root="/m")
    assert done.tasks == {"caption": 2}
    assert load_records(done.path)[0].metadata["description"] == said["response"]


def video_r1(**changes):
    base = {
        "problem_id": 2,
        "problem": "What appears?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. A ship", "B. A cat"],
        "solution": "<answer>B</answer>",
        "path": "./LLaVA/a.mp4",
        "data_source": "LLaVA",
    }
    return base | changes


def test_video_r1_by_problem_type(tmp_path):
    image = {"data_type": "image", "path": "./Chart/a.png", "options": []}
    rows = [
        video_r1(),
        video_r1(
            problem_id=3, problem_type="numerical", solution="<answer>1,200</answer>", **image
        ),
        video_r1(problem_id=4, problem_type="regression", solution="<answer>2.5</answer>"),
        video_r1(problem_id=5, problem_type="OCR", solution="<answer>STOP</answer>", **image),
        video_r1(problem_id=6, problem_type="free-form", solution="<answer>It runs.</answer>"),
        video_r1(problem_id=7, problem_type="numerical", solution="<answer>x + 1</answer>"),
        video_r1(problem_id=8, problem_type="math"),
        video_r1(problem_id=9, solution="B"),
        video_r1(problem_id=10, options=["B. x", "A. y"]),
        video_r1(problem_id=2),
        video_r1(problem_id=11, problem_type="regression", solution="<answer>1,5</answer>"),
        video_r1(problem_id=12, problem_type="regression", solution="<answer>40%</answer>"),
        video_r1(problem_id=13, problem_type="numerical", solution="<answer>1/2</answer>"),
    ]
    done, output = converted(tmp_path, "video_r1", rows)
    assert done.tasks == {
        "multiple_choice": 1,
        "numeric": 2,
        "regression": 2,
        "ocr": 1,
        "open_ended": 1,
    }
    choice, number, _, text, _, share, half = load_records(output)
    assert (share.answer, half.answer) == (0.4, 0.5)  # as the reward reads them
    assert choice.video == str(tmp_path / "media/LLaVA/a.mp4") and choice.options == (
        "A ship",
        "A cat",
    )
    assert (number.image, number.answer) == (str(tmp_path / "media/Chart/a.png"), 1200.0)
    assert (text.video, text.answer) == (None, "STOP")
    refused = output.with_suffix(".quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in refused]
    phrases = (
        "is no number",
        "'math'",
        "solution",
        "options",
        "occurs twice",
        "1,5</answer>' is no",
    )
    for reason, words in zip(reasons, phrases, strict=True):
        assert words in reason


def test_the_mixture_of_videochat_r15(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    (tmp_path / "media/coco").mkdir(parents=True)
    image_module.new("RGB", (200, 100)).save(tmp_path / "media/coco/a.png")
    ask = {"question": "Why?", "options": ["(A) x", "(B) y"], "answer": "(B)"}
    parts = {
        "nextgqa": (
            "video",
            "gqa",
            [ask | {"video": "v.mp4", "glue": [[1, 2.5]], "duration": 9}],
        ),
        "boxes": (
            "image",
            "igqa",
            [
                ask | {"image": "a.png", "glue": [20, 10, 100, 60]},
                ask | {"image": "none.png", "glue": [20, 10, 100, 60]},
                ask | {"image": "none.png", "glue": [0.1, 0.1, 0.5, 0.6]},
                ask | {"image": "a.png", "glue": [20, 10, 300, 60]},
            ],
        ),
        "charades": (
            "video",
            "tg",
            [{"video": "v.mp4", "question": "a man sits", "glue": [3, 8.5], "duration": 30.1}],
        ),
        "coco": (
            "image",
            "detection",
            [{"image": "a.png", "question": "the dog", "glue": [0, 0, 50, 50]}],
        ),
        "letters": ("image", "mc", [ask | {"image": "a.png"}]),
    }
    (tmp_path / "json").mkdir()
    mixture = {}
    for name, (media, task, rows) in parts.items():
        (tmp_path / "json" / f"{name}.json").write_text(json.dumps(rows))
        mixture[name] = {"media_type": media, "task_type": task, "visual_base": "coco"}
        mixture[name]["json_path"] = f"json/{name}.json"
    done, output = converted(tmp_path, "videochat_r15", mixture)
    assert (done.records, done.quarantined) == (6, 2)
    records = {record.id: record for record in load_records(output)}
    assert records["nextgqa/0"].answer == {"answer": "B", "glue": [[1, 2.5]]}
    assert records["nextgqa/0"].video == str(tmp_path / "media/coco/v.mp4")
    assert records["boxes/0"].answer == {"answer": "B", "glue": [0.1, 0.1, 0.5, 0.6]}
    assert records["boxes/0"].answer == records["boxes/2"].answer
    assert records["charades/0"].task == "moment_retrieval"
    assert records["charades/0"].answer == [[3, 8.5]]
    assert records["coco/0"].answer == [0, 0, 0.25, 0.5]
    assert records["coco/0"].prompt == {"question": "Where is this: the dog?"}
    assert records["letters/0"].answer == "B" and records["letters/0"].options == ("x", "y")
    refused = output.with_suffix(".quarantine.jsonl").read_text()
    assert "none.png" in refused and "leaves the image of 200 x 100" in refused


def test_refcoco_divides_by_the_size_of_the_row_or_of_the_image(tmp_path):
    rows = [
        {"img_path": "a.jpg", "expression": "left man.", "bbox": [32, 24, 320, 240]}
        | {"width": 640, "height": 480},
        {"img_path": "a.jpg", "expression": "left man", "bbox": [32, 24, 320, 240]},
    ]
    done, output = converted(tmp_path, "refcoco", rows)
    (record,) = load_records(output)
    assert record.answer == [0.05, 0.05, 0.5, 0.5] and done.quarantined == 1
    assert record.prompt == {"question": "Where is this: left man?"}


def test_normalised_boxes_may_leave_the_image_by_rounding(tmp_path):
    rows = [
        {"img_path": "a.jpg", "expression": "man", "bbox": box, "width": 640, "height": 480}
        for box in ([0.25, -0.002, 1.003, 1.0], [0.1, 0.2, 0.123456, 1], [-0.3, 0, 0.5, 0.5])
    ]
    done, output = converted(tmp_path, "refcoco", rows)
    over, inside = load_records(output)
    assert over.answer == [0.25, 0.0, 1.0, 1.0] and inside.answer == [0.1, 0.2, 0.123456, 1]
    assert done.quarantined == 1


def test_the_split_is_kept(tmp_path):
    (tmp_path / "source.json").write_text(json.dumps([NEXTGQA]))
    done = convert(
        "nextgqa",
        tmp_path / "source.json",
        tmp_path / "out.jsonl",
        media_root="/m",
        benchmark="nextgqa",
    )
    assert load_records(done.path)[0].metadata["benchmark"] == "nextgqa"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("coco", [], "unknown format 'coco'"),
        ("charades", [], "expected a JSON object, got a list"),
        ("nextgqa", {}, "expected a list, got a dict"),
        ("charades", {"A": {"timestamps": [[1, 2]], "sentences": []}}, "entry 'A'"),
        ("nextgqa", [NEXTGQA | {"options": ["(B) x", "(A) y"]}], "entry '0'"),
        ("quality", [QUALITY | {"instruction": "Well?"}], "no list of labels"),
        ("mvbench", [MVBENCH], "source is no task of MVBench"),
        ("videochat_r15", {"a": {"media_type": "video"}}, "'a' is no part of a mixture"),
    ],
)
def test_other_structures_are_named(tmp_path, kind, content, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, kind, content)


def test_files_that_are_none_are_named(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text("{'a': 1}")
        with pytest.raises(ValueError, match=rf"{name}(:1)?: not JSON"):
            convert("nextgqa", tmp_path / name, tmp_path / "out.jsonl", media_root="/m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json files"):
        convert("mvbench", tmp_path / "empty", tmp_path / "out.jsonl", media_root="/m")


MALFORMED = {
    "question": (NEXTGQA | {"question": 3}, "has no attribute 'strip'"),
    "glue": ({k: v for k, v in NEXTGQA.items() if k != "glue"}, "field 'glue': missing"),
    "a list": ([1, 2], "indices must be integers"),
    "nothing": (None, "NoneType"),
    "spans": (NEXTGQA | {"glue": [[1, 2, 3]]}, "too many values"),
    "letter": (NEXTGQA | {"answer": "(Z)"}, "field 'answer.answer': expected a letter A to C"),
    "id": (NEXTGQA | {"id": 5}, "field 'id': expected a text"),
    "twice": (NEXTGQA, "field 'id': '7_1' occurs twice"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_quarantined_with_the_field_named(tmp_path, name):
    entry, words = MALFORMED[name]
    done, output = converted(tmp_path, "nextgqa", [NEXTGQA, entry])
    assert (done.records, done.quarantined, done.annotations) == (1, 1, 2)
    assert [record.id for record in load_records(output)] == ["7_1"]
    (refused,) = map(json.loads, output.with_suffix(".quarantine.jsonl").read_text().splitlines())
    assert refused["source"].endswith("source.json:1") and words in refused["reason"]


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
