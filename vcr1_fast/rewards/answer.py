"""Readers of answers: spans of seconds, lists of spans or boxes, the letter of an option.

Every parser returns None for text that has no single reading. All of them take linear time, accept
ASCII digits (and their full-width forms) only, reject numbers that are not finite, and never
evaluate the text.
"""

# ruff: noqa: RUF001, SIM905 - tables of words, with signs of other scripts on purpose.

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

from vcr1_fast.rewards.text import SPACELESS, fold_width, without_emphasis

Span = tuple[float, float]
Box = tuple[float, float, float, float]

MAX_SPANS = 16
"""Most spans in one evidence list; NExT-GQA's annotations have at most 16."""

# Spans -------------------------------------------------------------------------------------------
#
# The text becomes quantities ("1 min 5 s"), separators ("to") and other words. Quantities joined
# by separators are a chain; the answer is the one chain of two that is a time.

_DECIMAL = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d\d(?:\.\d*)?)", re.ASCII)
_SUBTITLE_CLOCK = re.compile(r"\d+:\d\d:\d\d,\d{3}", re.ASCII)  # 00:01:05,500 of SubRip files
_LONGEST_NUMBER = 32

_UNITS: dict[str, tuple[str, ...]] = {
    # unit -> how it is written
    "h": ("h", "hr", "hrs", "hour", "hours", "小时", "小時", "時間", "시간"),
    "min": ("m", "min", "mins", "minute", "minutes", "′", "分", "分钟", "分鐘", "분"),
    "s": ("s", "sec", "secs", "second", "seconds", "″", "秒", "秒钟", "秒鐘", "초", "сек"),
    "ms": ("ms", "msec", "msecs", "millisecond", "milliseconds", "毫秒"),
    # No seconds: the frame rate and the length that they refer to are not in the answer.
    "frame": ("frame", "frames", "fr", "帧", "幀", "フレーム", "프레임"),
    "%": ("%", "percent", "per cent", "pct", "パーセント", "퍼센트"),
}
_UNIT = {name: unit for unit, names in _UNITS.items() for name in names}
_SECONDS = {"h": 3600.0, "min": 60.0, "s": 1.0}  # ms are divided
_ORDER = ("h", "min", "s", "ms")
_BELOW = {"min": 60, "s": 60, "ms": 1000}  # "1 min 75 s" is no time, as 1:75 is none

_SEPARATORS = frozenset(
    "to and up until till through thru → ~ 〜 至 到 から 부터 에서 bis à hasta до".split()
)
# May stand between a separator and its number: "to about 5", "to t = 5", "and ends at 5".
_FILLERS = frozenset(
    """
    about approximately approx around roughly the at t time timestamp = + ≈ ~ : mark
    end ends ending finishes stops 第
    """.split()
)
# Words after a span in a sentence. Any other word is what the numbers count: "3 to 5 apples".
_MAY_FOLLOW = frozenset(
    """
    a about after all also an and approximately are around as at because before both but by during
    for from he here i if in inclusive instead into is it mark my not of on only or out over overall
    rather respectively roughly she since so than that the their then there these they this those to
    total until was we were when where which while who with within you
    """.split()
)
_CLASSIFIERS = frozenset("个個人次只隻辆輛名岁歲年月日号號点點条條张張回本匹台歳")
# Words before a pair of numbers that say it is no time.
_NOT_TIME_BEFORE = frozenset(
    """
    year years page pages chapter chapters step steps episode age aged ages score line lines room
    level figure # $ € £ ¥
    """.split()
)
_NEGATIONS = frozenset(
    """
    not never without except excluding outside unlike rather instead isn't wasn't doesn't didn't
    cannot can't 不 非 没 nicht не
    """.split()
)
_DENIED_AFTER = re.compile(
    r"\s*(?:(?:is|was|are|seems|would be)\s*(?:n['’]t\b|not\b)|"
    r"(?:is|was|are|seems)?\s*:?\s*(?:wrong|incorrect|false)\b|(?:是)?(?:不对|不正确|错))",
    re.IGNORECASE,
)

_JOINED_UNITS = sorted((u for u in _UNIT if not u.isascii()), key=len, reverse=True)
_JOINED_SEPARATORS = sorted((s for s in _SEPARATORS if not s.isascii()), key=len, reverse=True)
_TOKEN = re.compile(
    r"(?P<number>\.?\d+(?:[.,:]\d+)*\.?(?:[eE][+-]?\d+)?)"
    rf"|(?P<unit>%|{'|'.join(_JOINED_UNITS)})"
    rf"|(?P<separator>--?>|=>|~|{'|'.join(_JOINED_SEPARATORS)})"
    r"|(?P<word>[A-Za-z\u00c0-\u024f\u0400-\u04ff]+(?:['’][A-Za-z]+)*)"
    r"|(?P<dash>[-\u2010-\u2015\u2212])|(?P<other>\S)",
    re.ASCII,
)
_PLAIN_SPAN = re.compile(
    r"\s*(\d{1,9}(?:\.\d{1,9})?) ?s?(?: to |-)(\d{1,9}(?:\.\d{1,9})?) ?(?:s|seconds)?\.?\s*",
    re.ASCII,
)
_TIME = r"\d[\d:.,]{0,31}(?: ?[a-z]{1,12})?"
_PAIRS = (
    # Forms without a separator word, as a whole answer only.
    re.compile(rf"\s*[\[(]\s*({_TIME})\s*[,;]\s*({_TIME})\s*[\])]\.?\s*", re.ASCII),
    re.compile(
        rf"[\s{{\"']*start(?:s|ing|ed)?(?: time)?(?: at| is)?[\"':=\s]{{1,4}}({_TIME})"
        rf"[\s,;]{{0,3}}(?:and )?[\"']?end(?:s|ing|ed)?(?: time)?(?: at| is)?[\"':=\s]{{1,4}}"
        rf"({_TIME})[\s}}.]*",
        re.ASCII | re.IGNORECASE,
    ),
)


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
    value = 3600.0 * hours + 60.0 * minutes + rest
    return value if math.isfinite(value) else None


