"""Answers in words and numbers: parsers, and scores that compare two texts.

The units of the scores are words. Scripts without spaces between words (Chinese, Japanese, Thai,
Lao, Khmer, Burmese, Tibetan) have their characters as units. Word error rate: edits over the
target's units, as jiwer counts them. ROUGE (Lin 2004): F1 of shared units, of shared pairs of
units, and of the longest common subsequence, as rouge-score counts them on ASCII text.

Every function takes time linear in the completion and raises on no text.
"""

# ruff: noqa: RUF001, RUF002, SIM905 - tables of words, with signs of other scripts on purpose.

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

_Unit = TypeVar("_Unit", bound=Hashable)

SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts without spaces between words, as the inside of a regex class."""

_HALF_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_MARKUP = re.compile(r"(?<![^\s\"'(])([*_`]{1,3})(?=\w)|(?<=[\w.!?:)])([*_`]{1,3})(?!\w)")

# Numbers -----------------------------------------------------------------------------------------

_DIGITS = re.compile(
    r"(?P<before>[^\d.+-]{0,24})(?P<value>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"(?:\s*/\s*(?P<divisor>\d+\.?\d*))?\s*(?P<percent>%|percent\b|per cent\b)?(?P<after>\D*)",
    re.ASCII,
)
_MINUS = re.compile("\u2212|^\u2013(?=\\.?[0-9])")  # the minus sign, an en dash for one
_COMMAS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_LONGEST_NUMBER = 64

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""".split()
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: i for i, word in enumerate(_ONES)} | {w: 10 * i for i, w in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SUFFIXES = {"k": 1000, "dozen": 12, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8}
_LEAD_IN = re.compile(
    r"(?:the answer is|answer:|there (?:is|are|was|were)|it is|it's|i (?:see|count)|"
    r"about|exactly|only|around|approximately)\s+"
)
# What makes the number words before it no count: alternatives, parts, "one of them".
_NO_COUNT = frozenset(
    """
    or of dozen half halves third thirds quarter quarters fourths fifth fifths tenth tenths
    percent per minus point
    """.split()
)
_COUNTED = re.compile(rf"\b(?:{'|'.join([*_SMALL, *_SCALES])})\b")

_NOT_THE_NUMBER = (
    # (where it stands, pattern, why the number beside it is not the answer)
    ("before", r"[A-Za-z_]$", "part of a name or a formula: H2O, x2"),
    ("before", r"(?:\bnot|n't|\bno|\bnever|不是|并非)\s*$", "negated"),
    (
        "before",
        r"(?:\b(?:more|less|fewer|greater|other|rather|larger|smaller) than|\bover|\bunder|\babove"
        r"|\bbelow|\bat least|\bat most|\bup to|\binstead of|\bexcept|[<>≤≥≠]=?|超过|不到|少于|多于"
        r"|大于|小于|至少|最多)\s*$",
        "a bound or an exception, not a value",
    ),
    ("before", r"零下\s*$", "below zero: the sign is in words"),
    ("after", r"^\s*(?:\+|or (?:more|less|fewer)\b|[a-z]* ?below zero)", "a bound, a sign"),
    ("after", r"^[*^_°]?[²³⁰-₟]", "an exponent or an index"),
    ("after", r"^(?:\s*[x×*^]\s*|_|')\S", "the beginning of a formula"),
)
_REFUSED = {
    side: re.compile("|".join(p for where, p, _ in _NOT_THE_NUMBER if where == side), re.IGNORECASE)
    for side in ("before", "after")
}
_NEGATIVE = re.compile(r"(?:\b(?:minus|negative)|负|負|マイナス)\s*$", re.IGNORECASE)
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|dozen|k\b|[百千万萬亿])", re.IGNORECASE)


