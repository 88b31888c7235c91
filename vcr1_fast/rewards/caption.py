"""Caption recall: the share of annotated events that a caption tells.

VideoChat-R1 asks a language model whether the caption entails each event, by code it never
released. A judge is any function (caption, event) -> bool; `mentions` is the one that needs no
model: deterministic, offline, blind to order and negation.
"""

import re
from collections.abc import Callable, Sequence

Judge = Callable[[str, str], bool]

_WORD = re.compile(r"[a-z0-9]+")
_SENTENCE = re.compile(r"[.!?;\n]+")
_STOP_WORDS = """
a an the and or of in on at to into onto from with by for as is are was were be been being it its he
she they his her their him them this that these those there then while who which has have had do
does did
"""
_STOP = frozenset(_STOP_WORDS.split())
_ENDINGS = ("ing", "ed", "es", "s", "e")


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            # "sitting" and "sit": a consonant doubled before the ending counts once.
            return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
    return word


def _content(text: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP}


def mentions(caption: str, event: str, share: float = 0.6) -> bool:
    """Whether two neighbouring sentences of the caption hold at least `share` of the event's
    content words, compared by their stems. An event without content words is never mentioned."""
    wanted = _content(event)
    sentences = [_content(sentence) for sentence in _SENTENCE.split(caption)]
    sentences = [sentence for sentence in sentences if sentence]
    pairs = zip(sentences, [*sentences[1:], set()], strict=False)
    return bool(wanted) and any(
        len(wanted & (one | other)) >= share * len(wanted) for one, other in pairs
    )


def event_recall(caption: str, events: Sequence[str], judge: Judge = mentions) -> float:
    """Share of `events` that `judge` finds in the caption; 0 for no events or an empty caption."""
    if not events or not caption.strip():
        return 0.0
    return sum(bool(judge(caption, event)) for event in events) / len(events)
