"""Frames, boxes and spans in the viewer's data, compared with the record's. What a browser makes of
them: test_viewer.py."""

import base64
import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.data.requests import clip_key
from vcr1_fast.data.video import Clip, VideoError
from vcr1_fast.evaluate import command
from vcr1_fast.evaluate.config import EvalConfig, EvalRun
from vcr1_fast.evaluate.run import evaluate_predictions
from vcr1_fast.report.pictures import HEIGHT, boxes_at, pictures_of, spans_of
from vcr1_fast.report.rollouts import RunData, write_predictions_html, write_rollouts_html
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.grounded_qa import GroundedAnswer

image = pytest.importorskip("PIL.Image")

FRAMES = np.zeros((4, 220, 400, 3), np.uint8)
FRAMES[..., 0] = np.array([0, 80, 160, 240])[:, None, None]


class Reader:
    """Gives every record the same four frames of ten seconds; counts what is read."""

    def __init__(self):
        self.read_paths, self.rates = [], []

    def read(self, requests):
        for request in requests:
            self.read_paths.append(request.path)
            self.rates.append(request.folder_fps)
            if request.path.endswith("lost.mp4"):
                yield VideoError(request.path, "no <such> file")
            else:
                yield Clip(FRAMES, np.array([0.0, 2.5, 5.0, 7.5]), 0.4, 10.0, request.path)


def record(name, task="temporal_grounding", answer=(2.0, 4.5), **fields):
    prompt = {"event": "it moves", "question": "?", "object": "cup"}
    return Record(name, task, f"{name}.mp4", prompt, answer, **fields)


BOX = [0.25, 0.5, 0.75, 1.0]
TRACK = [[0.0, 0.0, 0.5, 0.5], BOX, BOX, BOX]


def test_which_numbers_are_spans_and_which_are_boxes():
    assert spans_of((2.0, 4.5)) == [[2.0, 4.5]]
    assert spans_of({"answer": "B", "glue": [[1, 2], [3, 4]]}) == [[1, 2], [3, 4]]
    assert spans_of({"letter": "B", "spans": None}) == spans_of(None) == spans_of("B") == []
    times, none = [0.0, 2.5, 5.0, 7.5], [None] * 4
    assert boxes_at(BOX, times) == [BOX] * 4 and boxes_at(TRACK, times) == TRACK
    assert boxes_at(TRACK[:3], times) == [*TRACK[:3], None]
    for other in ((2.0, 4.5), 3.0, [], "abcd", None, [float("nan")] * 4, {"glue": [[1, 2]]}):
        assert boxes_at(other, times) == none
    assert boxes_at({"answer": "B", "glue": BOX}, times) == [BOX] * 4
    assert boxes_at({"letter": "B", "box": tuple(BOX)}, times) == [BOX] * 4
    tube = {"time": [2.0, 6.0], "boxes": {"2": BOX, "3": TRACK[0], "6": BOX}}
    assert boxes_at(tube, times) == [None, BOX, None, None]  # 2.5 s: of 2 and 3 the first
    assert boxes_at(tube, [3.4, 6.5, 6.6]) == [TRACK[0], BOX, None]
    assert spans_of(tube) == [[2.0, 6.0]]


def data_of(path):
    """The data that a page holds, as its script reads them."""
    held = path.read_text(encoding="utf-8").split('<script type="application/json" id="data">')[1]
    return json.loads(held.split("</script>")[0])


def test_a_folder_of_images_is_shown_at_its_records_rate():
    reader = Reader()
    pictures_of([record("a", metadata={"fps": 3.0}), record("b")], reader)
    assert reader.rates == [3.0, None]


def test_thumbnails_are_the_frames_made_small():
    (picture,) = pictures_of([record("a")], Reader()).values()
    files = [
        base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")) for uri in picture.frames
    ]
    shown = [np.asarray(image.open(io.BytesIO(file))) for file in files]
    assert [frame.shape for frame in shown] == [(HEIGHT, 200, 3)] * 4
    reds = [frame[..., 0].mean() for frame in shown]
    assert reds == pytest.approx([0, 80, 160, 240], abs=4)
    assert picture.times == (0.0, 2.5, 5.0, 7.5) and picture.duration == 10.0
    assert picture.ratio == pytest.approx(400 / 220, abs=1e-3)


