"""The rewards that VideoChat-R1 released, with their faults, to reproduce and to compare with.

Specified by `src/open_r1/grpo_tasks.py`, `grpo_tg.py`, `grpo_qa.py` and `grpo_cls.py` of
OpenGVLab/VideoChat-R1. Equal to them on every string, with these exceptions, where those raise or
return what a previous sample left behind: a span pair whose hull is empty scores 1 (as in
`grpo_tg.py`), and integers too large for a float score 0. As released, boxes at infinity can score
NaN. The released patterns take quadratic or cubic time on repeated tags and long digits; the forms
here are linear.

Each function takes (completion, target), the target as annotated: a span [start, end], a list of
boxes, {"answer": "(B)", "glue": spans}, or a text.
"""

import ast
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_THINK_ANSWER = re.compile(r"</think>\s*<answer>")
_ANSWER_GLUE = re.compile(r"</answer>\s*<glue>")
_SEPARATOR = re.compile(r" (?:to|and)(?= )", re.IGNORECASE)
_NUMBER = re.compile(r"\d+\.?\d*")
_PAIR = r"\(\d+(?:\.\d+)?,\s*\d+(?:\.\d+)?\)"
_PAIRS = re.compile(rf"\[(?:{_PAIR}(?:,\s*{_PAIR})*,?|)\]$")
_MAY_WARN = re.compile(r"\\|[\d.][A-Za-z_]")
_LETTER = re.compile("[ABCDEFG]")
_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:Best option:",  # a comma is missing between two prefixes
)


def _first_block(text: str, tag: str) -> str | None:
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end]


def _last_answer(text: str) -> str | None:
    """Of the blocks found from the left, each up to the next closing tag, the last one."""
    found, start = None, text.find("<answer>")
    while start >= 0 and (end := text.find("</answer>", start)) >= 0:
        found = text[start + len("<answer>") : end]
        start = text.find("<answer>", end)
    return found


def think_answer_format(completion: str, target: Any = None) -> float:
    """1 for `<think>…</think> <answer>…</answer>`; what stands inside, more tags too, is free."""
    text = completion.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    match = _THINK_ANSWER.search(text, len("<think>"))
    return float(match is not None and match.end() <= len(text) - len("</answer>"))


def glue_format(completion: str, target: Any = None) -> float:
    """1 for `<think>…</think> <answer>…</answer> <glue>spans</glue>` with valid spans."""
    text = completion.strip()
    if not (text.startswith("<think>") and text.endswith("</glue>")):
        return 0.0
    middle = _THINK_ANSWER.search(text, len("<think>"))
    last = middle and _ANSWER_GLUE.search(text, middle.end())
    if not last or last.end() > len(text) - len("</glue>"):
        return 0.0
    return float(_pairs(_first_block(completion, "glue")) is not None)


def boxes_format(completion: str, target: Any = None) -> float:
    """1 for think and answer around a list of 8 lists of 4 literals."""
    if not think_answer_format(completion):
        return 0.0
    return float(_eight_lists(_first_block(completion, "answer")) is not None)


def span_iou(completion: str, target: Sequence[float]) -> float:
    """Intersection over the hull of the last "S to E" in the last answer and the target."""
    span = _last_span(_last_answer(completion) or "")
    if span is None or span[0] > span[1]:
        return 0.0
    (start, end), (s, e) = span, target
    hull = max(end, e) - min(start, s)
    return max(0.0, min(end, e) - max(start, s)) / hull if hull > 0 else 1.0


def _last_span(text: str) -> tuple[float, float] | None:
    found, free = None, 0  # text before `free` belongs to the span found last
    for separator in _SEPARATOR.finditer(text):
        right = _NUMBER.match(text, separator.end() + 1)
        if right is None or separator.start() < free:
            continue
        left = _number_before(text, free, separator.start())
        if left is not None:
            found, free = (float(left), float(right[0])), right.end()
    return found


