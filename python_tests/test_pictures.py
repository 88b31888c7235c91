"""Frames, boxes and bars of the viewer, read back from its HTML and compared with the record's."""

import base64
import contextlib
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.data.video import Clip, VideoError
from vcr1_fast.evaluate import command
from vcr1_fast.evaluate.config import EvalConfig, EvalRun
from vcr1_fast.evaluate.run import evaluate_predictions
from vcr1_fast.report.pictures import COLOURS, HEIGHT, Pictures, boxes_at, spans_of
from vcr1_fast.report.rollouts import write_predictions_html, write_rollouts_html
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


def test_a_folder_of_images_is_shown_at_its_records_rate():
    reader = Reader()
    for item in (record("a", metadata={"fps": 3.0}), record("b")):
        Pictures([item], reader).next(item, {})
    assert reader.rates == [3.0, None]


def test_thumbnails_are_the_frames_made_small():
    text = Pictures([record("a")], Reader()).next(record("a"), {})
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    shown = [np.asarray(image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
    assert [frame.shape for frame in shown] == [(HEIGHT, 200, 3)] * 4
    reds = [frame[..., 0].mean() for frame in shown]
    assert reds == pytest.approx([0, 80, 160, 240], abs=4)
    assert re.findall(r"</div>([\d.]+) s</figure>", text) == ["0.0", "2.5", "5.0", "7.5"]


def bars(text):
    """label -> (left, width, colour) of its spans, in per cent of the line."""
    lines = re.findall(r'<div class="bar">(.*?)<div>(.*?)</div></div>', text)
    place = re.compile(r"left:([\d.]+)%;width:([\d.]+)%;background:([#\w]+)")
    return {
        label: [(float(x), float(w), c) for x, w, c in place.findall(inner)]
        for label, inner in lines
    }


def test_bars_are_to_scale_and_end_with_the_clip():
    asked = record("g", "grounded_qa", {"answer": "A", "glue": [[2.0, 4.5]]})
    predictions = {"1": GroundedAnswer("A", ((1.0, 2.0), (9.0, 99.0))), "2": None}
    drawn = bars(Pictures([asked], Reader()).next(asked, predictions, {"look 2": [(0.0, 5.0)]}))
    assert drawn == {
        "annotated": [(20.0, 25.0, "currentColor")],
        "1": [(10.0, 10.0, COLOURS[0]), (90.0, 10.0, COLOURS[0])],
        "2": [],
        "look 2": [(0.0, 50.0, COLOURS[2])],
    }


def test_boxes_lie_where_they_are_said_to():
    asked = record("k", "tracking", TRACK)
    moved = tuple(tuple(box) for box in [*TRACK[1:], [-1.0, 0.0, 2.0, 0.5]])
    text = Pictures([asked], Reader()).next(asked, {"predicted": moved})
    frames = re.findall(r"<svg[^>]*>(.*?)</svg>", text)
    place = re.compile(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)" stroke="(\S+)"')
    drawn = [[(*map(float, m[:4]), m[4]) for m in place.findall(frame)] for frame in frames]
    assert drawn[0] == [(0.0, 0.0, 0.5, 0.5, "#ffffff"), (0.25, 0.5, 0.5, 0.5, COLOURS[0])]
    assert drawn[3] == [(0.25, 0.5, 0.5, 0.5, "#ffffff"), (0.0, 0.0, 1.0, 0.5, COLOURS[0])]
    missing = Pictures([asked], Reader()).next(asked, {"predicted": None})
    assert "predicted (no boxes)" in missing and missing.count("<rect") == 8


def test_an_image_has_a_box_and_no_time():
    asked = Record("i", "spatial_grounding", None, {"question": "?"}, BOX, image="i.png")

    class Images:
        def read(self, requests):
            for request in requests:
                assert request.is_image and request.path == "i.png"
                yield Clip(FRAMES[:1], np.zeros(1), None, None, request.path)

    text = Pictures([asked], Images()).next(asked, {"predicted": tuple(BOX)})
    assert text.count("<img") == 1 and text.count('stroke="') == 2
    assert "0.0 s" not in text and bars(text) == {}


def test_frames_that_cannot_be_read_are_reported_and_bars_stay():
    lost = record("lost", metadata={"duration": 10.0})
    text = Pictures([lost], Reader()).next(lost, {"1": (0.0, 5.0)})
    assert "no &lt;such&gt; file" in text and "<img" not in text
    assert bars(text)["1"] == [(0.0, 50.0, COLOURS[0])]


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
    text = path.read_text()
    assert text.count("<section") == 10 and text.count("<img") == 40
    assert "10 of 30 answers" in text and reader.read_paths[-1] == "r29.mp4"
    assert "<b>c" not in text and "&lt;b&gt;c" in text
    assert 'name="from"' not in text and "img-src data:" in text
    one = len(text) // 10
    write_predictions_html(lines, records, path, think=None, reader=Reader(), max_bytes=3 * one)
    assert path.read_text().count("<section") == 30
    assert 8 <= path.read_text().count("<img") <= 20


def test_a_page_shows_where_each_look_was_aimed(tmp_path):
    looks = [{"spans": []}, {"spans": [[2.0, 5.0]]}]
    item = record("q")
    path = tmp_path / "p.html"
    lines = [line(item, passes=looks)]
    write_predictions_html(lines, {"q": item}, path, think=False, reader=Reader())
    assert bars(path.read_text())["pass 2 aims"] == [(20.0, 30.0, COLOURS[1])]


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
    first, second = out.read_text().split("<section")[1:]
    drawn = bars(first)
    assert drawn["1"] == [(20.0, 25.0, COLOURS[0])] and drawn["3"] == []
    assert drawn["2"] == [(0.0, 10.0, COLOURS[1])]
    assert first.index("2.0 to 4.5") < first.index("0.0 to 1.0") < first.index("?</pre>")
    assert "<img" not in second


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
    page = html.unescape((out / "predictions.html").read_text())
    assert "Muse in <think></think>: when, in <answer></answer>, does it moves?" in page
    assert TASKS["temporal_grounding"].prompt_template.think != template

    out = tmp_path / "given"
    run = EvalRun(records=str(data), output=str(out), predictions=str(said), eval=settings)
    assert command.main_eval(run) == 0
    page = html.unescape((out / "predictions.html").read_text())
    assert "it moves\n" in page and "<think>" not in page
