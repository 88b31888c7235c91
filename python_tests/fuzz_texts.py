"""Fuzz target: every parser and reward on mutated answers.

No text makes one raise, take long, or return something other than what its docstring says.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401  rewards load it at their first IoU: seconds that are no parser's

from vcr1_fast.rewards import answer, caption, legacy, shaping, spatiotemporal, text
from vcr1_fast.rewards.format import last_block, scan, well_formed
from vcr1_fast.tasks import TASKS

SLOW = 2.0
"""Seconds of the processor that a case may take: 20 kB of text, a few dozen calls."""
MAX_LENGTH = 20_000
OPTIONS = ("a man opens the door", "a dog", "the red car, not the blue one", "B")

SEEDS = (
    "<answer>12.54 to 17.83</answer>",
    "<think>it starts at 3 s</think>\n<answer>3 to 7</answer>",
    "reasoning</think><answer>1:05.5 - 1:02:03</answer>",
    "from 1m5s to 6m20s; 35 to 80 frames; 20 to 50 %",
    "[(1.0, 4.5), (6.0, 7.5)]",
    "[[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]]",
    '{"time": [1.5, 4.0], "boxes": {"2": [0, 0, 0.5, 0.5]}}',
    "<answer>B</answer><glue>[(1.0, 3.0)]</glue>",
    "The answer is A because B is wrong, (C) is not it either",
    "A. a man opens the door B. a dog C. the red car D. B",
    "**Answer: \\boxed{B}**",
    "\u7b54\u6848\u662fB\uff0c\u4e0d\u662fA",
    "-1,234.5e-3 %",
    "twelve hundred and three thirds, minus 5 million",
    "Yes, no doubt; it is not true.",
    "\u0663\u0664 to \u0665\u0666",
    "a dog runs. It jumps over a fence, C++ > C#",
)
FRAGMENTS = (
    *"()[]{}<>\"'`*_\\/|,.:;-+%$#@!?\n\t\0 \u00a0\u2028\ufeff\u200d\u0301\U0001f600",
    *("<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>", "<answer", "</"),
    *(" to ", " - ", " and ", " or ", " not ", "n't ", "NaN", "inf", "1e999", "-0", "0x1F", "1_0"),
    *(
        "A",
        "B",
        "D.",
        "(C)",
        "option B",
        "\\boxed{",
        "3/4",
        "1:60",
        "99:99:99",
        " s",
        " min",
        " ms",
    ),
    *("9" * 400, "0." + "3" * 50, "\u2160", "\u00bd", "\u0665", "\uff11", "\u4e09", "\u79d2"),
    *("[" * 60, "(" * 60, '{"time":', '"boxes":', "null", "true", "yes", "no"),
)


def mutated(rng: random.Random) -> str:
    """A seed after a few random edits."""
    result = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(result) + 1)
        end = min(len(result), at + rng.randrange(12))
        edit = rng.randrange(6)
        if edit == 0:
            result = result[:at] + rng.choice(FRAGMENTS) + result[at:]
        elif edit == 1:
            result = result[:at] + result[end:]
        elif edit == 2:
            result = result[:end] + result[at:end] * rng.randrange(4) + result[end:]
        elif edit == 3:
            other = rng.choice(SEEDS)
            result = result[:at] + other[rng.randrange(len(other)) :]
        elif edit == 4:
            result = result[:at] + rng.choice(FRAGMENTS) + result[end:]
        else:
            result = result[:at] + chr(rng.randrange(1, 0xD800)) + result[end:]
    if rng.random() < 0.002:
        result *= rng.randrange(50, 2000)
    return result[:MAX_LENGTH]


def parsers(rng: random.Random) -> int:
    """One text through every parser; one task's answer, rewards and metrics."""
    given, other = mutated(rng), rng.choice(SEEDS)
    began = time.thread_time()
    calls = _parse(given) + _compare(given, other) + _score(rng, given)
    spent = time.thread_time() - began
    assert spent < SLOW, f"{spent:.1f} s for {len(given)} characters: {given[:200]!r}"
    return calls


def _parse(given: str) -> int:
    span = answer.parse_span(given)
    _check(span is None or _is_span(span), "parse_span", given, span)
    spans = answer.parse_spans(given)
    _check(spans is None or all(map(_is_span, spans)), "parse_spans", given, spans)
    second = answer.seconds(given)
    _check(second is None or (math.isfinite(second) and second >= 0), "seconds", given, second)
    for count in (1, 2):
        boxes = answer.parse_boxes(given, count)
        fits = boxes is None or (len(boxes) == count and all(_are_numbers(b, 4) for b in boxes))
        _check(fits, "parse_boxes", given, boxes)
    for options in (OPTIONS, ()):
        letter = answer.parse_letter(given, options)
        fits = letter is None or (len(letter) == 1 and "A" <= letter <= "Z")
        fits = fits and (letter is None or not options or letter in "ABCD")
        _check(fits, "parse_letter", given, letter)
    label = answer.parse_label(given)
    _check(label is None or label == label.lower(), "parse_label", given, label)
    number = text.parse_number(given)
    _check(number is None or math.isfinite(number), "parse_number", given, number)
    _check(text.parse_boolean(given) in (True, False, None), "parse_boolean", given, None)
    box = spatiotemporal.parse_box(given)
    _check(box is None or _are_numbers(box, 4), "parse_box", given, box)
    spatiotemporal.parse_tube(given)
    scan(given, ("answer", "glue"))
    block = last_block(given, "answer")
    _check(block is None or block in given, "last_block", given, block)
    if well_formed(given, ("answer",)):
        _check(block is not None, "well_formed without a block", given, block)
    return 15


def _compare(given: str, other: str) -> int:
    for name, function in (("rouge", text.rouge), ("word_accuracy", text.word_accuracy)):
        for a, b in ((given[:2000], other), (other, given[:2000])):
            _check(0 <= function(a, b) <= 1, name, a, b)
    caption.mentions(given, other)
    caption.mentions(other, given)
    repeated = shaping.repetition(given)
    _check(-1 <= repeated <= 0, "repetition", given, repeated)
    return 7


def _score(rng: random.Random, given: str) -> int:
    task = TASKS[rng.choice(list(TASKS))]
    record = task.example
    one = task.answer(given, record)
    duration = rng.choice((None, 0.0, 5.0, 1e9))
    rewards = task.score_batch([one], [record], [duration], think=rng.choice((True, False, None)))
    measured = task.measure([one.prediction], [record])
    for name, (value,) in (*rewards.items(), *measured.items()):
        _check(math.isfinite(value), f"{task.name}.{name}", given, value)
    for name, (value,) in rewards.items():
        _check(0 <= value <= 1, f"{task.name}.{name}", given, value)
    terms = legacy.REWARDS.get(task.name, {})
    for term in terms.values() if isinstance(terms, dict) else ():
        # The released code raises on no text either; its values may be NaN (spans at infinity).
        term(given, task.example.answer)
    return 3 + len(terms)


def _check(fits: bool, name: str, given: str, got: Any) -> None:
    assert fits, f"{name}({given!r:.300}) gives {got!r:.200}"


def _is_span(span: Sequence[float]) -> bool:
    return _are_numbers(span, 2) and span[0] <= span[1]


def _are_numbers(values: Sequence[float], count: int) -> bool:
    return len(values) == count and all(map(math.isfinite, values))
