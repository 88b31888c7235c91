"""Records from JSON Lines, JSON, CSV and Parquet, with the columns that people have."""

import csv
import json
import sys

import pytest

from vcr1_fast import cli
from vcr1_fast.data.convert import convert
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import RecordError, load_records
from vcr1_fast.data.tables import decoded_value
from vcr1_fast.evaluate.identity import records_digest

ROWS = [
    {
        "id": "g",
        "video": "a.mp4",
        "task": "temporal_grounding",
        "prompt": {"event": "the door opens"},
        "answer": [1.5, 4],
        "start": 1.5,
        "metadata": {"duration": 9.5},
    },
    {
        "id": "m",
        "video": "a.mp4",
        "task": "multiple_choice",
        "prompt": {"question": "Which, of two?"},
        "answer": "B",
        "options": ['a "red" bike', "a car"],
    },
    {
        "id": "n",
        "image": "b.png",
        "task": "numeric",
        "prompt": {"question": "How many?"},
        "answer": 12,
    },
    {
        "id": "o",
        "image": "b.png",
        "task": "ocr",
        "prompt": {"question": "What does it read?"},
        "answer": "12",
    },
    {
        "id": "b",
        "image": "b.png",
        "task": "boolean",
        "prompt": {"question": "Is it?"},
        "answer": True,
    },
]


def write_csv(path, rows, delimiter=","):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def flat(row):
    """A row as a spreadsheet has it."""
    out = {}
    for name, value in row.items():
        if name in ("prompt", "metadata"):
            out |= {f"{name}.{inner}": text for inner, text in value.items()}
        else:
            out[name] = value if isinstance(value, str) else json.dumps(value)
    return out


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def expected(tmp_path):
    return load_records(write_jsonl(tmp_path / "data.jsonl", ROWS))


def test_every_format_holds_the_same_records(tmp_path, expected):
    assert [record.answer for record in expected] == [[1.5, 4], "B", 12, "12", True]
    path = tmp_path / "data.json"
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "\ufeff" + json.dumps(ROWS)):
        path.write_text(text, encoding="utf-8")
        assert load_records(path) == expected
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # JSON Lines so named
    assert load_records(path) == expected
    rows = [flat(row) for row in ROWS]
    assert load_records(write_csv(tmp_path / "data.csv", rows)) == expected
    assert load_records(write_csv(tmp_path / "data.tsv", rows, "\t")) == expected


def test_parquet_holds_the_same_records(tmp_path, expected):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    # A column has one type: answers of several are texts in Parquet, which is why one task a file
    # is usual.
    for row, record in zip(ROWS, expected, strict=True):
        write_table(pyarrow.Table.from_pylist([row, {**row, "id": "2"}]), tmp_path / "a.parquet")
        first, second = load_records(tmp_path / "a.parquet")
        assert (first, second.id) == (record, "2")
    (tmp_path / "a.parquet").write_text("id,video")
    with pytest.raises(ValueError, match=r"a\.parquet: not Parquet: "):
        load_records(tmp_path / "a.parquet")


def test_parquet_without_its_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="needs the package pyarrow"):
        load_records(tmp_path / "a.parquet")


def test_a_plain_csv_needs_no_settings(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "video,task,question,options,answer,source,duration\n"
        'a.mp4,multiple_choice,"What, exactly?",a bike|a car,a car,home,9.5\n'
        "b.mp4,multiple_choice,Which?,a bike | a car,A,,\n"
    )
    first, second = load_records(path)
    assert (first.id, second.id) == ("mine-2", "mine-3")  # the line of each
    assert first.prompt == {"question": "What, exactly?"}
    assert (first.options, first.answer) == (("a bike", "a car"), "B")
    assert first.metadata == {"source": "home", "duration": 9.5}
    assert (second.options, second.answer, second.metadata) == (("a bike", "a car"), "A", {})