@dataclass
class _Quantity:
    """A number with its unit, or several of descending units: "1 min 5 s"."""

    parts: list[tuple[float, str]] = field(default_factory=list)  # (value, unit or "")
    is_clock: bool = False
    is_readable: bool = True

    @property
    def unit(self) -> str:
        return self.parts[-1][1]

    def extend(self, other: "_Quantity") -> bool:
        """Append a quantity of a smaller unit. False where it is none."""
        known = (
            self.unit in _ORDER and other.unit in _ORDER and not (self.is_clock or other.is_clock)
        )
        if not known or len(other.parts) != 1:
            return False
        if _ORDER.index(other.unit) <= _ORDER.index(self.unit):
            return False
        self.parts += other.parts
        self.is_readable &= other.is_readable
        return True

    def in_seconds(self, unit: str = "s") -> float | None:
        """The time, `unit` being that of a bare number."""
        if not self.is_readable:
            return None
        if self.is_clock:
            # "1:05 min" is a clock reading; hours or frames of one are not.
            return self.parts[0][0] if self.unit in ("", "s", "min") else None
        total = 0.0
        for index, (value, own) in enumerate(self.parts):
            if (own or unit) not in _ORDER:
                return None
            if index and value >= _BELOW[own]:
                return None
            if index < len(self.parts) - 1 and value != int(value):
                return None
            # A division: 3500 ms are 3.5 s exactly.
            total += value / 1000 if (own or unit) == "ms" else value * _SECONDS[own or unit]
        return total if math.isfinite(total) else None


@dataclass
class _Chain:
    quantities: list[_Quantity]
    is_denied: bool  # a negation stands before it
    is_other: bool  # what stands before it says that it is no time
    end: int = 0


def parse_span(text: str) -> Span | None:
    """(start, end) in seconds from the one "S to E" in the text.

    Times are seconds, clock readings (`1:05.5`, `1:02:03`) or carry units: h, min, s, ms and
    their names, in Chinese, Japanese and Korean too; a unit after the second number alone holds for
    both. Separators: to, and, until, till, through, any dash, ~, arrows, 到, 至; words around the
    span are ignored. `[S, E]` and `start: S, end: E` are spans as whole answers.

    None if there is no span, several different ones, a chain ("5 to 10 to 20"), a denied one
    ("not 3 to 5"), a number that cannot be read ("1,5", "1/2", "1e999"), numbers that count
    something else ("3 to 5 apples", "20 to 50 %", "frames 3 to 5"), or an end before the start.
    """
    if match := _PLAIN_SPAN.fullmatch(text):
        start, end = float(match[1]), float(match[2])
        return (start, end) if start <= end else None
    text = without_emphasis(fold_width(text))
    for pair in _PAIRS:
        if match := pair.fullmatch(text):
            text = " to ".join(time.rstrip(".,:") for time in match.groups())
    found = set()
    for chain in _chains(text):
        if len(chain.quantities) < 2 or chain.is_denied or chain.is_other:
            continue
        if _DENIED_AFTER.match(text, chain.end):
            continue
        found.add(_span(chain.quantities))
    return found.pop() if len(found) == 1 else None


def _span(quantities: Sequence[_Quantity]) -> Span | None:
    if len(quantities) != 2:
        return None
    first, last = quantities
    is_bare = [not q.unit and not q.is_clock for q in quantities]
    unit = "s"
    if is_bare[0] and not is_bare[1] and not last.is_clock:
        # "1.5 to 2 minutes": one unit for both. Of "1 to 1 min 20 s" the first could be either.
        is_zero = first.parts[0][0] == 0
        unit = last.unit if len(last.parts) == 1 else "s" if is_zero else ""
    elif is_bare[1] and not is_bare[0] and not first.is_clock:
        unit = "s" if first.unit == "s" and len(first.parts) == 1 else ""
    start, end = first.in_seconds(unit), last.in_seconds(unit)
    if start is None or end is None or end < start:
        return None
    if is_bare[0] and last.is_clock and 0 < 60 * start <= end:
        return None  # "1 to 1:30" may start at 0:01 or at 1:00
    return start, end


def _chains(text: str) -> list[_Chain]:
    """Every run of quantities that separators join, single ones included."""
    chains: list[_Chain] = []
    state, is_negative, previous_end = "text", False, -1  # state: text, number, separator
    recent: list[str] = []  # words since the last punctuation, number or chain
    prefix = ""  # a unit that stands before its number: "frame 35"
    tokens = list(_TOKEN.finditer(text))
    index = 0
    while index < len(tokens):
        token = tokens[index]
        kind, value = token.lastgroup, token.group().lower()
        if kind == "number":
            quantity, index = _quantity(text, tokens, index)
            if prefix and not quantity.unit:
                quantity.parts[-1] = (quantity.parts[-1][0], prefix)
            elif prefix and prefix != quantity.unit:
                quantity.is_readable = False
            if is_negative and previous_end == token.start():
                quantity.parts[0] = (-quantity.parts[0][0], quantity.parts[0][1])
            previous_end = tokens[index - 1].end()
            if state == "separator":
                chains[-1].quantities.append(quantity)
            elif state == "number":
                # "1 min 30 to 2 min", "3 5 to 8": two numbers with nothing between them.
                chains[-1].quantities[-1].is_readable = quantity.is_readable = False
                chains.append(_Chain([quantity], chains[-1].is_denied, chains[-1].is_other))
            else:
                is_denied = not _NEGATIONS.isdisjoint(recent)
                is_other = bool(recent) and recent[-1] in _NOT_TIME_BEFORE
                chains.append(_Chain([quantity], is_denied, is_other))
            chains[-1].end = previous_end
            _mark_counted(text, tokens, index, chains[-1])
            state, is_negative, prefix, recent = "number", False, "", []
            continue
        if state == "number" and (kind in ("dash", "separator") or value in _SEPARATORS):
            state = "separator"
        elif kind == "dash":
            is_negative = True
        elif value in _UNIT and value != "%" and state != "number":
            prefix = _UNIT[value]
        elif value in _FILLERS and state != "number":
            is_negative = False
        elif state == "separator" and value == "to":  # "up to"
            pass
        else:
            state, is_negative, prefix = "text", False, ""
            recent = [] if value in ",.;:!?" else [*recent[-5:], value]
        previous_end = token.end()
        index += 1
    return chains