def parse_number(text: str) -> float | None:
    """The one number of an answer: 12, -3.5, 1,200, 3/4, 40 % (0.4), $ 5, 7 people, twelve,
    minus 5, 3 million. None when there is none, more than one, one that is not finite, a bound
    ("at least 5"), a negation ("not 5"), or a form with two readings ("1.234,5", "0,500")."""
    text = _MINUS.sub("-", fold_width(text).strip())
    if len(text) > _LONGEST_NUMBER or _has_other_digits(text):
        return None
    text = _COMMAS.sub(lambda match: match[0].replace(",", ""), text)
    match = _DIGITS.fullmatch(text)
    if match is None:
        return None if re.search("[0-9]", text) else _number_in_words(text)
    before, after = match["before"], match["after"]
    if _REFUSED["before"].search(before) or _REFUSED["after"].search(after):
        return None
    scale = _SCALE.match(after)
    if _COUNTED.search(before.lower()) or _COUNTED.search(after[scale.end() if scale else 0 :]):
        return None
    value = float(match["value"])
    if _NEGATIVE.search(before):
        if match["value"][0] in "+-":
            return None
        value = -value
    if match["divisor"] is not None:
        divisor = float(match["divisor"])
        value = value / divisor if divisor else math.inf
    if scale is not None:
        value *= (_SCALES | _SUFFIXES)[scale[1].lower()]
    value = value / 100 if match["percent"] else value
    return value if math.isfinite(value) else None


def _has_other_digits(text: str) -> bool:
    """Whether a digit or number sign outside ASCII stands in the text: ½, ², ٣."""
    return not text.isascii() and any(
        unicodedata.category(c) in ("Nd", "No") and not c.isascii() for c in text
    )


def _number_in_words(text: str) -> float | None:
    """The number that an answer begins with in words, "twenty-one dogs"; None with further ones."""
    text = text.lower().rstrip(" .!")
    while lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    sign = 1.0
    if text.startswith(("minus ", "negative ")):
        sign, text = -1.0, text.partition(" ")[2]
    total, part, last, words = 0, 0, "", re.findall(r"[a-z]+|[^a-z\s-]", text)
    count = 0
    for count, word in enumerate(words):
        small = _SMALL.get(word)
        # "twenty one" is 21; "two three" and "one twenty" are two numbers.
        if small is not None and (last in ("", "scale") or (last == "tens" and 0 < small < 10)):
            part, last = part + small, "tens" if small >= 20 else "ones"
        elif word in _SCALES and last:
            scale = _SCALES[word]
            if scale == 100:
                part *= 100
            else:
                total, part = total + part * scale, 0
            last = "scale"
        elif word == "and" and last == "scale" and words[count + 1 : count + 2]:
            continue
        else:
            break
    else:
        count = len(words)
    rest = words[count:]
    if not last or any(word in _SMALL or word in _SCALES or word in _NO_COUNT for word in rest):
        return None
    return sign * (total + part)


# Truth values ------------------------------------------------------------------------------------

_YES, _NO = frozenset({"yes", "true"}), frozenset({"no", "false"})
_WHOLE_YES = frozenset(
    """
    是 是的 对 对的 正确 有 はい 네 예
    """.split()
)
_WHOLE_NO = frozenset(
    """
    否 不 不是 不对 错 错误 不正确 没有 无 いいえ 아니요 아니오
    """.split()
)
_NO_IDIOM = re.compile(r"no (?:doubt|question|problem|wonder|idea|matter|one knows)\b")
_NEGATED_TRUTH = re.compile(r"(?:\bnot|n't|n’t) (?:a )?(?:yes|true|no|false)\b")


def parse_boolean(text: str) -> bool | None:
    """Yes or true, no or false, at the beginning of an answer that does not also say the other.
    None for idioms ("no doubt") and for negated truth words ("yes, it is not true")."""
    whole = text.strip(" \n.。!！")
    if whole in _WHOLE_YES or whole in _WHOLE_NO:
        return whole in _WHOLE_YES
    words = words_of(text)
    said = {word in _YES for word in words if word in _YES | _NO}
    if len(said) != 1 or words[0] not in _YES | _NO:
        return None
    lowered = " ".join(text.lower().split())
    if _NO_IDIOM.search(lowered) or _NEGATED_TRUTH.search(lowered):
        return None
    return said.pop()


# Units of a text ---------------------------------------------------------------------------------

