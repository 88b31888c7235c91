"""The page of rollouts in a real browser: what it draws, where, and what keys and filters do."""

import json
import random
import re

import browser
import numpy as np
import pytest
from test_pictures import BOX, TRACK, Reader, record

from vcr1_fast.report.pictures import COLOURS
from vcr1_fast.report.rollouts import RunData, write_rollouts_html

PROGRAM = browser.installed()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title=1\">"


@pytest.fixture(scope="module")
def tab():
    with browser.Browser(PROGRAM) as one:
        yield one


@pytest.fixture(autouse=True)
def no_complaints(tab):
    tab.errors.clear()
    tab.resize(1400)
    yield
    assert tab.errors == []


def row(step, name, text, reward, task="temporal_grounding", **more):
    return {"step": step, "task": task, "id": name, "prompt": "When does it move?",
            "target": [2.0, 4.5], "completion": text, "rewards": {"iou": reward, "format": 1.0},
            "reward": reward + 1.0, "advantage": reward - 0.5, "tokens": len(text),
            "finished": True, **more}  # fmt: skip


ROWS = [
    row(1, "a", "<think>one two three</think><answer>0.0 to 1.0</answer>", 0.0),
    *[row(1, "a", "<answer>2.0 to 4.5</answer>", 1.0)] * 3,
    *[row(1, "b", "no answer", -1.0, finished=False)] * 2,
    row(2, "a", "<answer>2.0 to 4.0</answer>", 0.8),
    row(2, "a", ATTACK, 0.1),
    row(2, "t", "<answer>x</answer>", 0.4, task="tracking", target=TRACK),
]
RECORDS = {"a": record("a"), "b": record("b"), "t": record("t", "tracking", TRACK)}


def page(folder, rows=ROWS, **options):
    metrics = [{"step": i, "reward": i / 9, "loss": 1.0 - i / 9} for i in range(10)]
    run = RunData("mine", rows, RECORDS, metrics, {"optim.lr": 1e-5})
    return write_rollouts_html([run], folder / "page.html", reader=Reader(), **options)


def texts(tab, selector):
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)")


def keys(tab):
    return tab.run("[...document.querySelectorAll('article')].map(e => e.dataset.key)")


def choose(tab, **values):
    """Set fields of the form as a person does; waits until the page has followed."""
    for name, value in values.items():
        tab.run(f"""(() => {{ const field = document.forms[0].elements[{json.dumps(name)}];
            field.value = {json.dumps(value)};
            field.dispatchEvent(new Event('input', {{ bubbles: true }})); }})()""")
    tab.run("new Promise(done => setTimeout(done, 200))")


def test_completions_rewards_and_merged_answers_are_shown(tab, tmp_path):
    tab.open(page(tmp_path))
    assert keys(tab) == ["a@1", "b@1", "a@2", "t@2"]
    first = texts(tab, "article:first-of-type tbody tr")
    assert len(first) == 2  # three equal answers are one row
    assert re.match(r"1 \(x3\)\s+2\s+1\s+1\s+0\.5\s+\d+\s+<answer>2\.0 to 4\.5", first[0])
    assert "thinking, 3 words" in first[1] and "one two three" not in first[1]  # folded
    assert "<answer>0.0 to 1.0</answer>" in first[1]
    # Rewards stand before the text.
    places = tab.run("""[...document.querySelector('tbody tr').children].map(
        cell => cell.getBoundingClientRect().left)""")
    assert places == sorted(places)
    assert texts(tab, "article:nth-of-type(1) h2 small")[0] == (
        "step 1, temporal_grounding, reward 1.75 ± 0.433"
    )
    assert "no gradient" in texts(tab, "article:nth-of-type(2) h2")[0]
    assert "cut off" in texts(tab, "article:nth-of-type(2) tbody tr")[0]
    assert [text.split()[0] for text in texts(tab, "#curves figcaption")] == ["reward", "loss"]
    assert "4 of 4 prompts, 9 completions" in texts(tab, "output")[0]