def _quantity(text: str, tokens: Sequence[re.Match[str]], index: int) -> tuple[_Quantity, int]:
    """The quantity whose number is tokens[index], and the index after it."""
    quantity, index = _part(text, tokens, index)
    while index < len(tokens) and quantity.unit in ("h", "min", "s"):
        # "1 minute and 5 seconds" is one time, "between 1 minute and 5 minutes" two.
        skip = index + (tokens[index].group().lower() == "and")
        if skip >= len(tokens) or tokens[skip].lastgroup != "number":
            break
        following, after = _part(text, tokens, skip)
        if not quantity.extend(following):
            break
        index = after
    return quantity, index


def _part(text: str, tokens: Sequence[re.Match[str]], index: int) -> tuple[_Quantity, int]:
    """One number with the unit after it."""
    token = tokens[index]
    written = token.group()
    if _SUBTITLE_CLOCK.fullmatch(written):
        written = written.replace(",", ".")
    value = seconds(written.rstrip(".") if ":" in written else written)
    unit = ""
    index += 1
    if index < len(tokens) and (unit := _UNIT.get(tokens[index].group().lower(), "")):
        index += 1
        # The full stop of an abbreviation: "3 sec. to 5 sec."
        if index + 1 < len(tokens) and tokens[index].group() == "." and unit != "%":
            index += 1
    is_glued = _is_glued(text, token.start() - 1, -1) or (
        not unit and _is_glued(text, token.end(), 1)
    )
    readable = value is not None and not is_glued
    return _Quantity([(value or 0.0, unit)], ":" in written, readable), index


_GLUE = frozenset("_/\\^*×÷|")


def _is_glued(text: str, at: int, step: int) -> bool:
    """Whether the character beside a number makes it part of something else: 3_5, 1/2, 0x3."""
    character = text[at : at + 1] if at >= 0 else ""
    if character in _GLUE:
        return bool(character)
    if character.isnumeric() and not character.isascii():
        return unicodedata.category(character).startswith("N")
    if not (character.isascii() and character.isalpha()):
        return False
    end = at
    while (
        0 <= end < len(text) and text[end].isascii() and text[end].isalpha() and abs(end - at) < 16
    ):
        end += step
    word = text[end + 1 : at + 1] if step < 0 else text[at:end]
    return word.lower() not in _UNIT and word.lower() not in _SEPARATORS


def _mark_counted(text: str, tokens: Sequence[re.Match[str]], index: int, chain: _Chain) -> None:
    """Mark a chain whose last number counts what follows it: "3 to 5 apples", "3到5个人"."""
    if index >= len(tokens) or chain.quantities[-1].unit:
        return
    token = tokens[index]
    word = token.group().lower()
    is_near = text[token.start() - 1 : token.start()] not in ("\n", "\r")
    if token.lastgroup == "word" and is_near and word not in _SEPARATORS:
        chain.is_other |= word not in _MAY_FOLLOW and word not in _UNIT
    chain.is_other |= word in _CLASSIFIERS


# Lists of spans and boxes ------------------------------------------------------------------------

# Two runs of the same characters never meet ("\d+\.?\d*", "\s*,?\s*"): where the rest fails, such a
# pair is tried at every place that could divide it, in quadratic time.
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_SIGNED = re.compile(_NUMBER, re.ASCII)


def _rows(length: int) -> re.Pattern[str]:
    numbers = r"\s*,\s*".join([_NUMBER] * length)
    row = rf"(?:\[\s*{numbers}(?:\s*,)?\s*\]|\(\s*{numbers}(?:\s*,)?\s*\))"
    return re.compile(rf"\s*\[\s*{row}(?:\s*,\s*{row})*(?:\s*,)?\s*\]\s*", re.ASCII)


_SPAN_ROWS, _BOX_ROWS = _rows(2), _rows(4)


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

# Letters -----------------------------------------------------------------------------------------
#
# A letter of an answer is a mention. Each mention gets a verdict from the words beside it, by the
# first rule of `_RULES` that fits; then the answer is the one letter with the strongest verdict.
# Where verdicts contradict each other the answer is unreadable: a wrong reading trains the model
# to be wrong, an unreadable one only costs a reward and is counted.

REJECTED, DOUBTFUL, TENTATIVE, PLAIN, CHOSEN = (
    "rejected",
    "doubtful",
    "tentative",
    "plain",
    "chosen",
)

MAX_MENTIONS = 64
"""Most letters in one answer; a longer answer has no single reading."""

_CONTEXT = 80  # characters read on each side of a mention: bounds the time of every rule
_LATIN = r"A-Za-z0-9\u00c0-\u024f"

