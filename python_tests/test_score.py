"""`rewards.score`: the released rewards as recorded, the fixed ones against hand-made values."""

import gc
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards import legacy, mentions, score
from vcr1_fast.tasks import TASKS

GOLDEN = Path(os.environ.get("VCR1_TEST_DATA", "../shared/data")) / "golden_rewards.jsonl"
BOX = [0.25, 0.25, 0.75, 0.75]
TERMS = {task: TASKS[task].reward_names for task in legacy.REWARDS}
TARGETS = {
    "temporal_grounding": [2.0, 6.0],
    "tracking": [BOX] * 8,
    "grounded_qa": {"answer": "(B)", "glue": [[2.0, 6.0]]},
    "multiple_choice": "(B)",
    "classification": "High quality",
    "caption": ["a man opens a red door", "the dog jumps over the fence"],
}
THINK = "<think>x</think>"


def one(task, completion, target=None, **options):
    """The rewards of one completion, by name."""
    target = TARGETS[task] if target is None else target
    scores = score(task, [completion], [target], **options)
    assert set(scores) == set(TERMS[task])
    return {name: values[0] for name, values in scores.items()}


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"VCR1_TEST_DATA has no {GOLDEN.name}")
@pytest.mark.parametrize("task", ["temporal_grounding", "tracking", "grounded_qa"])
def test_legacy_equals_every_recorded_case(task):
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    rows = [row for row in rows if row["task"] == task]
    assert len(rows) == 200
    got = score(
        task,
        [row["completion"] for row in rows],
        [row["solution"] for row in rows],
        mode="legacy",
        durations=[row.get("duration") for row in rows],
    )
    for name in TERMS[task]:
        assert got[name] == pytest.approx([row[name] for row in rows], abs=1e-9), name


DOCS = Path(__file__).parents[1] / "docs" / "rewards.md"
ROW = re.compile(r"\| (.+) \| (\w+) \| (\w+) \| `(.+)` \| ([\d.]+|nan) \| ([\d.]+) \|")
FAULTS = [
    match.groups() for line in DOCS.read_text().splitlines() if (match := ROW.fullmatch(line))
]


def test_the_table_of_faults_is_whole():
    assert len(FAULTS) == len({fault for fault, *_ in FAULTS}) > 15
    assert {task for _, task, *_ in FAULTS} == set(TERMS) - {"caption"}


@pytest.mark.parametrize(
    ("task", "term", "completion", "released", "fixed"),
    [row[1:] for row in FAULTS],
    ids=[row[0] for row in FAULTS],
)
def test_faults_before_and_after(task, term, completion, released, fixed):
    before = one(task, completion, mode="legacy", durations=[7.0])[term]
    assert before == pytest.approx(float(released), abs=1e-4, nan_ok=True)
    assert before != one(task, completion, durations=[7.0])[term]
    assert one(task, completion, durations=[7.0])[term] == pytest.approx(float(fixed), abs=1e-4)


def spans(answer):
    return f"{THINK}<answer>B</answer><glue>{answer}</glue>"


def test_empty_evidence_earned_everything_when_released():
    target = {"answer": "B", "glue": [[3, 3]]}
    assert one("grounded_qa", spans("[]"), target, mode="legacy")["iou"] == 1.0
    assert one("grounded_qa", spans("[]"), target)["iou"] == 0.0


def test_a_hull_of_no_length_earned_everything_when_released():
    inverted = [6.0, 2.0]  # as four rows of Charades-STA are annotated
    completion = f"{THINK}<answer>4 to 4</answer>"
    assert one("temporal_grounding", completion, [4.0, 4.0], mode="legacy")["iou"] == 1.0
    for target in (inverted, [4.0, 4.0]):
        assert one("temporal_grounding", completion, target)["iou"] == 0.0
    assert one("temporal_grounding", f"{THINK}<answer>2 to 6</answer>", inverted)["iou"] == 0.0


tenths = st.integers(0, 200).map(lambda n: n / 10)