def test_a_clip_is_read_and_kept_once(tmp_path):
    """However many records and groups show it."""
    reader, item = Reader(), record("a")
    rows = [
        {"step": step, "task": item.task, "id": name, "completion": "c", "rewards": {"r": 1.0}}
        for step in range(3)
        for name in ("a", "b")
    ]
    same = {name: replace(item, id=name) for name in ("a", "b")}
    path = write_rollouts_html([RunData("", rows, same)], tmp_path / "p.html", reader=reader)
    data = data_of(path)
    assert reader.read_paths == ["a.mp4"] and len(data["clips"]) == 1
    assert [group["clip"] for group in data["groups"]] == [0] * 6


def drawn(folder, item, prediction, **fields):
    """The one group of a page with one prediction."""
    path = folder / "p.html"
    asked = [line(item, prediction=prediction, **fields)]
    write_predictions_html(asked, {item.id: item}, path, think=False, reader=Reader())
    data = data_of(path)
    return data, data["groups"][0]


def test_spans_are_the_answers_and_the_predictions(tmp_path):
    asked = record("g", "grounded_qa", {"answer": "A", "glue": [[2.0, 4.5]]}, options=("x", "y"))
    prediction = GroundedAnswer("A", ((1.0, 2.0), (9.0, 99.0)))
    passes = [{"spans": []}, {"spans": [[0.0, 5.0]]}]
    _, group = drawn(tmp_path, asked, prediction, passes=passes)
    assert group["annotated"] == [[2.0, 4.5]] and group["duration"] == 10.0
    assert group["rows"][0]["spans"] == [[1.0, 2.0], [9.0, 99.0]]
    assert group["aims"] == [{"label": "pass 2 aims", "spans": [[0.0, 5.0]]}]
    _, group = drawn(tmp_path, asked, None)
    assert group["rows"][0]["spans"] == [] and group["aims"] == []


def test_boxes_are_of_their_frames(tmp_path):
    asked = record("k", "tracking", TRACK)
    moved = [[*box] for box in [*TRACK[1:], [-1.0, 0.0, 2.0, 0.5]]]
    _, group = drawn(tmp_path, asked, moved)
    assert group["boxes"] == TRACK and group["rows"][0]["boxes"] == moved
    _, group = drawn(tmp_path, asked, None)
    assert group["boxes"] == TRACK and group["rows"][0]["boxes"] is None


def test_an_image_has_a_box_and_no_time():
    asked = Record("i", "spatial_grounding", None, {"question": "?"}, BOX, image="i.png")

    class Images:
        def read(self, requests):
            for request in requests:
                assert request.is_image and request.path == "i.png"
                yield Clip(FRAMES[:1], np.zeros(1), None, None, request.path)

    (picture,) = pictures_of([asked], Images()).values()
    assert len(picture.frames) == 1 and picture.duration is None
    assert boxes_at(asked.answer, picture.times) == [BOX]


def test_frames_that_cannot_be_read_are_reported_and_spans_stay(tmp_path):
    lost = record("lost", metadata={"duration": 10.0})
    data, group = drawn(tmp_path, lost, [0.0, 5.0])
    assert group["clip"] is None and data["clips"] == []
    assert group["note"] == "no frames: lost.mp4: no <such> file"
    assert group["duration"] == 10.0 and group["rows"][0]["spans"] == [[0.0, 5.0]]


def test_pictures_stop_where_they_take_too_many_bytes():
    items = [record(f"r{i}") for i in range(9)]
    one = sum(map(len, pictures_of(items[:1], Reader())[clip_key(items[0])].frames))
    assert len(pictures_of(items, Reader(), max_bytes=3 * one)) == 3


def line(item, **fields):
    row = {"task": item.task, "id": item.id, "answer": item.answer, "completion": "<b>c</b>"}
    return {**row, "prediction": [0.0, 5.0], "metrics": {"mIoU": 0.5}, **fields}