# "is it ... B" with up to six of these words between the cue and the letter.
_FILL = (
    r"(?:(?:the|an?|be|been|being|option|choice|answer|letter|is|it|its|it's|to|for|as|either|both|"
    r"any of|simply|necessarily|really|actually|correct|right|best|choose|choosing|chosen|pick|"
    r"picking|select|selecting|say|go|going|with|think|believe|that|of|by|on|was|have)\s+){0,6}"
)
_SURE = (
    r"(?:(?:also|both|all|clearly|obviously|definitely|simply|just|partly|therefore|thus|certainly|"
    r"probably|likely|most likely|completely|totally|quite|very|surely|indeed|then|still|a|the|"
    r"option|choice|letter)\s+){0,4}"
)
_OPEN = r"[(\[\"'“‘{「『<]*\s*$"
_CLOSE = r"^[)\]}\"'”’」』>.,:]*[^\S\n]*"
_BE = (
    r"(?:must be|has to be|have to be|would be|should be|can be|is|are|was|were|'s|’s|seems?(?: to "
    r"be)?|looks?|appears?(?: to be)?|sounds?|remains|being)"
)
_RIGHT = r"(?:right(?!-)|correct|true|accurate|supported|valid|best|better)\b"
_WRONG = (
    r"(?:wrong|incorrect|false|absent|impossible|unlikely|invalid|eliminated|excluded|rejected|"
    r"discarded|ruled out|out\b|inaccurate|unsupported|(?:a )?distractors?|contradict\w*|mistaken|"
    r"irrelevant|missing|worse|worst|less|least|avoided|dismissed|ignored|crossed out)"
)

