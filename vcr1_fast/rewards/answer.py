"""What an answer says: spans of seconds, lists of spans or boxes, the letter of an option.

Every parser returns None for text that has no single reading. All of them take linear time, accept
ASCII digits only, reject numbers that are not finite, and never evaluate the text.
"""

import math
import re
from collections.abc import Sequence
from string import ascii_uppercase

Span = tuple[float, float]
Box = tuple[float, float, float, float]

MAX_SPANS = 16
"""Most spans in one evidence list; NExT-GQA's annotations have at most 16."""

_TOKEN = re.compile(
    r"(?P<number>\.?\d+(?:[.,:]\d+)*\.?(?:[eE][+-]?\d+)?)"
    r"|(?P<word>[A-Za-z]+)|(?P<dash>[-\u2010-\u2015\u2212])|(?P<other>\S)",
    re.ASCII,
)
_DECIMAL = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d\d(?:\.\d*)?)", re.ASCII)
_UNITS = frozenset({"s", "sec", "secs", "second", "seconds"})
_SEPARATORS = frozenset({"to", "and", "until", "till"})
_LONGEST_NUMBER = 32

# Two runs of the same characters never meet ("\d+\.?\d*", "\s*,?\s*"): where the rest fails, such a
# pair is tried at every place that could divide it, in quadratic time.
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_SIGNED = re.compile(_NUMBER, re.ASCII)


def _rows(length: int) -> re.Pattern[str]:
    numbers = r"\s*,\s*".join([_NUMBER] * length)
    row = rf"(?:\[\s*{numbers}(?:\s*,)?\s*\]|\(\s*{numbers}(?:\s*,)?\s*\))"
    return re.compile(rf"\s*\[\s*{row}(?:\s*,\s*{row})*(?:\s*,)?\s*\]\s*", re.ASCII)


_SPAN_ROWS, _BOX_ROWS = _rows(2), _rows(4)


def seconds(text: str) -> float | None:
    """One time: `12.5` or a clock reading, `1:05.5` or `1:02:03`. None when it is neither."""
    if len(text) > _LONGEST_NUMBER:
        return None
    if _DECIMAL.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else None
    clock = _CLOCK.fullmatch(text)
    if clock is None:
        return None
    hours, minutes, rest = int(clock[1] or 0), int(clock[2]), float(clock[3])
    if rest >= 60 or (clock[1] is not None and minutes >= 60):
        return None
    return 3600.0 * hours + 60.0 * minutes + rest


def parse_span(text: str) -> Span | None:
    """(start, end) in seconds from the one "S to E" in the text.

    Separators: to, and, until, till, any dash; units `s`, `sec`, `seconds` may follow a number;
    words around the span are ignored. None if there is no span, several, a chain ("5 to 10 to 20"),
    a number that cannot be read ("1,5", "1e999"), or an end before the start.
    """
    chains: list[list[float | None]] = []
    state, negative, previous_end = "text", False, -1  # state: text, number, separator
    for token in _TOKEN.finditer(text):
        kind, value = token.lastgroup, token.group()
        if kind == "number":
            number = seconds(value)
            if number is not None and negative and previous_end == token.start():
                number = -number
            if state == "separator":
                chains[-1].append(number)
            else:
                chains.append([number])
            state, negative = "number", False
        elif state == "number" and value.lower() in _UNITS:
            pass
        elif state == "number" and (kind == "dash" or value.lower() in _SEPARATORS):
            state = "separator"
        elif kind == "dash":
            negative = True
        else:
            state, negative = "text", False
        previous_end = token.end()
    spans = [chain for chain in chains if len(chain) > 1]
    if len(spans) != 1 or len(spans[0]) != 2:
        return None
    start, end = spans[0]
    if start is None or end is None or end < start:
        return None
    return start, end


def _numbers(text: str) -> list[float] | None:
    found = _SIGNED.findall(text)
    if any(len(number) > _LONGEST_NUMBER for number in found):
        return None
    values = [float(number) for number in found]
    return values if all(map(math.isfinite, values)) else None