def test_columns_are_renamed(tmp_path):
    rows = [{"clip": "a.mp4", "q": "the door opens", "span": "[1, 2]", "video": "wrong.mp4"}]
    path = write_csv(tmp_path / "a.csv", rows)
    columns = {"video": "clip", "prompt.event": "q", "answer": "span"}
    (record,) = load_records(path, columns=columns, tasks=["temporal_grounding"])
    assert record.video == str(tmp_path / "a.mp4") and record.answer == [1, 2]
    assert record.prompt == {"event": "the door opens"} and record.metadata == {}
    with pytest.raises(RecordError, match=r"'video': no column 'film' \(data\.columns\); there"):
        load_records(path, columns={"video": "film"})
    rows = [{"clip": "a.mp4", "q": "the door opens", "span": [1, 2]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_records(path, columns=columns, tasks=["temporal_grounding"])[0].answer == [1, 2]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optoins": ["a", "b"]}, "'optoins': unknown; did you mean options?"),
        ({"videos": "a.mp4"}, "'videos': unknown; did you mean video?"),
        ({"strat": 3}, "'strat': unknown; did you mean start?"),
        ({"task": ["numeric"]}, "'task': expected a text, got list"),
        ({"duration": "long"}, "'metadata.duration': expected seconds above 0"),
        ({"prompt.question": "Why?"}, "stands beside a prompt that is"),
    ],
)
def test_columns_that_would_be_misread_are_refused(tmp_path, changes, told):
    row = {**ROWS[1], "prompt": "Which?", **changes}
    with pytest.raises(RecordError) as caught:
        load_records(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert told in str(caught.value)


def test_what_a_row_may_leave_to_us(tmp_path):
    choice = {**ROWS[1]}
    rows = [
        {**choice, "id": 7},
        {name: value for name, value in choice.items() if name != "id"},
        {**choice, "id": "t", "prompt": "Which?"},
        {**choice, "id": "o", "answer": " A CAR "},
        {**choice, "id": "l", "options": ["B", "A"], "answer": "A"},  # a letter is a letter
        {**choice, "id": "x", "split": "train", "metadata": {"split": "kept"}},
        {
            **choice,
            "id": "g",
            "task": "grounded_qa",
            "answer": {"answer": "a car", "glue": [[0, 1]]},
        },
        {**choice, "id": "c", "task": "classification", "answer": "a car"},
    ]
    seven, made, text, option, letter, extra, grounded, label = load_records(
        write_jsonl(tmp_path / "a.jsonl", rows)
    )
    assert (seven.id, made.id) == ("7", "a-2")
    assert text.prompt == {"question": "Which?"}
    assert (option.answer, letter.answer) == ("B", "A")
    assert extra.metadata == {"split": "kept"}
    assert grounded.answer["answer"] == "B" and label.answer == "a car"
    with pytest.raises(RecordError, match="expected a letter A to B"):
        load_records(write_jsonl(tmp_path / "a.jsonl", [{**choice, "answer": "a"}]))
    two = {**choice, "options": ["a car", "A car"], "answer": "a car"}  # which of the two?
    with pytest.raises(RecordError, match="expected a letter A to B"):
        load_records(write_jsonl(tmp_path / "a.jsonl", [two]))


def test_an_object_of_the_caller_is_not_changed():
    from vcr1_fast.data.tables import complete

    metadata = {"a": 1}
    complete({"metadata": metadata, "source": "x"}, made_id="1")
    assert metadata == {"a": 1}


def test_bad_rows_of_a_csv_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "id,video,task,question,answer\n"
        "a,a.mp4,numeric,How many?,3\n"
        "b,a.mp4,numeric,How many?\n"
        "c,a.mp4,numeric,How many?,3,4\n"
        "d,a.mp4,numeric,How many?,many\n"
        '"e",a.mp4,numeric,"How\nmany?",5\n'
    )
    bad = Quarantine()
    records = load_records(path, on_error="quarantine", quarantine=bad)
    assert [(record.id, record.answer) for record in records] == [("a", 3), ("e", 5)]
    assert [(item.source, item.reason) for item in bad.items] == [
        (f"{path}:3", "4 cells, the header has 5"),
        (f"{path}:4", "6 cells, the header has 5"),
        (f"{path}:5", "field 'answer': expected a number, got str 'many'"),
    ]