def test_text_of_a_model_is_never_markup(tab, tmp_path):
    rows = [row(1, ATTACK, ATTACK, 0.5, task=ATTACK, prompt=ATTACK, target=ATTACK)]
    tab.open(page(tmp_path, rows=[*rows, *ROWS]))
    assert tab.run("document.title") == "page.html"
    assert tab.run("document.querySelectorAll('main script, main img[src=x]').length") == 0
    assert ATTACK in texts(tab, "article:first-of-type td.text")[0]
    assert texts(tab, "article:first-of-type h2 a") == [ATTACK]


def test_orders_and_filters(tab, tmp_path):
    tab.open(page(tmp_path))
    wanted = {
        "worst": ["b@1", "t@2", "a@2", "a@1"],  # means 0, 1.4, 1.45, 1.75
        "best": ["a@1", "a@2", "t@2", "b@1"],
        "spread": ["a@1", "a@2", "b@1", "t@2"],
        "longest": ["a@2", "a@1", "t@2", "b@1"],
        "newest": ["t@2", "a@2", "b@1", "a@1"],
        "record": ["a@1", "a@2", "b@1", "t@2"],
        "step": ["a@1", "b@1", "a@2", "t@2"],
    }
    for order, expected in wanted.items():
        choose(tab, sort=order)
        assert keys(tab) == expected, order
    for fields, expected in (
        ({"kind": "silent"}, ["b@1"]),
        ({"kind": "mixed"}, ["a@1", "a@2"]),
        ({"kind": "cut"}, ["b@1"]),
        ({"task": "tracking"}, ["t@2"]),
        ({"low": "1.42", "high": "1.5"}, ["a@2"]),
        ({"from": "2"}, ["a@2", "t@2"]),
        ({"text": "4.5</ANSWER"}, ["a@1"]),
        ({"id": "a"}, ["a@1", "a@2"]),
    ):
        choose(tab, **fields)
        assert keys(tab) == expected, fields
        tab.run("document.forms[0].reset()")
        tab.run("new Promise(done => setTimeout(done, 50))")
    assert len(keys(tab)) == 4


def test_one_record_over_the_steps(tab, tmp_path):
    tab.open(page(tmp_path))
    tab.run("document.querySelector('article h2 button').click()")
    assert keys(tab) == ["a@1", "a@2"]


def test_keys_move_and_the_address_names_what_is_shown(tab, tmp_path):
    path = page(tmp_path)
    tab.open(path)
    focused = "document.activeElement.dataset.key"
    tab.press("j")
    assert tab.run(focused) == "a@1"
    tab.press("j")
    assert tab.run(focused) == "b@1" and tab.run("location.hash") == "#b%401"
    tab.press("k")
    assert tab.run(focused) == "a@1"
    tab.press("/")
    assert tab.run("document.activeElement.name") == "text"
    tab.press("j")
    assert tab.run("document.forms[0].elements.text.value") == "j"  # typed, not a move
    tab.open(f"{path}#a@2")
    assert tab.run(focused) == "a@2"
    assert abs(tab.run("document.activeElement.getBoundingClientRect().top")) < 300
    choose(tab, sort="worst", kind="mixed")
    again = tab.run("location.hash")
    tab.open(f"{path}{again}")
    assert keys(tab) == ["a@2", "a@1"]
    assert tab.run("document.forms[0].elements.sort.value") == "worst"


