"""Answers in words and numbers: what they say, and how near two texts are.

Word error rate: edits over the target's words. ROUGE (Lin 2004): F1 of shared words, of shared
pairs of words, and of the longest common subsequence.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

_VALUE = re.compile(
    r"[^\d.+-]{0,24}([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?:/\s*(\d+\.?\d*))?\s*(%?)[^\d]*",
    re.ASCII,
)
_MINUS = re.compile("\u2212|^\u2013(?=\\.?[0-9])")  # the minus sign, an en dash for one
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)
_WORD = re.compile(r"\w+")
_LONGEST_NUMBER = 64
_YES, _NO = frozenset({"yes", "true"}), frozenset({"no", "false"})


def parse_number(text: str) -> float | None:
    """The one number of an answer: 12, -3.5, 1,200, 3/4, 40 % (0.4), $ 5, 7 people. None when there
    is none, more than one, or one that is not finite."""
    text = _MINUS.sub("-", text.strip())
    if len(text) > _LONGEST_NUMBER:
        return None
    match = _VALUE.fullmatch(_GROUPS.sub("", text))
    if match is None:
        return None
    value = float(match[1])
    if match[2] is not None:
        divisor = float(match[2])
        value = value / divisor if divisor else math.inf
    value = value / 100 if match[3] else value
    return value if math.isfinite(value) else None


def parse_boolean(text: str) -> bool | None:
    """Yes or true, no or false, at the beginning of an answer that does not also say the other."""
    words = words_of(text)
    said = {word in _YES for word in words if word in _YES | _NO}
    return said.pop() if len(said) == 1 and words[0] in _YES | _NO else None


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def relative_accuracy(prediction: float, target: float) -> float:
    """Mean relative accuracy (VSI-Bench): share of the levels 0.5, 0.55, …, 0.95 above which the
    prediction's relative error stays, 1 - level. A target of 0 is met only by 0."""
    if target == 0:
        return float(prediction == 0)
    error = abs(prediction - target) / abs(target)
    return sum(error < 1 - level / 100 for level in range(50, 100, 5)) / 10


def word_accuracy(prediction: str, target: str) -> float:
    """1 less the word error rate, at least 0; a target without words is met only by none."""
    said, wanted = words_of(prediction), words_of(target)
    if not wanted:
        return float(not said)
    if len(said) >= 2 * len(wanted):  # as many insertions as there are words: nothing is left
        return 0.0
    previous = list(range(len(wanted) + 1))
    for i, word in enumerate(said, start=1):
        row = [i]
        for j, other in enumerate(wanted, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != other)))
        previous = row
    return max(0.0, 1.0 - previous[-1] / len(wanted))


def rouge(prediction: str, target: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over words in lower case, not stemmed."""
    said, wanted = words_of(prediction), words_of(target)
    pairs = [list(pairwise(words)) for words in (said, wanted)]
    scores = [
        _shared_f1(said, wanted),
        _shared_f1(*pairs),
        _f1(_longest(said, wanted), said, wanted),
    ]
    return sum(scores) / 3


def _shared_f1(a: Sequence, b: Sequence) -> float:
    return _f1(sum((Counter(a) & Counter(b)).values()), a, b)


def _f1(common: int, a: Sequence, b: Sequence) -> float:
    # Of two empty lists nothing is shared and nothing is missing.
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    previous = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b, start=1):
            row.append(previous[j - 1] + 1 if word == other else max(previous[j], row[-1]))
        previous = row
    return previous[-1]
