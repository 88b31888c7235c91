"""docs/data.md agrees with the code: records, tasks, prompts, formats."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vcr1_fast.cli import parser
from vcr1_fast.config.loader import load_config
from vcr1_fast.data.formats import FORMATS
from vcr1_fast.data.records import Record
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import load_prompts
from vcr1_fast.train.config import DataConfig, TrainConfig

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def table(title):
    """Rows of the table below a title, as lists of cells."""
    section = TEXT.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell):
    return re.findall(r"`\{?(\w+)\}?`", cell)


def test_fields():
    assert {name for row in table("Records") for name in names(row[0])} == {
        field.name for field in fields(Record)
    }


def test_tasks():
    rows = {names(row[0])[0]: row for row in table("Tasks")}
    assert set(rows) == set(TASKS)
    for name, row in rows.items():
        task = TASKS[name]
        assert set(names(row[1])) <= set(task.fields), name
        assert row[3].split(", ") == list(task.reward_names), name
        image = Record("a", name, None, {}, None, image="a.png")
        with pytest.raises(ValueError) as caught:
            task.check(image)
        assert ("needs a video" in str(caught.value)) == (row[5] == "video"), name


def test_placeholders():
    rows = table("Prompts")
    reported, columns = set(), {}
    for row in rows:
        for name in names(row[0]):
            columns[name] = row
    for name, task in TASKS.items():
        row = columns.get(name, rows[-1])
        like = columns["multiple_choice"] if row[1].startswith("as ") else row
        assert set(names(like[1])) == set(task.fields), name
        assert row[3].split(", ") == list(task.tags), name
        assert {name for group in task.required_placeholders for name in group} <= set(
            names(like[1])
        ), name
        reported.add(name)
    assert set(columns) <= reported


def test_the_prompts_file_loads(tmp_path):
    (tmp_path / "p.yaml").write_text(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    templates = load_prompts(tmp_path / "p.yaml", TASKS)
    assert templates["temporal_grounding"].think and templates["tracking"].no_think


def test_the_difficulty_settings_load(tmp_path):
    example = re.search(r"```yaml\n(data:\n.*?)```", TEXT, re.DOTALL)[1]
    (tmp_path / "c.yaml").write_text(example + "model: {path: m}\nrun: {output: o}\n")
    data = load_config(TrainConfig, tmp_path / "c.yaml").data
    assert (data.difficulty_range, data.order) == ((0.0, 1.0), "easy_first")
    assert data.order_window == DataConfig(train="t").order_window


def test_formats(capsys):
    rows = table("Formats")
    assert {name for row in rows for name in names(row[0])} == set(FORMATS)
    for row in rows:
        assert set(row[2].split(", ")) <= set(TASKS)
    with pytest.raises(SystemExit):
        parser().parse_args(["data", "convert", "--help"])
    assert set(FORMATS) <= set(re.findall(r"\w+", capsys.readouterr().out))