def test_frames_spans_and_boxes_share_one_axis(tab, tmp_path):
    tab.open(page(tmp_path))
    # Four frames of 10 s, at 0, 2.5, 5 and 7.5: each begins at its second.
    left, width, *places = tab.run("""(() => {
        const card = document.querySelector('article'), axis = card.querySelector('.axis');
        const box = axis.getBoundingClientRect();
        return [box.left, box.width, ...[...card.querySelectorAll('.strip img')].map(
            image => image.getBoundingClientRect().left)]; })()""")
    shares = [(place - left) / width for place in places]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75], abs=2e-3)
    bars = tab.run("""[...document.querySelector('article').querySelectorAll('.bar')].map(bar =>
        [bar.innerText, ...[...bar.querySelectorAll('i')].map(part => {
            const box = part.getBoundingClientRect(), all = bar.getBoundingClientRect();
            return [(box.left - all.left) / all.width, box.width / all.width,
                getComputedStyle(part).backgroundColor]; })])""")
    assert [bar[0] for bar in bars] == ["annotated", "1 (x3)", "2"]
    assert bars[0][1][:2] == pytest.approx([0.2, 0.25], abs=1e-3)
    assert bars[1][1][:2] == pytest.approx([0.2, 0.25], abs=1e-3)
    assert bars[2][1][:2] == pytest.approx([0.0, 0.1], abs=1e-3)
    red, green, blue = (int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert bars[2][1][2] == f"rgb({red}, {green}, {blue})"
    # The annotated box is drawn last, dashed, where it is said to be.
    pictures = """document.querySelectorAll('article[data-key="t@2"] svg')"""
    boxes = tab.run(
        f"[...{pictures}]"
        + """.map(picture => {
        const last = picture.lastElementChild, box = last.getBoundingClientRect();
        const all = picture.getBoundingClientRect();
        return [last.classList.contains('annotated'), getComputedStyle(last).strokeDasharray,
            (box.left - all.left) / all.width, (box.top - all.top) / all.height,
            box.width / all.width, box.height / all.height]; })"""
    )
    for drawn, (x0, y0, x1, y1) in zip(boxes, TRACK, strict=True):
        assert drawn[0] is True and drawn[1] != "none"
        assert drawn[2:] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)
    assert BOX in TRACK


def test_a_row_its_bar_and_its_boxes_are_shown_together(tab, tmp_path):
    tab.open(page(tmp_path))
    tab.run("""document.querySelectorAll('article')[0].querySelectorAll('tbody tr')[1]
        .dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))""")
    hot = tab.run("[...document.querySelectorAll('.hot')].map(e => [e.tagName, e.dataset.i])")
    assert sorted(hot) == [["DIV", "1"], ["TR", "1"]]
    faded = tab.run(
        """getComputedStyle(document.querySelector('article .bar[data-i="0"]')).opacity"""
    )
    assert float(faded) < 0.5


def test_the_video_plays_at_the_annotated_span(tab, tmp_path):
    clip = tmp_path / "my clip#1.mp4"
    clip.write_bytes(b"")
    known = {"a": record("a", start=3.0)}
    object.__setattr__(known["a"], "video", str(clip))
    run = RunData("mine", ROWS[:1], known)
    tab.open(write_rollouts_html([run], tmp_path / "page.html", reader=Reader()))
    button = "document.querySelector('article > button')"
    assert tab.run(f"{button}.innerText") == "play 2 to 4.5 s"
    tab.run(f"{button}.click()")
    source = tab.run("document.querySelector('video')?.getAttribute('src') ?? 'gone'")
    # Seconds of the part begin at 3 s of the file. An empty file cannot be played, which is said.
    assert source in ("my%20clip%231.mp4#t=5,7.5", "gone")
    tab.until("document.querySelector('article').innerText.includes('cannot be played here')")
    tab.errors.clear()