_RULES: tuple[tuple[str, str, str, str], ...] = (
    # (verdict, side of the letter, pattern, reason)
    (PLAIN, "after", rf"{_CLOSE}(?:{_BE}\s+|can)not\s+(?:be\s+)?{_WRONG}", "double negation"),
    (PLAIN, "after", rf"{_CLOSE}isn[’']t {_WRONG}", "double negation"),
    (CHOSEN, "before", rf"\bnone other than\s+{_FILL}{_OPEN}", "an idiom, not a negation"),
    (
        DOUBTFUL,
        "before",
        rf"\b(?:if|whether|unless|suppose|assuming|imagine|had|were)\b[^.,;!?\n]{{0,40}}?{_OPEN}",
        "a condition asserts nothing",
    ),
    (
        DOUBTFUL,
        "after",
        rf"{_CLOSE}(?:(?:only )?if|unless|provided|"
        r"would (?:be|have been)\b[^.;!?\n]{0,40}\bif)\b",
        "a condition asserts nothing",
    ),
    (
        DOUBTFUL,
        "before",
        rf"\b(?:which(?: one)? is|what about|how about|why not|could it be)\s+{_OPEN}",
        "a question",
    ),
    (DOUBTFUL, "before", rf"\bwould have been\s+{_OPEN}", "said of what did not happen"),
    (DOUBTFUL, "before", rf"\bno\s+{_OPEN}", '"A, no B" corrects or negates'),
    (DOUBTFUL, "before", r"\bquestion[^.;!?\n]{0,20}$", "names a question, not an option"),
    (
        TENTATIVE,
        "before",
        rf"(?:\bnot|n[’']t)\s+(?:sure|certain|convinced)\b[^.;!?\n]{{0,30}}?{_OPEN}",
        "unsure",
    ),
    (
        REJECTED,
        "before",
        r"(?:\bnot|n[’']t|\bcannot|\bnever|\bneither|\bnor|\brather than|\binstead of|\bover|"
        r"\bthan|"
        r"\bexcept(?: for)?|\bexcluding|\bwithout|\bunlike|\bhardly|\brul(?:e|es|ed|ing) out|"
        r"\beliminat(?:e|es|ed|ing)|\breject(?:s|ed|ing)?|\bdiscard(?:s|ed|ing)?|\bexclud(?:e|es|ed)|"
        r"\bdismiss(?:es|ed|ing)?|\bignor(?:e|es|ed|ing)|\bavoid(?:s|ed|ing)?|\bdisagree with|"
        r"\b(?:cross|strike)(?:es|ed|ing)? out|\bnone of|\b(?:less|least) likely|"
        r"\bagainst|\b(?:all|anything|everything) but|"
        r"(?<!no )(?<!without )\bdoubt(?: that| if)?|\bunlikely|\bimpossible|\bimprobable|"
        r"(?<!is )(?<!are )(?<!was )(?<!were )\b(?:wrong|incorrect|false)"
        r"(?: answer| option| choice)?s?(?:\s*(?:is|are|was))?)\s*:?\s+"
        rf"{_FILL}{_OPEN}",
        "negated, set aside or compared against",
    ),
    (
        REJECTED,
        "before",
        r"(?:不是|不选(?:择)?|不应(?:该|当)?(?:是|选|为)?|不该选|并非|而非|而不是|非|排除(?:了)?|除了?|不可能是|"
        r"不能选|不会是|没有?选|别选|不为|错误?(?:的)?(?:答案|选项)?(?:是|为|:)?|選ばない)\s*"
        rf"(?:选项|答案|选|選項)?\s*{_OPEN}",
        "negated, in Chinese",
    ),
    (
        REJECTED,
        "before",
        r"(?:\b(?:no|non) (?:es|era|è|é|puede ser)|\bnão é|\bnicht|\bkeine?|\bpas|(?<!\w)не)\s+"
        rf"(?:(?:la|el|le|der|die|das|opci[oó]n|option|вариант|ответ)\s+){{0,2}}{_OPEN}",
        "negated, in Spanish, Italian, Portuguese, German, French, Russian",
    ),
    (
        REJECTED,
        "after",
        rf"{_CLOSE}(?:[-–—(]+\s*)?(?:{_BE}\s+)?{_SURE}{_WRONG}(?!\s*:)",
        "said to be wrong",
    ),
    (
        REJECTED,
        "after",
        rf"{_CLOSE}(?:[-–—(]+\s*)?not (?:[a-z]+ )?(?:{_RIGHT}|possible|shown|seen|present|visible|"
        r"mentioned|depicted|described|the answer|a match)",
        "said not to be right",
    ),
    (
        REJECTED,
        "after",
        rf"{_CLOSE}(?:(?:is|are|was|were|does|do|did|has|have|can|could|would|will|should|might|may)"
        r"(?:\s+\w+ly)?(?:n[’']t|\s+not|\s+no)\b|cannot\b|can[’']t\b|won[’']t\b)(?! only)",
        "negated by its verb",
    ),
    (
        REJECTED,
        "after",
        rf"{_CLOSE}(?:fails|lacks|contradicts|conflicts|misses|mismatches|ignores|never)\b",
        "a verb that says it does not fit",
    ),
    (
        REJECTED,
        "after",
        r"^[)\]」』”\"’':。]*\s*(?:选项|選項|项)?(?:是|为|显然|明显|肯定|都|也|并|完全)*(?:错|錯|有误|"
        r"不(?:太|完全|是很)?(?:对|對|正确|正確|符|成立|可能|合|应|是(?!\s*[(「]?$))|被排除|可以?排除)",
        "said to be wrong, in Chinese",
    ),
    (
        REJECTED,
        "after",
        r"^[)\]」』]*\s*(?:(?:では|じゃ)(?:ない|なく|ありません)|[はが](?:間違|誤|違|正しくな|不正解)|"
        r"(?:가|이|은|는)?\s*(?:아니|아닙|아닌|틀))",
        "said to be wrong, in Japanese, Korean",
    ),
    (REJECTED, "after", r"^[)\].:]*\s*[✗✘❌×]", "crossed out"),
    (
        REJECTED,
        "after",
        r"^[)\]]*(?:\?\s*(?:no|nope)\b|[.:]\s*(?:no|false)\s*(?:[.,;!\n]|$))",
        "asked and answered with no",
    ),
    (
        DOUBTFUL,
        "after",
        rf"\b(?:it|that|this|which|one)(?:[’']s|\s+(?:is|was|seems))\s+{_SURE}"
        rf"(?:not\s+(?:[a-z]+ )?(?:{_RIGHT}|possible)|{_WRONG})",
        'taken back: "B, but that is wrong"',
    ),
    (
        TENTATIVE,
        "before",
        r"\b(?:maybe|perhaps|possibly|might|could|may|first|initially|originally|tempt\w*|"
        rf"thought|considered|considering|seems like|looks like)\b[^.,;!?\n]{{0,30}}?{_OPEN}",
        "a first or unsure thought",
    ),
    (
        TENTATIVE,
        "after",
        rf"{_CLOSE}(?:could|might|may|(?:{_BE}\s+)?{_SURE}(?:plausible|possible|tempting|close))\b",
        "possible, not chosen",
    ),
    (
        TENTATIVE,
        "after",
        r"^[^.,;!?\n]{0,30}\b(?:at first|initially|first thought)\b",
        "a first thought",
    ),
    (
        CHOSEN,
        "after",
        r"^[)\]]*(?:\?\s*yes\b|[.:]\s*(?:yes|true)\s*(?:[.,;!\n]|$))",
        "asked and answered with yes",
    ),
    (CHOSEN, "after", r"^[)\].:]*\s*[✓✔✅☑]", "ticked"),
    (
        CHOSEN,
        "before",
        r"\banswers?\b[\"']?(?:\s+(?:letter|option|choice|here|must|should|would|will|can only|be|"
        r"is|was|are|the|thus|therefore|clearly|definitely|most likely|likely|probably|only|simply|"
        rf"indeed|still|again|to the question)){{0,6}}\s*[:=,\-–—]*\s*{_OPEN}",
        "announced as the answer",
    ),
    (
        CHOSEN,
        "before",
        r"\b(?:option|choice|verdict|conclusion|selection|solution)(?: letter)?\s*"
        r"(?:(?:is|would be|must be|should be|was)(?:\s+(?:option|letter|clearly|definitely)){0,2}"
        rf"|[:=])\s*{_OPEN}",
        "announced as the choice",
    ),
    (
        CHOSEN,
        "before",
        rf"\b(?:correct|right|best|final|true)\s+(?:one|option|choice|letter)\s*(?:is|:)?\s*{_OPEN}",
        "announced as the right one",
    ),
    (
        CHOSEN,
        "before",
        r"\b(?:choos(?:e|es|ing)|chose|chosen|pick(?:s|ed|ing)?|select(?:s|ed|ing)?|"
        r"go(?:es|ing)? (?:with|for)|went with|opt(?:s|ed|ing)? for|settle on|vote for|stick with|"
        r"conclude|submit)\s+(?:(?:that|it|is|option|choice|letter|answer|the|with|on|for)\s+){0,4}"
        rf"{_OPEN}",
        "chosen by a verb",
    ),
    (CHOSEN, "before", rf"\b(?:so|therefore|thus|hence)[,:]?\s*{_OPEN}", "concluded"),
    (
        CHOSEN,
        "before",
        rf"\b(?:it|this|that)(?:[’']s|\s+(?:is|must be|should be|has to be))\s+{_SURE}{_OPEN}",
        '"it is B"',
    ),
    (
        CHOSEN,
        "before",
        r"(?:选择?|選択?|答案(?:应该|应当|应)?(?:是|为|选)?|应(?:该|当)?(?:是|为|选)|正确(?:的)?(?:答案|选项)?"
        r"(?:应该|应)?(?:是|为)?|正确(?:答案|选项)|答え?は|正解は|正答は|정답은?|답은?)\s*[:是为は]*\s*"
        rf"(?:选项|選項|選択肢)?\s*{_OPEN}",
        "chosen or announced, in Chinese, Japanese, Korean",
    ),
    (
        CHOSEN,
        "before",
        r"\b(?:respuesta|r[ée]ponse|antwort|risposta|resposta|ответ)(?:\s+\w+)?(?:\s+(?:es|est|ist|è|é))?"
        rf"\s*[:\-–—]?\s*(?:(?:la|le|die|l[’'])\s*)?{_OPEN}",
        "announced, in Spanish, French, German, Italian, Portuguese, Russian",
    ),
    (
        CHOSEN,
        "after",
        rf"{_CLOSE}(?:(?:{_BE}\s+)?{_SURE}{_RIGHT}(?!\s*:)|it (?:is|must be)\b|{_BE}\s+{_SURE}"
        r"(?:my (?:answer|choice|pick|final)|(?:only |most |single )*(?:answer|match|one)\b))",
        "said to be right",
    ),
    (
        CHOSEN,
        "after",
        rf"{_CLOSE}(?:fits|matches|wins|holds|works|agrees|applies)\b",
        "said to fit",
    ),
    (
        CHOSEN,
        "after",
        r"^[)\]」』”\"’']*\s*(?:选项|選項|项)?(?:是|为|才是|最|完全|显然)*(?:正确|正確|对的|答案|符合|合适|成立)",
        "said to be right, in Chinese",
    ),
    (
        CHOSEN,
        "after",
        r"^[)\]」』]*\s*(?:です|だ|が正し|が正解|が答え|입니다|이다|[가이] (?:정답|맞))",
        "said to be right, in Japanese, Korean",
    ),
)
_COMPILED_RULES = [(verdict, side, re.compile(p)) for verdict, side, p, _ in _RULES]

