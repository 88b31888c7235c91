"""Records chosen and ordered by how hard they are, with scores made by hand."""

import json

import pytest
from tiny_run import configure, write_inputs

from vcr1_fast.config.loader import build
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.train.config import DataConfig
from vcr1_fast.train.dataset import Sampler
from vcr1_fast.train.difficulty import read_scores, select
from vcr1_fast.train.loop import train

RECORDS = [Record(name, "numeric", f"{name}.mp4", {"question": "?"}, 1) for name in "abcdefg"]
SCORES = {"a": 0.0, "b": 0.25, "c": 0.5, "d": 0.75, "e": 1.0, "f": 0.5, "other": 0.5}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.jsonl"
    write(path, SCORES)
    return path


def write(path, scores):
    lines = [json.dumps({"id": name, "score": score}) for name, score in scores.items()]
    path.write_text("\n".join(lines) + "\n")


def settings(file, **fields):
    return DataConfig(train="train.jsonl", difficulty=str(file), **fields)


def ids(chosen, first=0, count=None):
    places = chosen.sampler.places(first, count or len(chosen.records))
    return [chosen.records[place].id for place in places]


def test_records_strictly_inside_the_range_are_trained_on_and_the_others_counted(file):
    chosen = select(RECORDS, settings(file, difficulty_range=(0.0, 1.0)), seed=0)
    assert [record.id for record in chosen.records] == ["b", "c", "d", "f"]
    assert [note.removeprefix(f"{file}: ") for note in chosen.notes] == [
        "1 records have no score and are left out",
        "1 scores are of ids that no record has",
        "2 records lie outside (0.0, 1.0) and are left out",
        "training on 4 of 7 records",
    ]
    assert sorted(ids(chosen)) == ["b", "c", "d", "f"]
    with pytest.raises(ValueError, match=r"6 records lie outside \(2\.0, 3\.0\)"):
        select(RECORDS, settings(file, difficulty_range=(2.0, 3.0)), seed=0)


def test_without_scores_nothing_changes():
    chosen = select(RECORDS, DataConfig(train="train.jsonl"), seed=3)
    assert (chosen.records, chosen.sampler, chosen.notes) == (RECORDS, Sampler(7, 3), [])


def test_easy_records_come_first_in_every_epoch(file):
    chosen = select(RECORDS, settings(file, order="easy_first", order_window=1), seed=0)
    epochs = [ids(chosen, 6 * epoch, 6) for epoch in range(20)]
    assert {tuple(names[:2]) for names in epochs} == {("e", "d")}
    assert {tuple(names[2:4]) for names in epochs} == {("c", "f"), ("f", "c")}  # equal scores
    assert {tuple(names[4:]) for names in epochs} == {("b", "a")}


def test_a_record_stays_within_the_window_and_the_order_depends_on_the_place_alone():
    scores = tuple(float(-i) for i in range(100))  # sorted, record i comes at place i
    sampler = Sampler(100, 7, scores, window=10)
    epochs = [list(sampler.places(100 * epoch, 100)) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(100)) != order
        assert max(abs(place - record) for place, record in enumerate(order)) < 10
    assert epochs[0] != epochs[1] != epochs[2]
    whole = [record for order in epochs for record in order]
    assert list(Sampler(100, 7, scores, window=10).places(130, 90)) == whole[130:220]
    halves = [list(sampler.places(130, 90, rank, 2)) for rank in range(2)]
    assert halves == [whole[130:220:2], whole[131:220:2]]
    assert list(Sampler(100, 8, scores, window=10).places(0, 100)) != epochs[0]


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ('{"id": "a", "score": NaN}', ":2: expected"),
        ('{"id": "a", "score": 1' + "0" * 400 + "}", ":2: expected"),
        ('{"id": "a", "score": true}', ":2: expected"),
        ('{"id": 1, "score": 0.5}', ":2: expected"),
        ('{"id": "a"}', ":2: expected"),
        ("[]", ":2: expected"),
        ("{", ":2: not JSON"),
        ('{"id": "z", "score": 0.25}', ":2: a second score of 'z'"),
    ],
)
def test_what_is_no_score_is_named(tmp_path, line, reported):
    path = tmp_path / "s.jsonl"
    path.write_text('{"id": "z", "score": 1, "task": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=reported):
        read_scores(path)


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        ({"order": "easy_first"}, "difficulty: goes with"),
        ({"difficulty_range": [0, 1]}, "difficulty: goes with"),
        ({"difficulty": "s"}, "difficulty: goes with"),
        ({"difficulty": "s", "difficulty_range": [1, 0]}, "difficulty_range: must rise"),
        ({"difficulty": "s", "order": "easy_first", "order_window": 0}, "order_window: must be"),
        ({"difficulty": "s", "order": "hard_first"}, "order: "),
    ],
)
def test_settings_that_do_not_go_together(fields, reported):
    with pytest.raises(ValueError, match=reported):
        build(DataConfig, {"train": "t", **fields})


def test_a_resumed_run_goes_on_in_the_same_order_and_with_the_same_scores(tmp_path, capsys):
    model, data = write_inputs(tmp_path)
    names = [record.id for record in load_records(data)]
    file = tmp_path / "scores.jsonl"
    write(file, {name: i / len(names) for i, name in enumerate(names)})
    options = [f"data.difficulty={file}", "data.difficulty_range=[0, 1]", "data.order=easy_first"]
    options += ["optim.schedule=constant", "data.order_window=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure(model, data, whole, *options))
    assert f"training on {len(names) - 1} of {len(names)} records" in capsys.readouterr().err
    train(configure(model, data, parts, *options, "optim.steps=1"))
    train(configure(model, data, parts, *options))
    shown = [
        [json.loads(line)["id"] for line in (path / "rollouts.jsonl").read_text().splitlines()]
        for path in (whole, parts)
    ]
    assert shown[0] == shown[1] and names[0] not in shown[0]
    write(file, {name: -i - 1 for i, name in enumerate(names)})
    options[1] = f"data.difficulty_range=[-{len(names)}, 0]"
    with pytest.raises(ValueError, match=r"another data\.difficulty or data\.order"):
        train(configure(model, data, parts, *options, "optim.steps=3"))
