"""The record schema: every fault names the file, the line and the field."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record, RecordError, load_records, write_records

BOXES = [[0.1 + 0.05 * i, 0.2, 0.3 + 0.05 * i, 0.5] for i in range(8)]


def row(**changes):
    base = {
        "id": "a",
        "video": "clips/a.mp4",
        "task": "temporal_grounding",
        "prompt": {"event": "the door opens"},
        "answer": [1.5, 4],
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


def choice(**changes):
    base = {"task": "multiple_choice", "prompt": {"question": "Which?"}, "answer": "B"}
    return row(**(base | {"options": ["red circle", "blue square"]} | changes))


def grounded(answer, **changes):
    return choice(**({"task": "grounded_qa", "answer": answer} | changes))


def tracking(boxes, **changes):
    return row(**({"task": "tracking", "prompt": {"object": "the dog"}, "answer": boxes} | changes))


def write(path: Path, *rows) -> Path:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_five_fields_are_enough(tmp_path):
    (record,) = load_records(write(tmp_path / "data.jsonl", row()))
    assert record == Record(
        id="a",
        task="temporal_grounding",
        video=str(tmp_path / "clips/a.mp4"),
        prompt={"event": "the door opens"},
        answer=[1.5, 4],
    )


def test_every_task_and_field_loads(tmp_path):
    glue = [[0, 1.5], [3, 3]]
    rows = [
        row(start=2, end=9.5, metadata={"k": [1, None]}, boxes=[[0, 0, 1, 1]]),
        choice(id="b"),
        grounded({"answer": "A", "glue": glue}, id="c"),
        tracking(BOXES, id="d"),
        choice(id="e", video=..., image="stills/e.jpg"),
    ]
    path = write(tmp_path / "data.jsonl", rows[0], "", *rows[1:])
    first, second, third, fourth, still = load_records(path, media_root="/media")
    assert (still.video, still.image) == (None, "/media/stills/e.jpg")
    assert (still.media, first.media) == (still.image, first.video)
    assert (first.start, first.end, first.boxes) == (2.0, 9.5, ((0, 0, 1, 1),))
    assert first.video == "/media/clips/a.mp4" and first.metadata == {"k": [1, None]}
    assert second.options == ("red circle", "blue square")
    assert third.answer == {"answer": "A", "glue": glue}
    assert fourth.answer == BOXES
    kept = load_records(path, tasks=["tracking", "multiple_choice"])
    assert [record.id for record in kept] == ["b", "d", "e"]
    with pytest.raises(ValueError, match="unknown task 'trakcing'"):
        load_records(path, tasks=["trakcing"])


def test_media_outside_the_root_are_quarantined_on_request(tmp_path):
    """A path that climbs, an absolute one, a link to a file, and a link in a folder of frames."""
    root, outside = tmp_path / "media", tmp_path / "elsewhere.mp4"
    (root / "frames").mkdir(parents=True)
    (root / "linked").mkdir()
    for path in (outside, root / "in.mp4", root / "frames" / "0.png"):
        path.write_bytes(b"")
    (root / "link.mp4").symlink_to(outside)
    (root / "linked" / "0.png").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)
    videos = {
        "in": "in.mp4",
        "same": str(tmp_path / "alias" / "in.mp4"),
        "folder": "frames",
        "absent": "absent.mp4",
        "up": "../elsewhere.mp4",
        "down and up": "frames/../../elsewhere.mp4",
        "absolute": str(outside),
        "link": "link.mp4",
        "folder with a link": "linked",
    }
    rows = [row(id=name, video=path) for name, path in videos.items()]
    path = write(tmp_path / "data.jsonl", *rows)
    assert len(load_records(path, media_root=root)) == len(rows)
    bad = Quarantine()
    kept = load_records(
        path, media_root=root, inside_root=True, on_error="quarantine", quarantine=bad
    )
    assert [record.id for record in kept] == ["in", "same", "folder", "absent"]
    assert [item.record_id for item in bad.items] == list(videos)[4:]
    assert all(f"outside the media root {root}" in item.reason for item in bad.items)
    with pytest.raises(RecordError, match=r"data\.jsonl:5: field 'video': .*elsewhere\.mp4"):
        load_records(path, media_root=root, inside_root=True)


def test_written_paths_name_the_same_file_behind_a_symbolic_link(tmp_path):
    """`link/../x` is beside what the link points to, not beside the link."""
    (tmp_path / "disk" / "videos").mkdir(parents=True)
    (tmp_path / "disk" / "x.mp4").write_bytes(b"right")
    (tmp_path / "x.mp4").write_bytes(b"wrong")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "videos")
    rows = write(tmp_path / "rows.jsonl", row(video="link/../x.mp4"))
    write_records(tmp_path / "again.jsonl", load_records(rows))
    (record,) = load_records(tmp_path / "again.jsonl")
    assert Path(record.media).read_bytes() == b"right"


BAD_ROWS = {
    "blank id": (row(id=" "), "id", "' '"),
    "no video": (row(video=...), "video", "either a video or an image"),
    "video and image": (choice(image="a.jpg"), "video", "either a video or an image"),
    "number as image": (choice(video=..., image=3), "image", "int 3"),
    "image with a time": (choice(video=..., image="a.jpg", end=3), "end", "no time"),
    "image of an event": (row(video=..., image="a.jpg"), "image", "needs a video"),
    "image of a track": (tracking(BOXES, video=..., image="a.jpg"), "image", "needs a video"),
    "no task": (row(task=...), "task", "missing"),
    "no prompt": (row(prompt=...), "prompt", "missing"),
    "no answer": (row(answer=...), "answer", "missing"),
    "extra field": (row(anwser=3), "anwser", "unknown"),
    "fraction as id": (row(id=7.5), "id", "float 7.5"),
    "truth as id": (row(id=True), "id", "bool True"),
    "empty video": (row(video=" "), "video", "' '"),
    "list as prompt": (row(prompt=["x"]), "prompt", "list"),
    "number in prompt": (row(prompt={"event": 3}), "prompt", "object of texts"),
    "wrong prompt field": (row(prompt={"question": "x"}), "prompt.event", "missing"),
    "text as options": (choice(options="AB"), "options", "str 'AB'"),
    "text as metadata": (row(metadata="x"), "metadata", "str 'x'"),
    "text as start": (row(start="2"), "start", "str '2'"),
    "truth as start": (row(start=True), "start", "bool True"),
    "negative start": (row(start=-1), "start", "-1"),
    "start after end": (row(start=5, end=3), "start", "5 is not before end 3"),
    "start equals end": (row(start=5, end=5), "start", "5 is not before end 5"),
    "unknown task": (row(task="captioning"), "task", "unknown task 'captioning'"),
    "answer start after end": (row(answer=[9, 2]), "answer", "start 9 is not before end 2"),
    "answer without length": (row(answer=[2, 2]), "answer", "not before"),
    "answer of three": (row(answer=[1, 2, 3]), "answer", "[1, 2, 3]"),
    "answer of texts": (row(answer=["1", "2"]), "answer", "seconds"),
    "huge answer": (row(answer=[1, 10**400]), "answer", "seconds"),
    "negative answer": (row(answer=[-1, 2]), "answer", "-1 is negative"),
    "letter behind the options": (choice(answer="C"), "answer", "A to B"),
    "small letter": (choice(answer="b"), "answer", "A to B"),
    "two letters": (choice(answer="AB"), "answer", "A to B"),
    "one option": (choice(answer="A", options=["x"]), "options", "got 1"),
    "grounded without spans": (grounded({"answer": "A"}), "answer", "glue"),
    "grounded with none": (grounded({"answer": "A", "glue": []}), "answer.glue", "spans"),
    "grounded letter": (grounded({"answer": "Z", "glue": [[0, 1]]}), "answer.answer", "'Z'"),
    "grounded span": (
        grounded({"answer": "A", "glue": [[0, 1], [4, 3]]}),
        "answer.glue[1]",
        "4 is not before end 3",
    ),
    "one box": (tracking(BOXES[:1]), "answer", "at least 2"),
    "box of three": (tracking([*BOXES[:7], [0, 0, 1]]), "answer[7]", "[0, 0, 1]"),
    "box inside out": (tracking([[0.5, 0, 0.2, 1], *BOXES]), "answer[0]", "x0 < x1"),
    "box in pixels": (tracking([*BOXES[:3], [10, 10, 50, 50]]), "answer[3]", "<= 1"),
    "times of texts": (tracking(BOXES, metadata={"times": ["a"] * 8}), "metadata.times", "a box"),
    "too few times": (tracking(BOXES, metadata={"times": [0, 1]}), "metadata.times", "[0, 1]"),
    "text as duration": (row(metadata={"duration": "x"}), "metadata.duration", "str 'x'"),
    "given box": (row(boxes=[[0, 0, 2, 1]]), "boxes[0]", "x0 < x1"),
    "a list": ([1, 2], "", "expected an object"),
    "no JSON": ("{'id': 1}", "", "not JSON"),
    "NaN": ('{"id": NaN}', "", "NaN is not a number"),
    "deep nesting": ("[" * 100_000, "", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_faults_name_file_line_and_field(tmp_path, name):
    bad, field, reason = BAD_ROWS[name]
    path = write(tmp_path / "data.jsonl", row(id="fine"), "", bad)
    with pytest.raises(RecordError) as caught:
        load_records(path)
    error = caught.value
    assert (error.path, error.line, error.field) == (str(path), 3, field)
    assert reason in error.reason
    assert str(error).startswith(f"{path}:3: ") and field in str(error)


def test_known_tasks_are_listed(tmp_path):
    path = write(tmp_path / "data.jsonl", row(task="captioning", answer=3))
    with pytest.raises(RecordError, match=r"grounded_qa, .*multiple_choice, numeric, "):
        load_records(path)


def test_equal_ids_are_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", row(), row(id="b"), row())
    with pytest.raises(RecordError, match=r":3: field 'id': 'a' is already on line 1"):
        load_records(path)


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(RecordError, match=r"data.jsonl:2: not JSON: .*utf-8"):
        load_records(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode())  # as Windows editors begin
    assert len(load_records(path)) == 1


def test_quarantine_holds_exactly_the_bad_rows(tmp_path):
    rows, good, bad = [], [], []
    for index, (name, (content, _, _)) in enumerate(BAD_ROWS.items()):
        rows += [row(id=f"good {index}"), content]
        good.append(f"good {index}")
        bad.append((2 * index + 2, name))
    path = write(tmp_path / "data.jsonl", *rows)
    listing = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    kept = load_records(path, on_error="quarantine", quarantine=listing)
    assert [record.id for record in kept] == good
    assert [item.source for item in listing.items] == [f"{path}:{line}" for line, _ in bad]
    assert len(listing) == len(BAD_ROWS)
    for item, (_, name) in zip(listing.items, bad, strict=True):
        content, field, reason = BAD_ROWS[name]
        assert field in item.reason and reason in item.reason
        if isinstance(content, dict) and isinstance(content.get("id"), str):
            assert item.record_id == content["id"]
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [item.source for item in listing.items]


def test_quarantine_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a", "data.jsonl:1", "cut\u2028off")
    with path.open("ab") as file:
        file.write(b'{"record_id": "half')
    listing = Quarantine(path)
    listing.add("a", "data.jsonl:1", "cut\u2028off")
    listing.add("b", "b.mp4", "no such file")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(r["record_id"], r["reason"]) for r in rows] == [
        ("a", "cut\u2028off"),
        ("b", "no such file"),
    ]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"quarantine.jsonl:1: not a quarantine line"):
        Quarantine(path)


def test_quarantine_arguments_go_together(tmp_path):
    path = write(tmp_path / "data.jsonl", row())
    with pytest.raises(ValueError, match="together"):
        load_records(path, on_error="quarantine")
    with pytest.raises(ValueError, match="together"):
        load_records(path, quarantine=Quarantine())
    with pytest.raises(ValueError, match="'skip'"):
        load_records(path, on_error="skip")
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "none.jsonl")


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
seconds = st.floats(0, 1e6)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(texts, texts, st.lists(texts, min_size=2, max_size=26), st.none() | seconds),
        unique_by=lambda item: item[0],
    )
)
def test_written_records_load_equal(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("written")
    records = [
        Record(
            id=name,
            task="multiple_choice",
            video=str(folder / "clips" / "x.mp4"),
            prompt={"question": question},
            answer="B",
            options=tuple(options),
            start=start,
            metadata={"note": question},
        )
        for name, question, options, start in items
    ]
    write_records(folder / "data.jsonl", records)
    assert load_records(folder / "data.jsonl") == records


def test_written_folders_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = Record("a", "temporal_grounding", "set/v/a.mp4", {"event": "x"}, [0, 1])
    outside = Record("b", "temporal_grounding", "/elsewhere/b.mp4", {"event": "x"}, [0, 1])
    still = Record("c", "ocr", None, {"question": "x"}, "text", image="set/i/c.png")
    write_records("set/data.jsonl", [inside, outside, still])
    os.rename("set", "moved")
    records = load_records("moved/data.jsonl")
    assert [record.media for record in records] == [
        "moved/v/a.mp4",
        "/elsewhere/b.mp4",
        "moved/i/c.png",
    ]
    assert [record.image is None for record in records] == [True, True, False]


def test_bad_records_are_not_written(tmp_path):
    path = tmp_path / "data.jsonl"
    bad = Record("b", "temporal_grounding", "b.mp4", {"event": "x"}, [3, 1])
    with pytest.raises(ValueError, match=r"record 'b': field 'answer': start 3"):
        write_records(path, [bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": {"event": "half \ud83d an emoji"}}, "prompt"),
        ({"id": "\udc80"}, "id"),
        ({"video": "\ud800.mp4"}, "video"),
        ({"metadata": {"deep": [[{"\udfff": 1}]]}}, "metadata"),
        ({"\ud800": 1}, ".*ud800"),
    ],
)
def test_half_a_character_is_refused_and_can_be_listed(tmp_path, changes, field):
    whole = {"id": "b", "prompt": {"event": "a whole \U0001f600 and \u00e9"}}
    path = write(tmp_path / "data.jsonl", row(**changes), row(**whole))
    with pytest.raises(
        RecordError, match=rf"data\.jsonl:1: field '{field}': holds half a character"
    ):
        load_records(path)
    listed = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(listed)
    (kept,) = load_records(path, on_error="quarantine", quarantine=quarantine)
    assert kept.prompt == whole["prompt"]
    assert listed.read_bytes().decode()  # it is UTF-8
    assert Quarantine(listed).items == quarantine.items
    with pytest.raises(ValueError, match="half a character"):
        write_records(tmp_path / "out.jsonl", [Record(**{**vars(kept), "id": "\ud800"})])
    assert not (tmp_path / "out.jsonl").exists()