@given(tenths, tenths, tenths, tenths)
def test_the_hull_of_two_spans_is_their_union_where_they_overlap(a, b, c, d):
    (a, b), (c, d) = sorted((a, b)), sorted((c, d))
    if a < b and c < d:
        completion = f"<answer>{a} to {b}</answer>"
        released = one("temporal_grounding", completion, [c, d], mode="legacy")["iou"]
        assert one("temporal_grounding", completion, [c, d])["iou"] == pytest.approx(released)
        assert (released > 0) == (min(b, d) > max(a, c))


def test_digits_of_other_scripts_are_not_read():
    completion = f"{THINK}<answer>\u0662 to \u0666</answer>"
    assert one("temporal_grounding", completion, mode="legacy") == {"format": 1.0, "iou": 1.0}
    assert one("temporal_grounding", completion) == {"format": 0.0, "iou": 0.0}


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("2 to 6", 1.0),
        ("4 TO 10", 0.25),
        ("from 2. and 6.0.", 1.0),
        ("9 to 2", 0.0),
        ("5 to 7, or 2 to 6", 1.0),  # the last
        ("5 to 2 to 6", 0.0),  # 5 to 2 takes the 2
        ("1.2.2 to 6", 0.95),  # 2.2 is the longest number before the separator
        ("\u0662 to \u0666", 1.0),
        (" to 6", 0.0),
        ("2 to and 6", 0.0),
    ],
)
def test_legacy_reads_spans_as_the_released_pattern(text, iou):
    completion = f"<answer>7 to 9</answer><answer>{text}</answer>"
    assert one("temporal_grounding", completion, mode="legacy")["iou"] == pytest.approx(iou)


def test_format_asks_for_reasoning_as_told():
    plain, reasoned = "<answer>2 to 6</answer>", f"{THINK}<answer>2 to 6</answer>"
    for think, expected in ((None, (1, 1)), (True, (0, 1)), (False, (1, 0))):
        got = score("temporal_grounding", [plain, reasoned], [[2, 6]] * 2, think=think)
        assert got["format"] == list(expected), think


def test_caption_recall():
    reported = "<answer>A man is opening the red door. Then his dog jumped the fence.</answer>"
    assert one("caption", reported) == {"format": 1.0, "recall": 1.0}
    assert one("caption", "<answer>A man opens a door, which is red.</answer>")["recall"] == 0.5
    assert one("caption", "<answer></answer>") == {"format": 0.0, "recall": 0.0}
    # Far apart in the caption is not one event.
    assert not mentions("A man waits. Rain falls. Cars pass. A door is red.", TARGETS["caption"][0])
    asked = []
    judged = one(
        "caption", reported, judge=lambda caption, event: asked.append(event) or "dog" in event
    )
    assert judged["recall"] == 0.5 and asked == TARGETS["caption"]


# What a pattern might go over again and again: (what stands before it, the piece, what follows).
HOSTILE = [
    ("", "<think>", ""),
    ("", "<answer>", ""),
    ("", "</think><answer>", ""),
    ("<think></think>", " ", "<answer>"),
    ("<think></think><answer>", "1", ""),
    ("<answer>", "1", "</answer>"),
    ("<answer>", "1 to ", "</answer>"),
    ("<answer>2 to ", "6", " to </answer>"),
    ("<answer>", "-", "1</answer>"),
    ("<answer>", "[", "</answer>"),
    ("<answer>[[", "9", "</answer>"),
    ("<answer>[[0, 0, 1, ", "1", "</answer>"),
    ("<answer>[[0, 0, 1, 1]", " ", "x</answer>"),
    ("<answer>[[0, 0, 1, 1", " ", "x</answer>"),
    ("<answer>", "[0, 0, 1, 1], ", "</answer>"),
    ("<answer>B</answer><glue>[(", "1", "</glue>"),
    ("<answer>B</answer><glue>[(1, 2)", " ", "x</glue>"),
    ("<answer>B</answer><glue>[(1,", " ", "</glue>"),
    ("<answer>B</answer><glue>[", "(1, 2), ", "</glue>"),
    ("<answer>B</answer><glue>[(1, 2), (3.", "1", "</glue>"),
    ("<answer>", "A", "</answer>"),
    ("<answer>", "answer is A ", "</answer>"),
    ("<answer>", "word. ", "</answer>"),
    ("<answer>", "9.9e", "</answer>"),
]