_CAPITAL = re.compile(
    rf"(?<![{_LATIN}_\-°#@&])(?<![A-Za-z][.'’])[A-Z](?![{_LATIN}_&])(?![+#](?![A-Z]))(?!-\w)"
    r"(?!['’](?!s )[A-Za-z])"
    rf"(?!\.[A-Z](?![{_LATIN}]))"
)
# A small letter is a mention where it stands in brackets or is announced.
_SMALL_LETTER = re.compile(
    rf"(?m:^)([a-z])[).:](?=\s)|(?<![{_LATIN}])(?:[(\[]([a-z])[)\]]|"
    r"(?:(?i:answer|option|choice)(?i: is| would be)?[ :\"'(\[]+|(?:选|答案)(?:是|为)?[ :(]*)"
    rf"([b-hj-z]|a(?=[\"')\]]*(?:$|[.,;!\n])))(?![{_LATIN}'’\-]))"
)
_OPTION = re.compile(r"(?i:option|choice|letter|选项|選項)[: ]*$")
_LABEL = re.compile(r"(?i:option|choice|answer|letter|选项|選項)(?: is)?[: ]*[(\[\"']*$")
# Words that may follow a letter and never follow the article: "A because", "A is".
_AFTER_A = re.compile(
    r"\s(?:is|was|isn[’']t|wasn[’']t|does|doesn[’']t|did|has|would|could|should|cannot|"
    r"can[’']t|must|are|were|both|versus|vs|against|[B-Z]|only|alone|happens|occurs|comes|means|contains|to|through|und|oder|et|ou|y|o|"
    r"because|since|as|for|not|over|rather|instead|and|or|nor|but|seems|appears|looks|matches|fits|"
    r"describes|shows|says|contradicts|fails|lacks|than|due|from|in|also|with|if|though|although)\b"
)
_ENDS_LETTER = re.compile(
    rf"[)\]}}\"'”’]*\s*(?:$|[.,:;!?/=)\]}}>|\n(–—…&+。、✓✔✅☑✗✘❌×-]|[{SPACELESS}]|"
    r"[\uac00-\ud7af]|['’]s )"
)
# Words before a letter that make it part of a name: "type A", "person B".
_NAMED = re.compile(
    r"(?i:\b(?:plan|type|vitamin|team|point|group|class|grade|section|figure|hepatitis|person|player|"
    r"man|woman|car|box|room|step|camera|appendix|mr|mrs|ms|dr))\.? [\"']?$"
)
# What joins letters into a list: "A or B", "(A), (B)", "A, B and C".
_JOIN = re.compile(
    r"[)\]\"']*\s*(?:(?P<either>/|,? ?(?:or|nor|and/or|versus|vs\.?|as well as)|或者?|"
    r"还是|または|oder|ou|o)|"
    r"(?P<both>,? ?and|&|\+|、|和|与|及|と|und|et|y)|(?P<comma>,)|)\s*"
    r"(?:(?:either |both |options? |choices? |letters? |maybe |perhaps ){0,2})[(\[\"']*"
)
# Letters and punctuation alone up to the end: the second letter of "Answer: A. B."
_BARE = re.compile(r"[\s.,;!?)(\]\['\"]*(?:[A-Z][\s.,;:!?)(\]\['\"]*)+")
# A list does not reach over a new clause: "A, B is wrong", "A. B shows a dog".
_NEW_CLAUSE = re.compile(
    r"[)\]\"']*\s*(?:is|was|['’]s|isn[’']t|wasn[’']t|does|doesn[’']t|has|seems|shows|says|looks|"
    r"matches|fits|describes|appears|cannot|can[’']t|contradicts|fails|lacks|would|could)\b|"
    r"[)\]]*(?:选项)?(?:是|错|不|有误|显)"
)
# Only what stands after the last of these counts: "B... no, C".
_CORRECTION = re.compile(
    r"(?:[.,;!?…(\n\-–—]\s*(?:but |oh |well )?(?:no[,.!:;…–—]|no wait|nope\b|wait\b|sorry\b|"
    r"oops\b|correction\b|actually\b|i mean\b|scratch that\b|on second thoughts?\b|hmm+\b|"
    r"let me correct|make that\b|rather,|不对|等等|不[,，]|更正|いや)|\bor rather\b|"
    r"(?:\.\.\.|…|—|–)\s*no\b)"
)
_LEADS = re.compile(r"[)\]\"']*(?:[.,:;!)\]\n–—-]|\s+[-–—(]|$)")
_REASONED = re.compile(r"\s*(?:because|since|as(?! well)|for)\b")
_SAYS = re.compile(
    r"(?:so |thus,? |therefore,? )?(?:(?:the |my |correct |right |best |final )*"
    r"(?:answer|option|choice)"
    r"(?: is|:)+|答案[是为:]+)\s*"
)
_ALONE = re.compile(r"[(\[{\"'“‘]*([A-Za-z])[)\]}\"'”’]*[.:!,。]?")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]{0,80})\}")
_LATEX_BOX = re.compile(r"\\f?boxed\s*\{([^{}]{0,200})\}")
_LATEX_MATH = re.compile(r"\\[()\[\]]|\$")


