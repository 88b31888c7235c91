"""Curves, tables and the rollout viewer, from files made here."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_pictures import data_of

from vcr1_fast.files import read_jsonl
from vcr1_fast.report.curves import (
    DPI,
    Panel,
    draw_panel,
    read_metrics,
    running_mean,
    spread,
    write_curves,
)
from vcr1_fast.report.rollouts import RunData, write_rollouts_html
from vcr1_fast.report.scores import draw_task, write_scores
from vcr1_fast.report.table import Table, evaluation_table, markdown_table, print_table


def write_lines(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


@pytest.fixture
def metrics_file(tmp_path):
    rows = [
        {
            "step": step,
            "reward/tracking": 0.5 + 0.01 * step,
            "reward/grounded_qa": 1.0,
            "kl": None if step == 3 else 0.001 * step,
            "seconds": {"rollout": 1.0, "policy": 0.5},
        }
        for step in range(1, 21)
    ]
    return write_lines(tmp_path / "metrics.jsonl", rows)


def test_curves_are_pictures_of_the_asked_size_with_ink_of_each_line(metrics_file, tmp_path):
    paths = write_curves(metrics_file, tmp_path / "out")
    assert [path.stem for path in paths] == ["curves", "reward", "kl", "seconds"]
    with Image.open(paths[0]) as overview:
        assert overview.size == (round(3 * 4.6 * DPI), 3 * DPI)
    with Image.open(paths[1]) as reward:
        assert reward.size == (round(4.6 * DPI), 3 * DPI)
        pixels = np.asarray(reward.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # one line a task, in its own colour
        assert (pixels == colour).all(axis=1).sum() > 100
    assert not (pixels == (0x00, 0x9E, 0x73)).all(axis=1).any()  # there is no third line


def test_curve_values_reach_the_panel_unchanged(metrics_file):
    series = Panel("kl", "", "kl").series(read_metrics(metrics_file))
    steps, values = series[""]
    assert 3 not in steps and len(steps) == 19  # null is a gap, not a zero
    np.testing.assert_allclose(values, 0.001 * steps, rtol=1e-12)
    stages = Panel("s", "", r"seconds/([^/]+)").series(read_metrics(metrics_file))
    assert list(stages) == ["rollout", "policy"]


def test_lines_are_named_only_where_there_are_several():
    figure = Figure()
    steps = np.arange(3)
    clipped = Panel("c", "", r"clip_(?:fraction|(low|high))")
    series = {"": (steps, np.ones(3)), "low": (steps, np.zeros(3))}
    names = [end[:2] for end in draw_panel(figure.add_subplot(), clipped, series)]
    assert names == [("all", 1.0), ("low", 0.0)]
    assert draw_panel(figure.add_subplot(), clipped, {"": series[""]}) == []


def test_a_repeated_step_counts_once_with_its_last_values(tmp_path):
    path = write_lines(
        tmp_path / "m.jsonl", [{"step": s, "kl": k} for s, k in ((2, 9), (1, 1), (2, 3))]
    )
    assert [row["kl"] for row in read_metrics(path)] == [1, 3]


@pytest.mark.parametrize("line", ["{oops", "[1, 2]"])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "kl": 0.5}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2:")):
        write_curves(path, tmp_path)


def test_a_torn_last_line_of_a_running_file_is_left_out(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [{"step": 1}], tail='{"step": 2, "k')
    assert read_jsonl(path, torn="skip") == [(1, {"step": 1})]


def test_a_row_without_a_step_or_a_file_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step"):
        read_metrics(write_lines(tmp_path / "a.jsonl", [{"kl": 1.0}]))
    with pytest.raises(ValueError, match="no"):
        write_curves(write_lines(tmp_path / "b.jsonl", [{"step": 1, "colour": 1}]), tmp_path)


def test_running_mean_is_the_mean_of_the_points_inside_the_window():
    values = np.random.default_rng(0).normal(size=101)
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(101)]
    np.testing.assert_allclose(running_mean(values, share=0.1), expected, atol=1e-12)


def test_spread_keeps_order_and_gap_and_moves_nothing_that_has_room():
    assert spread([100.0, 0.0, 50.0], 10) == [100.0, 0.0, 50.0]
    np.testing.assert_allclose(spread([20.0, 20.0, 20.0, 90.0], 10), [10, 20, 30, 90])
    placed = np.array(spread([3.0, 1.0, 2.0], 10))
    assert np.all(np.diff(placed[[1, 2, 0]]) >= 10 - 1e-9)
    assert placed.mean() == pytest.approx(2.0)


SUMMARY = {
    "level": 0.95,
    "tasks": {
        "temporal_grounding": {
            "primary": "mIoU",
            "n": 40,
            "metrics": {"R@0.5": 0.25, "mIoU": 0.41234},
            "intervals": {"mIoU": [0.3, 0.52], "R@0.5": [0.1, 0.4]},
            "parse_failure_rate": 0.05,
            "unfinished": 2,
            "floor": {"mIoU": 0.3333},
        }
    },
    "quarantined": [{"id": "x", "source": "x.mp4", "reason": "no frames"}],
}


def test_evaluation_table_puts_the_primary_metric_first_with_interval_and_baseline():
    table = evaluation_table(SUMMARY)
    first, second = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert first["metric"] == "mIoU" and first["score"] == "0.412"
    assert first["95 %"] == "0.300 to 0.520" and first["blind baseline"] == "0.333"
    assert first["n"] == "40" and first["unparsed"] == "5.0 %" and first["cut off"] == "2"
    assert second["metric"] == "R@0.5" and second["blind baseline"] == "\N{EN DASH}"
    assert "1 quarantined" in table.title


def test_the_picture_of_scores_has_every_number_at_its_place(tmp_path):
    split = {"models": {"old": {"mIoU": 0.2}, "new": {"mIoU": 0.6, "R@0.5": 0.7}}}
    task = {**SUMMARY["tasks"]["temporal_grounding"], "floor_strategy": "whole video"}
    axes = Figure().add_subplot()
    draw_task(axes, "temporal_grounding", task, split)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mIoU", "R@0.5"]
    points = [np.column_stack(line.get_data()).tolist() for line in axes.get_lines()]
    assert [[0.3, 0], [0.52, 0]] in points and [[0.1, 1], [0.4, 1]] in points  # intervals
    assert [[0.41234, 0], [0.25, 1]] in points
    assert [[0.3333, 0]] in points  # the baseline is known of one metric
    assert [[0.2, 0]] in points and points.count([[0.6, 0], [0.7, 1]]) == 2
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "blind baseline: whole video" in names and "published: new" in names
    summary = {"level": 0.9, "tasks": {"temporal_grounding": task}, "published": {}}
    path = write_scores(summary, tmp_path / "scores.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no scored task"):
        write_scores({"tasks": {}, "published": {}}, path)


def test_a_title_longer_than_its_table_stays_one_line():
    out = io.StringIO()
    print_table(Table(["a"], [["1"]], title="a long title of a narrow table"), file=out)
    assert out.getvalue().splitlines()[0].strip() == "a long title of a narrow table"


def test_a_piped_table_is_whole_lines_without_colour_codes():
    wide = Table(["name", "value"], [["[bold]x[/bold] " + "long " * 40, "1"], ["b", "22"]])
    out = io.StringIO()
    print_table(wide, file=out)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "[bold]x[/bold] " + ("long " * 40).strip() in text
    rows = [line for line in text.splitlines() if line.strip()]
    assert len(rows) == 4  # head, rule, two rows: nothing wrapped
    assert rows[2].rstrip().endswith(" 1") and rows[3].rstrip().endswith(" 22")
    assert len(rows[2].rstrip()) == len(rows[3].rstrip())  # numbers are aligned right


def test_markdown_table_aligns_and_escapes():
    text = markdown_table(Table(["op", "ms"], [["a|b", "1.5"], ["c", "10.25"]]))
    assert text == ("| op   |    ms |\n| ---- | ----: |\n| a\\|b |   1.5 |\n| c    | 10.25 |")


def test_a_row_of_wrong_width_is_refused():
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(["a"], [["1", "2"]])


class Page(HTMLParser):
    """Tags and text as a browser sees them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.texts.append(data)


ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & 'q' \" é 😀"