WRONG = {
    "a.jsonl": [
        ("id,video,task\na,b,c\n", "not JSON Lines: looks like CSV (3 columns: id, video, task)"),
        ("id\tvideo\ttask\n", "looks like TSV (3 columns"),
        ('[{"id": 1}]', "looks like a JSON list; name it a.json"),
        ("[\n  {\n", "looks like a JSON list"),
        ("{\n", "looks like a JSON object over several lines"),
        ("PAR1\x15", "looks like Parquet; name it a.parquet"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "vcr1 data convert messages"),
        ('{"conversations": [{"from": "human"}]}', "vcr1 data convert sharegpt"),
        ('{"prompt": [{"role": "user", "content": "x"}]}', "vcr1 data convert trl"),
    ],
    "a.csv": [('[{"id": 1}]', "not CSV: looks like JSON"), ('a,b\n"x', "a.csv:2: not CSV: ")],
    "a.json": [
        ('{"data": [], "info": {}}', "got a dict with data, info; published annotations"),
        ("{'id': 1}", "not JSON: "),
        ("3", "expected a list of records, got a int"),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "told"), [(name, *one) for name, all_ in WRONG.items() for one in all_]
)
def test_a_wrong_format_is_said_once_with_a_guess(tmp_path, capsys, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    assert cli.main(["data", "check", str(path), "--no-media"]) == 2
    said = capsys.readouterr().err
    assert told in said and len(said.splitlines()) == 1 and str(path) in said


GOOD = '{"id": "a", "video": "a.mp4", "task": "numeric", "prompt": {"question": "?"}, "answer": 3}'


@pytest.mark.parametrize("damaged", [text for text, _ in WRONG["a.jsonl"]])
def test_a_row_that_looks_like_another_format_costs_no_other(tmp_path, damaged):
    path = tmp_path / "a.jsonl"
    for text in (f"{damaged}\n{GOOD}\n", f"{GOOD}\n{damaged}\n"):
        path.write_text(text)
        bad = Quarantine()
        records = load_records(path, on_error="quarantine", quarantine=bad)
        assert [record.id for record in records] == ["a"]
        rows = [line for line in damaged.splitlines() if line.strip()]
        first = 1 if text.startswith(damaged) else 2
        assert [item.source for item in bad.items] == [
            f"{path}:{first + i}" for i in range(len(rows))
        ]


@pytest.mark.parametrize(
    "text", ["[\n" + GOOD + ",\n" + GOOD.replace('"a"', '"b"') + "\n]", f"[\n{GOOD}\n]"]
)
def test_a_list_whose_last_line_is_an_object_is_a_list(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"looks like a JSON list; name it a\.json"):
        load_records(path, on_error="quarantine", quarantine=Quarantine())


def test_a_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"a folder, not a file of records$"):
        load_records(tmp_path)


SAVED = [
    {"id": f"r{i}", "video": "a.mp4", "task": "open_ended", "question": "Why?", "answer": f"{i}"}
    for i in range(3)
]


def test_a_folder_of_the_package_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(SAVED).save_to_disk(tmp_path / "saved")
    records = load_records(tmp_path / "saved")
    assert [record.answer for record in records] == ["0", "1", "2"]
    assert records[0].video == str(tmp_path / "a.mp4") and records[0].prompt == {"question": "Why?"}
    both = datasets.DatasetDict(test=datasets.Dataset.from_list(SAVED[:1]))
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="holds the splits test; name the folder of one"):
        load_records(tmp_path / "both")
    assert len(load_records(tmp_path / "both" / "test")) == 1
    # An evaluation of it has an identity, which its rows decide.
    other = datasets.Dataset.from_list([*SAVED[:2], {**SAVED[2], "answer": "x"}])
    other.save_to_disk(tmp_path / "other")
    assert records_digest(tmp_path / "saved") == records_digest(tmp_path / "saved")
    assert records_digest(tmp_path / "saved") != records_digest(tmp_path / "other")


def test_a_data_set_of_the_hub_is_read_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "some/one":
            return SAVED
        raise ConnectionError("the hub is not there\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records("hf:some/one:test", media_root=tmp_path)
    assert records[2].video == str(tmp_path / "a.mp4") and len(records) == 3
    assert len(load_records("hf:some/one")) == 3
    assert asked == [("some/one", "test"), ("some/one", "train")]
    with pytest.raises(
        ValueError, match=r"hf:no/one: cannot be loaded \(ConnectionError: the hub is not there\)$"
    ):
        load_records("hf:no/one")


def test_without_the_package_its_data_sets_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hf:some/one: reading it needs the package datasets"):
        load_records("hf:some/one")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("[1, 2]", [1, 2]), ("True", True), ("true", True), ("a bike", "a bike"),
     ("1,5", "1,5"), ("NULL", "NULL"), (4, 4)],
)  # fmt: skip
def test_values_of_texts(text, value):
    assert decoded_value(text) == value and type(decoded_value(text)) is type(value)