def test_a_phone_shows_rewards_and_frames_without_scrolling_sideways(tab, tmp_path):
    tab.resize(390, 844)
    tab.open(page(tmp_path))
    assert tab.run("document.documentElement.scrollWidth") <= 390
    outside = tab.run("""[...document.querySelectorAll('td, .strip img, .bar, h2, form label')]
        .filter(e => e.getBoundingClientRect().width && e.getBoundingClientRect().right > 391)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert outside == []
    # Rewards carry their names, since the table's head is gone, and stand above the text.
    named, above = tab.run("""(() => {
        const cells = [...document.querySelector('.rows tbody tr').cells];
        return [getComputedStyle(cells[1], '::before').content,
            cells[1].getBoundingClientRect().bottom <= cells.at(-1).getBoundingClientRect().top];
        })()""")
    assert "data-name" in named or "total" in named
    assert above is True
    tab.run("scrollTo(0, 600)")
    # Nothing lies over the page's content.
    assert tab.run("document.elementFromPoint(195, 10).closest('form')") is None


def test_frames_scroll_below_the_filters_on_a_desktop(tab, tmp_path):
    tab.open(page(tmp_path, rows=ROWS * 3))
    tab.run("scrollTo(0, 700)")
    covered = tab.run("""(() => {
        const box = document.querySelector('form').getBoundingClientRect();
        const points = [];
        for (let x = box.left + 5; x < box.right; x += 40) {
          points.push(document.elementFromPoint(x, box.top + box.height / 2));
        }
        return [box.top, points.every(e => e.closest('form') !== null)]; })()""")
    assert covered == [0, True]


def luminance(text):
    parts = [int(part) / 255 for part in re.findall(r"\d+", text)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(tab, tmp_path, dark):
    tab.resize(1400, dark=dark)
    tab.open(page(tmp_path))
    found = tab.run("""[...document.querySelectorAll('body *')].filter(e => e.offsetParent !== null
        && ['OPTION', 'SCRIPT', 'SELECT', 'INPUT', 'BUTTON'].indexOf(e.tagName) < 0
        && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
        .map(e => [e.className || e.tagName, getComputedStyle(e).color])""")
    paper = luminance(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(found) > 40 and (paper < 0.1) == dark
    for name, colour in found:
        light, low = sorted((luminance(colour), paper), reverse=True)
        assert (light + 0.05) / (low + 0.05) >= 4.5, (name, colour)


def test_runs_are_compared_side_by_side(tab, tmp_path):
    def run(name, lr, *rows):
        metrics = [{"step": i, "reward": lr * i} for i in range(3)]
        return RunData(name, rows, RECORDS, metrics, {"optim.lr": lr, "run.seed": 0})

    runs = [run("slow", 0.1, *ROWS), run("fast", 0.3, *ROWS[:4])]
    tab.open(write_rollouts_html(runs, tmp_path / "compare.html", reader=Reader()))
    choose(tab, sort="record", id="a")
    assert keys(tab) == ["slow/a@1", "fast/a@1", "slow/a@2"]
    assert tab.run("document.querySelectorAll('#curves polyline').length") == 2
    # Only the settings that differ.
    cells = tab.run("[...document.querySelectorAll('.settings td')].map(e => e.textContent)")
    assert cells == ["optim.lr", "0.1", "0.3"]
    choose(tab, run="fast", id="")
    assert keys(tab) == ["fast/a@1"]


def test_a_page_that_follows_a_run_keeps_its_place(tab, tmp_path):
    rows = [row(step, "a", "<answer>2.0 to 4.5</answer>", 1.0) for step in range(60)]
    path = page(tmp_path, rows=rows, watch=1)
    tab.open(path)
    choose(tab, sort="newest")
    tab.run("window.old = true; scrollTo(0, 5000)")
    page(tmp_path, rows=[*rows, row(60, "a", "new", 0.0)], watch=1)
    tab.until("window.old === undefined && document.querySelectorAll('article').length > 15")
    assert tab.run("scrollY") == pytest.approx(5000, abs=50)
    assert keys(tab)[0] == "a@60"


def test_fifty_thousand_completions_open_and_scroll(tab, tmp_path):
    rng = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    rows = []
    for group in range(6250):
        for _ in range(8):
            text = " ".join(rng.choices(words, k=60))
            rows.append(row(group // 8, f"r{group}", text, rng.random()))
    path = write_rollouts_html([RunData("big", rows)], tmp_path / "big.html")
    seconds = tab.open(path)
    assert tab.run("document.querySelectorAll('article').length") < 100
    began = tab.run("performance.now()")
    choose(tab, sort="worst")
    assert tab.run("performance.now()") - began < 5000
    tab.until("""scrollTo(0, document.body.scrollHeight) ||
        document.querySelectorAll('article').length >= 60""")
    assert tab.run("document.querySelectorAll('article').length") < 400
    # 3 s on a quiet machine; a test machine may be four times as slow.
    assert seconds < 12