def seconds(task, mode, hostile, size):
    """CPU time of this thread, without the collector's walks over what other tests have left."""
    before, piece, after = hostile
    completion = before + piece * (size // len(piece)) + after
    gc.disable()
    try:
        start = time.thread_time()
        score(task, [completion], [TARGETS[task]], mode=mode)
        return time.thread_time() - start
    finally:
        gc.enable()


def grows_linearly(task, mode, hostile):
    fifty = seconds(task, mode, hostile, 50_000)
    return fifty < 1.0 and all(
        seconds(task, mode, hostile, size) < 2.5 * size / 50_000 * fifty + 0.05
        for size in (100_000, 200_000)
    )


@pytest.mark.parametrize("mode", ["strict", "legacy"])
@pytest.mark.parametrize("task", list(TERMS))
def test_hostile_text_takes_linear_time(task, mode):
    """Four times the text takes about four times as long; in quadratic time it would be sixteen,
    and minutes. The small sizes come first, so that a failure does not take those minutes; a busy
    machine gets further tries, which quadratic time would not help."""
    for hostile in HOSTILE:
        assert seconds(task, mode, hostile, 5_000) < 0.2, hostile
        assert any(grows_linearly(task, mode, hostile) for _ in range(4)), hostile


def test_nothing_is_run(tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for task in TERMS:
        for mode in ("strict", "legacy"):
            texts = [f"{THINK}<answer>{code}</answer>", f"{THINK}<answer>[{code}]</answer>"]
            texts.append(f"{THINK}<answer>B</answer><glue>[{code}]</glue>")
            score(task, texts, [TARGETS[task]] * 3, mode=mode)
    assert not mark.exists()


_PIECES = (
    "<think> </think> <answer> </answer> <glue> </glue> to and TO 5 12.5 . , ( ) [ ] - nan 1e999 B "
    "(C) [(1,2)] [(05,10)] [[0,0,1,1]] 'a' {} None 1j \\ \x00 \ud800 \u0661 \n"
)
HUGE = "9" * 5000  # beyond what Python turns into an int
PIECES = [*_PIECES.split(" "), " ", HUGE, f"{HUGE} to {HUGE}", f"[({HUGE}, {HUGE})]", "1e" + HUGE]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join))
def test_any_text_scores(text):
    for task, target in TARGETS.items():
        for values in score(task, [text], [target], durations=[9.5]).values():
            assert 0.0 <= values[0] <= 1.0
        for values in score(task, [text], [target], mode="legacy").values():
            assert math.isnan(values[0]) or 0.0 <= values[0] <= 1.0


def test_targets_in_either_shape():
    for task in ("multiple_choice", "classification", "caption"):
        wrapped = {"answer": TARGETS[task]}
        completion = f"<answer>{TARGETS[task]}</answer>"
        assert one(task, completion, wrapped) == one(task, completion)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tracing", [""], [[]]), "tracing"),
        (("tracking", [""], []), "1 completions, 0 targets"),
        (("temporal_grounding", ["", ""], [[1, 2], [1]]), r"targets\[1\].*temporal_grounding"),
        (("temporal_grounding", [""], [[1, math.nan]]), r"targets\[0\]"),
        (("grounded_qa", [""], [{"answer": "B"}]), r"targets\[0\]"),
        (("caption", [""], ["one text"]), r"targets\[0\]"),
        (("temporal_grounding", [""], [[0, 10**400]]), r"targets\[0\]"),
        (("multiple_choice", ["", ""], ["B", "A or B"]), r"targets\[1\] is no target of multi"),
        (("grounded_qa", [""], [{"answer": "7", "glue": []}]), r"targets\[0\]"),
    ],
)
def test_errors_name_the_fault(arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)
    with pytest.raises(ValueError, match="mode must be one of strict, legacy, got 'lax'"):
        score("tracking", [], [], mode="lax")


def test_every_letter_is_an_answer_and_the_released_code_takes_any_target():
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    texts = [f"<answer>({letter})</answer>" for letter in letters]
    assert score("multiple_choice", texts, list(letters))["accuracy"] == [1.0] * 26
    assert score("multiple_choice", texts, [*letters[1:], "A"])["accuracy"] == [0.0] * 26
    assert score("multiple_choice", texts[:1], ["none"], mode="legacy")["accuracy"] == [0.0]