def _number_before(text: str, first: int, end: int) -> str | None:
    """The longest number that ends at `end` and begins at `first` or later."""
    start = end
    while start > first and text[start - 1].isdecimal():
        start -= 1
    if start > first and text[start - 1] == ".":
        whole = start - 1
        while whole > first and text[whole - 1].isdecimal():
            whole -= 1
        start = whole if whole < start - 1 else start
    return text[start:end] if start < end else None


def glue_iou(completion: str, target: dict[str, Any]) -> float:
    """IoU of the unions of the spans in the first glue block and of the target's; empty unions: 1.

    Spans at infinity give NaN."""
    spans = _pairs(_first_block(completion, "glue"))
    if spans is None:
        return 0.0
    try:
        return _interval_iou(_merged(spans), _merged(target["glue"]))
    except OverflowError:  # an integer of hundreds of digits among floats
        return 0.0


def _pairs(text: str | None) -> list[tuple[float, float]] | None:
    if text is None or not _PAIRS.match(text):
        return None
    pairs = _literal(text)
    return None if pairs is None or any(a > b for a, b in pairs) else pairs


def _merged(spans: Sequence[Sequence[float]]) -> list[list[float]]:
    merged: list[list[float]] = []
    for start, end in sorted(spans, key=lambda span: span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _interval_iou(a: list[list[float]], b: list[list[float]]) -> float:
    common, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        common += end - start if start < end else 0
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    union = sum(end - start for start, end in a) + sum(end - start for start, end in b) - common
    return 1.0 if union == 0 else common / union


def boxes_iou(completion: str, target: Sequence[Sequence[float]]) -> float:
    """Mean IoU of 8 boxes, the given first one included, whatever their order."""
    boxes = _eight_lists(_first_block(completion.replace("\n", ""), "answer"))
    if boxes is None or len(target) != 8:
        return 0.0
    try:
        return sum(map(_box_iou, boxes, target)) / 8
    except (TypeError, OverflowError):  # literals that are no numbers, or too large
        return 0.0


def _box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    union = area_a + area_b - width * height
    return 0.0 if union == 0 else width * height / union


def _eight_lists(text: str | None) -> list[list[Any]] | None:
    data = None if text is None else _literal(text.replace("\n", ""))
    if not isinstance(data, list) or len(data) != 8:
        return None
    return data if all(isinstance(row, list) and len(row) == 4 for row in data) else None


def _literal(text: str) -> Any:
    """A Python literal, None for anything else. Literals only: no name is looked up or called."""
    try:
        if not _MAY_WARN.search(text):
            return ast.literal_eval(text)
        # Odd escapes in strings warn, and numbers run into words. The filters are the process's,
        # whatever thread this is, so they are left alone where there is no need.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def letter_accuracy(completion: str, target: dict[str, Any] | str) -> float:
    """1 when the first of A to G in the first answer, known phrases removed, is the target's."""
    answer = _first_block(completion, "answer")
    truth = target["answer"] if isinstance(target, dict) else target
    return float(answer is not None and _letter(answer) == _letter(truth))


def _letter(text: str) -> str:
    text = text.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    match = _LETTER.search(text)
    return match[0] if match else ""


def label_accuracy(completion: str, target: dict[str, Any] | str) -> float:
    """1 when the first answer is the target, white space around it and case aside."""
    answer = _first_block(completion, "answer")
    truth = target["answer"] if isinstance(target, dict) else target
    return float(answer is not None and answer.strip().lower() == truth.strip().lower())


REWARDS: Mapping[str, Mapping[str, Callable[[str, Any], float]]] = {
    "temporal_grounding": {"format": think_answer_format, "iou": span_iou},
    "tracking": {"format": boxes_format, "iou": boxes_iou},
    "grounded_qa": {"format": glue_format, "iou": glue_iou, "accuracy": letter_accuracy},
    # As released: scored by the format of grounded questions, which demands evidence that the
    # prompt of multiple choice never asks for.
    "multiple_choice": {"format": glue_format, "accuracy": letter_accuracy},
    "classification": {"format": think_answer_format, "accuracy": label_accuracy},
    # The code of caption recall was not released.
    "caption": {"format": think_answer_format},
}
"""Task -> reward -> function of (completion, target): the tasks that VideoChat-R1 trained on."""