@dataclass
class _Mention:
    letter: str
    start: int
    end: int  # after the letter, and after the option's own text where that follows
    quoted: bool = False


@dataclass
class _Group:
    mentions: list[_Mention]
    is_list: bool = False  # joined by more than commas

    @property
    def first(self) -> _Mention:
        return self.mentions[0]

    @property
    def last(self) -> _Mention:
        return self.mentions[-1]


def parse_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """Letter of the chosen option: "B", "(b)", "B. red circle", "**Answer: B**", "because B",
    "B, not A", "选B", \\boxed{B}, or an option's own text. None when no letter, or more than one,
    is meant: "A or B", "not B", the whole list of options, a letter beside another option's text.

    With `options`, letters beyond the last one are no answers. Without, A to Z are, where the
    letter stands alone, leads or is announced; anywhere else in a sentence A to H.
    """
    if match := _ALONE.fullmatch(text.strip()):
        return _valid(match[1].upper(), options)
    text = _prepared(text)
    if match := _ALONE.fullmatch(text):
        return _valid(match[1].upper(), options)
    letters = ascii_uppercase[: len(options)]
    texts = [_plain(_prepared(option)) for option in options[:26]]
    if (letter := _named(text, texts)) is not None:
        return letter
    if (says := _SAYS.match(text.lower())) and (letter := _named(text[says.end() :], texts)):
        return letter
    mentions = _mentions(text, dict(zip(letters, texts, strict=False)))
    if mentions is None:
        return None
    for match in reversed(list(_CORRECTION.finditer(text.lower()))):
        later = [m for m in mentions if m.start >= match.end()]
        if later:
            mentions = later
            break
    return _valid(_decide(text, mentions), options)


def _valid(letter: str | None, options: Sequence[str]) -> str | None:
    known = ascii_uppercase[: len(options)] if options else ascii_uppercase
    return letter if letter is not None and letter in known else None


def _named(text: str, texts: Sequence[str]) -> str | None:
    """The letter of the one option whose text this is."""
    plain = _plain(text)
    # "A red circle" is option A if that is what option A says; otherwise "A" is an article.
    if text[1:2] == " " and "A" <= text[0] <= "Z" and plain not in texts:
        index = ord(text[0]) - ord("A")
        if index < len(texts) and texts[index] and _plain(text[2:]) == texts[index]:
            return text[0]
    return ascii_uppercase[texts.index(plain)] if plain and texts.count(plain) == 1 else None