def test_a_page_of_predictions_is_bounded_in_records_and_bytes(tmp_path):
    items = [record(f"r{i}") for i in range(30)]
    lines = [line(item) for item in items]
    records = {item.id: item for item in items}
    reader = Reader()
    path = tmp_path / "p.html"
    write_predictions_html(lines, records, path, think=False, max_examples=10, reader=reader)
    text, data = path.read_text(), data_of(path)
    assert len(data["groups"]) == len(data["clips"]) == 10
    assert "10 of 30 answers" in text and reader.read_paths[-1] == "r29.mp4"
    assert "<b>c" not in text and data["groups"][0]["rows"][0]["text"] == "<b>c</b>"
    assert {group["step"] for group in data["groups"]} == {None} and "img-src data:" in text
    one = len(json.dumps(data["clips"][0]))
    write_predictions_html(lines, records, path, think=None, reader=Reader(), max_bytes=3 * one)
    data = data_of(path)
    assert len(data["groups"]) == 30 and 2 <= len(data["clips"]) <= 4


def test_rollouts_are_drawn_best_first_for_records_that_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr("vcr1_fast.report.pictures.ClipReader", lambda workers: Reader())
    said = ["<answer>0.0 to 1.0</answer>", "<answer>2.0 to 4.5</answer>", "?"]
    rows = [
        {
            "step": 1,
            "task": "temporal_grounding",
            "id": name,
            "completion": text,
            "rewards": {"iou": reward},
        }
        for name in ("a", "other")
        for text, reward in zip(said, (0.0, 1.0, -1.0), strict=True)
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "r.html"
    write_rollouts_html(path, out, records={"a": replace(record("a"), id="a")})
    first, second = data_of(out)["groups"]
    assert [row["text"] for row in first["rows"]] == [said[1], said[0], said[2]]
    assert [row["spans"] for row in first["rows"]] == [[[2.0, 4.5]], [[0.0, 1.0]], []]
    assert (first["clip"], second["clip"]) == (0, None)


def test_half_of_the_pictures_are_of_the_worst_groups(tmp_path):
    items = {f"r{i:02}": record(f"r{i:02}") for i in range(40)}
    rows = [
        {
            "step": 1,
            "task": item.task,
            "id": name,
            "completion": "c",
            "rewards": {"r": (i + 1) % 10},
        }
        for i, (name, item) in enumerate(items.items())
    ]
    run = RunData("", rows, items)
    path = write_rollouts_html([run], tmp_path / "p.html", reader=Reader(), pictured=8)
    shown = {group["id"] for group in data_of(path)["groups"] if group["clip"] is not None}
    # The last one of even distances is among the worst: another one takes its place.
    assert {"r09", "r19", "r29", "r39"} <= shown and len(shown) == 8 and "r38" in shown


def test_a_page_shows_what_was_asked(tmp_path, monkeypatch):
    """In the words of the prompts file that was there at the start, with reasoning; of completions
    made elsewhere, for which no prompt is known, the record's texts."""
    monkeypatch.setattr(command, "ClipReader", lambda **_: contextlib.nullcontext(Reader()))
    data, said, prompts = (tmp_path / name for name in ("r.jsonl", "said.jsonl", "prompts.json"))
    write_records(data, [record("q")])
    said.write_text(json.dumps({"id": "q", "completion": "<answer>0.0 to 5.0</answer>"}) + "\n")
    template = "Muse in <think></think>: when, in <answer></answer>, does {event}?"
    prompts.write_text(json.dumps({"temporal_grounding": {"think": template}}))

    def answer_and_lose_prompts(model, records, output, config):
        prompts.unlink()
        return evaluate_predictions(said, records, output)

    monkeypatch.setattr(command, "evaluate_checkpoint", answer_and_lose_prompts)
    settings = EvalConfig(prompts=str(prompts), think=True)
    out = tmp_path / "model"
    run = EvalRun(records=str(data), output=str(out), model="m", eval=settings)
    assert command.main_eval(run) == 0
    page = data_of(out / "predictions.html")["groups"][0]["prompt"]
    assert "Muse in <think></think>: when, in <answer></answer>, does it moves?" in page
    assert TASKS["temporal_grounding"].prompt_template.think != template

    out = tmp_path / "given"
    run = EvalRun(records=str(data), output=str(out), predictions=str(said), eval=settings)
    assert command.main_eval(run) == 0
    page = data_of(out / "predictions.html")["groups"][0]["prompt"]
    assert "it moves\n" in page and "<think>" not in page