def test_the_viewer_shows_model_text_as_text(tmp_path):
    rows = [
        {
            "step": 1,
            "task": ATTACK,
            "id": ATTACK,
            "prompt": ATTACK,
            "target": ATTACK,
            "completion": f"{ATTACK} {i}",
            "rewards": {ATTACK: float(i)},
        }
        for i in range(2)
    ]
    out = write_rollouts_html(write_lines(tmp_path / "r.jsonl", rows), tmp_path / "r.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and "img" not in page.tags  # the data, the script
    assert not [name for name in page.attributes if name.startswith("on")]
    (group,) = data_of(out)["groups"]
    shown = [row["text"] for row in group["rows"]]
    assert shown == [f"{ATTACK} 1", f"{ATTACK} 0"]  # unharmed, the best rewarded first


def test_a_surrogate_without_its_pair_costs_no_page(tmp_path):
    text = b"a\xed\xa0\xbdb".decode("utf-8", "surrogatepass")
    run = RunData("", [{"step": 1, "task": "t", "id": "a", "completion": text, "rewards": {}}])
    (group,) = data_of(write_rollouts_html([run], tmp_path / "p.html"))["groups"]
    assert group["rows"][0]["text"] == "a?b"


def test_the_viewer_keeps_groups_apart_and_samples_long_files(tmp_path):
    rows = [
        {"step": s, "task": "t", "id": i, "completion": f"{n}", "rewards": {}}
        for s in range(10)
        for i in ("a", "b")
        for n in range(3)
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    page = write_rollouts_html(path, tmp_path / "r.html")
    assert [len(group["rows"]) for group in data_of(page)["groups"]] == [3] * 20
    short = write_rollouts_html(path, tmp_path / "s.html", max_prompts=4)
    assert len(data_of(short)["groups"]) == 4
    assert "4 of 20 prompts, 60 completions" in short.read_text()
    assert data_of(short)["groups"][-1]["key"] == "b@9"


def test_equal_answers_are_one_row_and_count_as_many(tmp_path):
    rewards = [("x", 1.0), ("x", 1.0), ("x", 0.0), ("y", 0.5)]
    rows = [
        {"step": 1, "task": "t", "id": "a", "completion": text, "rewards": {"r": reward}}
        for text, reward in rewards
    ]
    path = write_lines(tmp_path / "r.jsonl", rows)
    (group,) = data_of(write_rollouts_html(path, tmp_path / "r.html"))["groups"]
    assert [(row["text"], row["times"], row["reward"]) for row in group["rows"]] == [
        ("x", 2, 1.0),
        ("y", 1, 0.5),
        ("x", 1, 0.0),  # another reward: it is kept apart
    ]
    assert group["count"] == 4 and group["mean"] == pytest.approx(0.625)
    assert group["spread"] == pytest.approx(np.std([1.0, 1.0, 0.0, 0.5]))


def test_a_rollout_without_a_completion_is_refused(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"step": 1, "task": "t", "id": "a"}])
    with pytest.raises(ValueError, match="completion"):
        write_rollouts_html(path, tmp_path / "r.html")