def _prepared(text: str) -> str:
    """The text in one form of each letter and sign, without markup; line breaks are kept."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if "\\" in text or "$" in text:
        text = _LATEX_BOX.sub(r"\nanswer: \1\n", _LATEX_TEXT.sub(r"\1", text))
        text = _LATEX_MATH.sub("", text)
    lines = (" ".join(line.split()) for line in text.translate(_MARKUP).splitlines())
    return "\n".join(line for line in lines if line)


def _mentions(text: str, texts: Mapping[str, str]) -> list[_Mention] | None:
    """The letters that stand for options, in order. None for too many, or where a letter stands
    before the text of another option."""
    places = {m.start(): m[0] for m in _CAPITAL.finditer(text)}
    for match in _SMALL_LETTER.finditer(text):
        places[match.start(match.lastindex or 0)] = match[match.lastindex or 0].upper()
    mentions: list[_Mention] = []
    for at in sorted(places):
        if mentions and at < mentions[-1].end:  # inside an option's text
            continue
        letter, before = places[at], text[max(at - 24, 0) : at]
        labelled = _LABEL.search(before) is not None
        bracketed = before[-1:] in ("(", "[") and text[at + 1 : at + 2] in (")", "]")
        end, quoted = _after_quote(text, at + 1, letter, texts)
        if quoted is False:
            return None
        ended = _ENDS_LETTER.match(text, at + 1) is not None
        sure = bracketed or quoted or _OPTION.search(before) is not None
        if not sure and _is_word(text, at, letter, ended, labelled, bool(texts)):
            continue
        mentions.append(_Mention(letter, at, end, bool(quoted)))
        if len(mentions) > MAX_MENTIONS:
            return None
    return mentions


def _is_word(
    text: str, at: int, letter: str, ended: bool, labelled: bool, has_options: bool
) -> bool:
    """Whether the letter is an article, a pronoun or part of a name, and no option."""
    if letter == "A" and not (ended or _AFTER_A.match(text, at + 1)):
        return True
    leads = at == 0 and text[1:2] in (".", ")", ":")
    if letter == "I" and not (leads or (labelled and ended)):
        return True
    if labelled:
        return False
    named = _NAMED.search(text[max(at - 24, 0) : at]) is not None
    return named or (not has_options and letter > "H" and not (at == 0 and ended))


_TO_QUOTE = re.compile(r"(?P<close>[)\]}\"'”’]*(?:\s*[.,:;=–—-])?)\s*(?P<open>[(\"'“‘]?)")


def _after_quote(
    text: str, at: int, letter: str, texts: Mapping[str, str]
) -> tuple[int, bool | None]:
    """(end, whether the letter's own option text follows it). False: another option's does."""
    to_quote = _TO_QUOTE.match(text, at)
    if to_quote is None or not texts:
        return at, None
    start = to_quote.end()
    longest = max(map(len, texts.values()))
    rest = text[start : start + longest + 1].lower().replace("\n", " ")
    said = [
        (len(option), name == letter, name)
        for name, option in texts.items()
        if option and rest.startswith(option) and not rest[len(option) : len(option) + 1].isalnum()
    ]
    if not said:
        return at, None
    length, own, _ = max(said)
    if own:
        return start + length, True
    end = start + length
    whole = text[end : end + 1] in ("", ".", ",", ";", "\n", ")", '"', "'")
    separate = bool(to_quote["close"] or to_quote["open"])
    return at, False if whole and separate else None


def _decide(text: str, mentions: Sequence[_Mention]) -> str | None:
    """The one letter that the verdicts leave."""
    said: dict[str, set[str]] = {verdict: set() for verdict in (REJECTED, DOUBTFUL, CHOSEN)}
    said |= {PLAIN: set(), TENTATIVE: set()}
    groups = _groups(text, mentions)
    enumerated: set[str] = set()
    leading: set[str] = set()
    for index, group in enumerate(groups):
        before_from = groups[index - 1].last.end if index else 0
        after_to = groups[index + 1].first.start if index + 1 < len(groups) else len(text)
        before = text[max(before_from, group.first.start - _CONTEXT) : group.first.start].lower()
        after = text[group.last.end : min(after_to, group.last.end + _CONTEXT)].lower()
        verdict = _verdict(before, after)
        letters = [mention.letter for mention in group.mentions]
        if verdict != REJECTED:
            enumerated |= {m.letter for m in group.mentions if _is_label(text, m)}
        if verdict == PLAIN and len(letters) == 1 and _leads(text, group.first, index == 0):
            leading.add(letters[0])
        elif verdict == REJECTED and not group.is_list and _verdict(before, "") == REJECTED:
            # "instead of A, B": a comma alone does not carry a negation on.
            said[REJECTED].add(letters[0])
            said[_verdict("", after)].update(letters[1:])
        else:
            said[verdict].update(letters)
    # "A. red B. blue" lists the options; a label that leads alone is the answer.
    said[CHOSEN if len(enumerated | leading) == 1 else PLAIN] |= leading
    left = said[CHOSEN]
    if not left and not said[DOUBTFUL]:
        left = (said[PLAIN] or said[TENTATIVE]) - said[REJECTED]
    if len(left) != 1 or left & (said[REJECTED] | said[DOUBTFUL]):
        return None
    return next(iter(left))


def _is_label(text: str, mention: _Mention) -> bool:
    return mention.quoted or text[mention.start + 1 : mention.start + 2] in (".", ")", ":")


def _leads(text: str, mention: _Mention, first: bool) -> bool:
    """Whether the letter opens the answer like a label, fills a line of it, or ends a line after a
    colon: "B. because ...", "so\nB", "Correct: B"."""
    line = text.rfind("\n", 0, mention.start) + 1
    before = text[max(line, mention.start - _CONTEXT) : mention.start]
    after = text[mention.start + 1 : mention.start + _CONTEXT]
    alone = re.match(r"[)\]\"'.]*(?:\n|$)", after) is not None
    if alone and re.search(r"(?<!s):[ (\[\"']*$", before):
        return True
    if not re.fullmatch(r"(?i:option |choice )?[(\[\"']*", before):
        return False
    opens = first and line == 0
    return alone or (opens and bool(_LEADS.match(after) or _REASONED.match(after.lower())))


def _groups(text: str, mentions: Sequence[_Mention]) -> list[_Group]:
    """Mentions that share what is said before and after them: "A or B", "A, B and C"."""
    groups: list[_Group] = []
    for mention in mentions:
        group = groups[-1] if groups else None
        join = None
        if group is not None:
            between = text[group.last.end : mention.start].lower()
            join = _JOIN.fullmatch(between) if len(between) <= _CONTEXT else None
            if join is None and not group.is_list and _BARE.fullmatch(text, group.last.end):
                group.mentions.append(mention)  # "Answer: A. B. C."
                continue
        if group is None or join is None or (join["comma"] and group.is_list):
            groups.append(_Group([mention]))  # "not A or B, C": the list ends before C
            continue
        if not join["either"] and _NEW_CLAUSE.match(text[mention.end : mention.end + 16].lower()):
            groups.append(_Group([mention]))
            continue
        group.mentions.append(mention)
        group.is_list |= bool(join["either"] or join["both"])
    return groups


def _verdict(before: str, after: str) -> str:
    for verdict, side, pattern in _COMPILED_RULES:
        if pattern.search(before if side == "before" else after):
            return verdict
    return PLAIN


def parse_label(text: str) -> str | None:
    """The label in lower case, single spaces, without emphasis, quotes and a final full stop."""
    return _plain(" ".join(without_emphasis(text).split()).strip("\"'")) or None


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").lower()