def test_check_takes_columns(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [{"clip": "a.mp4", "q": "Why?", "answer": "so"}])
    words = ["data", "check", str(path), "--no-media", "--task", "open_ended"]
    assert cli.main([*words, "--column", "video=clip", "--column", "question=q"]) == 0
    assert "1 records of 1 videos or images: open_ended 1" in capsys.readouterr().out
    assert cli.main([*words, "--column", "video"]) == 2
    assert "--column video: expected FIELD=COLUMN" in capsys.readouterr().err


# Conversations

MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>What opens?"},
        {"role": "assistant", "content": "<think>Hm.</think><answer>the door</answer>"},
    ],
    "videos": ["a.mp4"],
    "source": "home",
}
PARTS = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "a.mp4"},
                {"type": "text", "text": "What opens?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "the door"}]},
    ]
}
SHAREGPT = {
    "id": 5,
    "video": "a.mp4",
    "conversations": [
        {"from": "human", "value": "<video>\nWho is it?"},
        {"from": "gpt", "value": "nobody"},
        {"from": "human", "value": "What opens?"},
        {"from": "gpt", "value": "the door"},
    ],
}
TRL = {
    "prompt": [{"role": "user", "content": "What opens?"}],
    "completion": [{"role": "assistant", "content": "the door"}],
    "video": "a.mp4",
}
SOLUTION = {"prompt": "What opens?", "solution": "<answer>the door</answer>", "videos": ["a.mp4"]}


def converted(tmp_path, kind, entries, task="open_ended"):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(entries))
    done = convert(kind, path, tmp_path / "out.jsonl", media_root=tmp_path, task=task)
    return done, load_records(done.path)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("messages", MESSAGES),
        ("messages", PARTS),
        ("sharegpt", SHAREGPT),
        ("trl", TRL),
        ("trl", SOLUTION),
    ],
)
def test_conversations_become_records(tmp_path, kind, entry):
    _, (record,) = converted(tmp_path, kind, [entry])
    assert record.task == "open_ended" and record.video == str(tmp_path / "a.mp4")
    assert record.prompt == {"question": "What opens?"} and record.answer == "the door"
    assert record.id == str(entry.get("id", 0))
    if entry is MESSAGES:
        assert record.metadata == {"source": "home", "system": "Be brief."}


def test_conversations_of_other_tasks(tmp_path):
    question = "Which?\n(A) a bike\n(B) a car"
    entries = [
        {"prompt": question, "solution": answer, "video": "a.mp4"}
        for answer in ("B", "(B) a car", "B. a car", "a car", "<answer>B</answer>")
    ]
    _, records = converted(tmp_path, "trl", entries, "multiple_choice")
    assert {record.answer for record in records} == {"B"} and len(records) == 5
    assert records[0].options == ("a bike", "a car")
    assert records[0].prompt == {"question": "Which?"}
    entry = {"prompt": question, "solution": "A bike", "video": "a.mp4"}
    _, (record,) = converted(tmp_path, "trl", [entry], "multiple_choice")
    assert record.answer == "A"
    entry = {"prompt": "the door opens", "solution": "[1, 2.5]", "video": "a.mp4"}
    _, (record,) = converted(tmp_path, "trl", [entry], "temporal_grounding")
    assert record.answer == [1, 2.5] and record.prompt == {"event": "the door opens"}


def test_conversations_that_are_none_are_listed(tmp_path):
    bad = [
        {**SOLUTION, "videos": ["a.mp4", "b.mp4"]},
        {"prompt": "What?", "video": "a.mp4"},
        {"prompt": [], "solution": "x", "video": "a.mp4"},
        3,
    ]
    done, records = converted(tmp_path, "trl", [SOLUTION, *bad])
    assert (len(records), done.quarantined) == (1, 4)
    listed = (tmp_path / "out.quarantine.jsonl").read_text()
    for reason in ("expected one video or image, got 2", "no answer", "no turn of the user"):
        assert reason in listed
    with pytest.raises(ValueError, match="format messages needs the task"):
        converted(tmp_path, "messages", [], None)
    with pytest.raises(ValueError, match="format nextgqa has its own tasks"):
        converted(tmp_path, "nextgqa", [])
    with pytest.raises(ValueError, match="unknown task 'opened'"):
        converted(tmp_path, "trl", [], "opened")


def test_the_command_converts_conversations(tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", [MESSAGES])
    words = ["messages", str(path), str(tmp_path / "out.jsonl"), "--media", str(tmp_path)]
    assert cli.main(["data", "convert", *words, "--task", "open_ended"]) == 0
    assert "1 records (open_ended 1)" in capsys.readouterr().out