_WORD = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+(?:[\u0300-\u036f]+[^\W_{SPACELESS}]*)*")
_CHUNK = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
_OPENING, _CLOSING = "\"'“”‘’«»‹›([{<「『《¿¡", ".,;:!?…\"'“”‘’«»‹›)]}>」』》。、"


def fold_width(text: str) -> str:
    """The text with full-width ASCII (Ａ，５，：) and the ideographic space as ASCII."""
    return text if text.isascii() else text.translate(_HALF_WIDTH)


def without_emphasis(text: str) -> str:
    """The text without Markdown's `**bold**`, `_italics_` and code marks. Marks inside a word
    (`snake_case`) and marks without a partner (`C*`) stay: they are part of the text."""
    opening, closing = 0, 0
    for match in _MARKUP.finditer(text):
        opening, closing = opening + bool(match[1]), closing + bool(match[2])
    return _MARKUP.sub("", text) if opening == closing else text


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; characters where a script has no spaces."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def written_units(text: str) -> list[str]:
    """Units of a sign: chunks between spaces in lower case, symbols included;
    characters where a script has no spaces. Sentence punctuation after a chunk, quotes and
    brackets around it are left out; a chunk of punctuation alone stays."""
    text = fold_width(unicodedata.normalize("NFC", text)).lower()
    units: list[str] = []
    for match in _CHUNK.finditer(text):
        chunk = match[0]
        bare = chunk.lstrip(_OPENING).rstrip(_CLOSING)
        if bare:
            units.append(bare)
        # Punctuation beside a character of a spaceless script ends a phrase, as after a word.
        elif _stands_alone(text, match.start(), match.end()):
            units.append(chunk)
    return units


def _stands_alone(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return (not before or before.isspace()) and (not after or after.isspace())


# Scores ------------------------------------------------------------------------------------------


def relative_accuracy(prediction: float, target: float) -> float:
    """Mean relative accuracy (VSI-Bench): share of the levels 0.5, 0.55, …, 0.95 above which the
    prediction's relative error stays, 1 - level. A target of 0 is met only by 0."""
    if target == 0:
        return float(prediction == 0)
    error = abs(prediction - target) / abs(target)
    return sum(error < 1 - level / 100 for level in range(50, 100, 5)) / 10


def word_accuracy(prediction: str, target: str) -> float:
    """1 less the word error rate over `written_units`, at least 0; a target without units is met
    only by a prediction without any. Equals max(0, 1 - jiwer.wer) on lower-case text whose words
    have no punctuation at their ends, and max(0, 1 - jiwer.cer) on text without spaces."""
    said, wanted = written_units(prediction), written_units(target)
    if said == wanted:
        return 1.0
    if len(said) >= 2 * len(wanted):  # at least as many insertions as there are units
        return 0.0
    previous = list(range(len(wanted) + 1))
    for i, word in enumerate(said, start=1):
        row = [i]
        for j, other in enumerate(wanted, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != other)))
        previous = row
    return max(0.0, 1.0 - previous[-1] / len(wanted))


def rouge(prediction: str, target: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over `words_of`, not stemmed. Where neither text has
    two words there are no pairs, and ROUGE-2 is left out of the mean. The three equal those of
    rouge-score on ASCII text; a text without words scores 0, as there."""
    said, wanted = words_of(prediction), words_of(target)
    scores = [_shared_f1(said, wanted), _f1(_longest(said, wanted), said, wanted)]
    said_pairs, wanted_pairs = list(pairwise(said)), list(pairwise(wanted))
    if said_pairs or wanted_pairs:
        scores.append(_shared_f1(said_pairs, wanted_pairs))
    return sum(scores) / len(scores)


def _shared_f1(a: Sequence[_Unit], b: Sequence[_Unit]) -> float:
    return _f1(sum((Counter(a) & Counter(b)).values()), a, b)


def _f1(common: int, a: Sequence[_Unit], b: Sequence[_Unit]) -> float:
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    if a == b:
        return len(a)
    previous = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b, start=1):
            row.append(previous[j - 1] + 1 if word == other else max(previous[j], row[-1]))
        previous = row
    return previous[-1]
