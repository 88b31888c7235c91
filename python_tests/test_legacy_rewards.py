"""The linear forms of the released rewards against their patterns, as published, on random text."""

import ast
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards import score

THINK_ANSWER = r"<think>.*?</think>\s*<answer>.*?</answer>"
PAIR = r"\(\d+(\.\d+)?,\s*\d+(\.\d+)?\)"
BOX = [0.25, 0.25, 0.75, 0.75]
PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:Best option:",
)


def first(tag, text):
    match = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return match and match[1]


def literal(text):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def valid_pairs(text):
    if text is None or not re.match(rf"^\[({PAIR}(,\s*{PAIR})*(,)?|)\]$", text):
        return None
    pairs = literal(text)
    return pairs if pairs is not None and all(a <= b for a, b in pairs) else None


def eight_boxes(text):
    boxes = literal(text) if text is not None else None
    good = isinstance(boxes, list) and len(boxes) == 8
    good = good and all(isinstance(box, list) and len(box) == 4 for box in boxes)
    return boxes if good else None


def span_reward(text):
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    found = re.findall(
        r"(\d+\.?\d*) (to|and) (\d+\.?\d*)", blocks[-1] if blocks else "", re.IGNORECASE
    )
    if not found:
        return 0.0
    start, end = float(found[-1][0]), float(found[-1][2])
    if start > end:
        return 0.0
    inner = max(0.0, min(end, 6.0) - max(start, 2.0))
    return inner / (max(end, 6.0) - min(start, 2.0))


def letter(text):
    text = text.strip()
    for prefix in PREFIXES:
        text = text.replace(prefix, "")
    found = re.search("[ABCDEFG]", text)
    return found[0] if found else ""


def released(text):
    """(task, term) -> score, by the released patterns, for the targets below."""
    stripped = text.strip()
    think = float(re.fullmatch(THINK_ANSWER, stripped, re.DOTALL) is not None)
    glue = re.fullmatch(THINK_ANSWER + r"\s*<glue>.*?</glue>", stripped, re.DOTALL)
    glue = float(glue is not None and valid_pairs(first("glue", text)) is not None)
    boxes = eight_boxes((first("answer", text) or "x").replace("\n", ""))
    answer = first("answer", text)
    return {
        ("temporal_grounding", "format"): think,
        ("temporal_grounding", "iou"): span_reward(text),
        ("tracking", "format"): float(bool(think) and boxes is not None),
        ("grounded_qa", "format"): glue,
        ("grounded_qa", "accuracy"): float(answer is not None and letter(answer) == "B"),
        ("multiple_choice", "format"): glue,
        ("multiple_choice", "accuracy"): float(answer is not None and letter(answer) == "B"),
        ("classification", "format"): think,
        ("classification", "accuracy"): float(
            answer is not None and answer.strip().lower() == "high quality"
        ),
    }


TARGETS = {
    "temporal_grounding": [2.0, 6.0],
    "tracking": [BOX] * 8,
    "grounded_qa": {"answer": "(B)", "glue": [[2.0, 6.0]]},
    "multiple_choice": "(B)",
    "classification": "High quality",
}
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>"]
_WORDS = (
    "to TO and 2 6 12.5 . 5. .5 1.2.3 - , ( ) [ ] (2,6) (2, (05,10) [(1,2)] [(1,2),(3,4),] [] "
    "[(3,2)] B (B) Apple The answer is The best answer is Best answer: High quality \u0662 \u0666 x"
)
_EDGES = [str([BOX] * 8), " ", " ", "\n", "\t", "2 to 6", "9" * 50]
PIECES = st.sampled_from([*TAGS, *_WORDS.split(" "), *_EDGES])
SHAPED = st.tuples(*[st.lists(PIECES, max_size=5).map("".join)] * 4).map(
    lambda parts: "<think>{}</think>{}<answer>{}</answer><glue>{}</glue>".format(*parts)
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join) | SHAPED)
def test_linear_forms_equal_the_released_patterns(text):
    expected = released(text)
    for task, target in TARGETS.items():
        for term, (value,) in score(task, [text], [target], mode="legacy").items():
            if (task, term) in expected:
                assert value == pytest.approx(expected[task, term], abs=1e-12), (task, term)