def parse_spans(text: str) -> tuple[Span, ...] | None:
    """Spans of `[(1.0, 4.5), (6.0, 7.5)]` in seconds; rows may be tuples or lists, at most
    MAX_SPANS of them. None for anything else, and when a span ends before it starts."""
    if not _SPAN_ROWS.fullmatch(text):
        return None
    values = _numbers(text)
    if values is None or len(values) > 2 * MAX_SPANS:
        return None
    spans = tuple(zip(values[0::2], values[1::2], strict=True))
    return spans if all(start <= end for start, end in spans) else None


def parse_boxes(text: str, count: int) -> tuple[Box, ...] | None:
    """Exactly `count` boxes of `[[x0, y0, x1, y1], …]`. Whether a box is inside the frame is the
    overlap's business: an impossible one scores 0 there without voiding its neighbours."""
    if not _BOX_ROWS.fullmatch(text):
        return None
    values = _numbers(text)
    if values is None or len(values) != 4 * count:
        return None
    return tuple(zip(*(values[i::4] for i in range(4)), strict=True))


_MARKUP = str.maketrans("", "", "*_`")
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_LEADING = re.compile(r"[(\[]?([A-Z])[)\].:](?!\w)")
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?: option)?(?: is| would be)?) ?:? ?[(\[]?([A-Z])(?![\w'-])"
)
_STANDING = re.compile(r"(?<![\w'-])([A-HJ-Z])(?![\w'-])")  # not "I", which is a pronoun
# A letter that another one follows: "A or B", "(A) and (B)", "A. B. C."; "D. Both of them" is one.
_LISTED = re.compile(
    r"([A-Z])[)\]]?[.:,;]? ?"
    r"(?:(?:or|and|[/&+]) ?[(\[]?([A-HJ-Z])(?![\w'-])|[(\[]?([A-HJ-Z])(?=[)\].:,;]|$))"
)
_WORD = re.compile(r"[AI] [a-z]")  # the article, the pronoun


def parse_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """Letter of the chosen option: "B", "(b)", "B. red circle", "**Answer: B**", "because B", or an
    option's own text. None when no letter, or more than one, is meant.

    With `options`, letters beyond the last one are no answers. Without, A to Z are, where the
    letter stands alone, leads or is announced; anywhere else in a sentence A to H.
    """
    text = " ".join(text.translate(_MARKUP).split())
    valid = ascii_uppercase[: len(options) or 26]
    if match := _ALONE.fullmatch(text):
        letter = match[1].upper()
        return letter if letter in valid else None
    named = dict(zip(map(_plain, options), valid, strict=False))
    if letter := named.get(_plain(text)):
        return letter
    # "A red circle" is option A if that is what option A says; otherwise "A" is an article.
    if text[1:2] == " " and named.get(_plain(text[2:])) == text[0]:
        return text[0]
    if match := _LEADING.match(text):
        return match[1] if match[1] in valid and not _lists(text, match.start(1)) else None
    for pattern in (_ANNOUNCED, _STANDING):
        found = list(pattern.finditer(text))
        if any(_lists(text, m.start(1)) for m in found):
            return None
        letters = {m[1] for m in found if not _WORD.match(text, m.start(1))}
        if letters:
            letter = letters.pop()
            known = valid if options or pattern is _ANNOUNCED else valid[:8]
            return letter if not letters and letter in known else None
    return None


def _lists(text: str, at: int) -> bool:
    """Whether the letter there is followed by another one, as in a list of them."""
    match = _LISTED.match(text, at)
    return match is not None and match[1] != (match[2] or match[3])


def parse_label(text: str) -> str | None:
    """The label in lower case, single spaces, without markup, quotes and a final full stop."""
    return _plain(" ".join(text.translate(_MARKUP).split()).strip("\"'")) or None


def _plain(text: str) -> str:
    return text.strip(" .").lower()
