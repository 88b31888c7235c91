"""Caption scores: which events of a video a caption entails, and which it makes up.

    recall = share of the annotated events that the caption entails
    precision = share of the caption's events that the annotation entails
    F1 = 2 precision recall / (precision + recall)

VideoChat-R1 rewards recall, with events extracted from the captions and judged by a language model,
by code it never released. DREAM-1k (Tarsier, arXiv 2407.00634) reports all three. A judge extracts
events from captions and says whether a caption entails an event. `MatchingJudge` needs no model: it
is deterministic, offline, blind to order and negation. `judge.ModelJudge` asks one.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vcr1_fast.rewards.text import words_of

Match = Callable[[str, str], bool]
"""(caption, event) -> whether the caption entails the event."""


@runtime_checkable
class Judge(Protocol):
    """What decides. Both take whole batches, so that a judge can work on many at once."""

    def events(self, captions: Sequence[str]) -> list[tuple[str, ...]]:
        """The events of each caption, in its order."""
        ...

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (caption, event)'s caption entails its event."""
        ...


_SENTENCE = re.compile(r"[.!?;\n。！？；]+")  # noqa: RUF001 - full stops of Chinese
_STOP_WORDS = """
a an the and or of in on at to into onto from with by for as is are was were be been being it its he
she they his her their him them this that these those there then while who which has have had do
does did
的 了 着 在 是 一 个
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
    return {_stem(word) for word in words_of(text) if word not in _STOP}


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


@dataclass(frozen=True)
class MatchingJudge:
    """A judge of one function: a caption's events are its sentences, and `match` decides."""

    match: Match = mentions

    def events(self, captions: Sequence[str]) -> list[tuple[str, ...]]:
        parts = [map(str.strip, _SENTENCE.split(caption)) for caption in captions]
        return [tuple(sentence for sentence in part if _content(sentence)) for part in parts]

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [bool(self.match(caption, event)) for caption, event in pairs]


def as_judge(judge: Judge | Match) -> Judge:
    """The judge itself, or the one of a function (caption, event) -> bool."""
    return judge if isinstance(judge, Judge) else MatchingJudge(judge)


@dataclass(frozen=True)
class CaptionScore:
    """Scores of one caption, each in [0, 1]. precision and f1 are 0 where only recall was asked."""

    recall: float
    precision: float = 0.0
    f1: float = 0.0


def caption_scores(
    captions: Sequence[str],
    events: Sequence[Sequence[str]],
    judge: Judge | Match = mentions,
    *,
    references: Sequence[str] | None = None,
) -> list[CaptionScore]:
    """Scores of a batch: captions (N,), each with its annotated events; all questions of a kind go
    to the judge together.

    references: text that each caption's events are compared with; None leaves precision out. A
    blank caption, or one without annotated events, scores 0 and is not asked about.
    """
    judge = as_judge(judge)
    asked = [bool(some) and bool(text.strip()) for text, some in zip(captions, events, strict=True)]
    texts = [text if ask else "" for text, ask in zip(captions, asked, strict=True)]
    wanted = [tuple(some) if ask else () for some, ask in zip(events, asked, strict=True)]
    if references is None:
        return [CaptionScore(share) for share in _told(texts, wanted, judge)]
    own = iter(judge.events([text for text in texts if text]))
    claimed = [next(own) if text else () for text in texts]
    shares = _told([*texts, *references], [*wanted, *claimed], judge)
    found, true = shares[: len(texts)], shares[len(texts) :]
    return [
        CaptionScore(recall, precision, _harmonic(recall, precision))
        for recall, precision in zip(found, true, strict=True)
    ]


def event_recall(caption: str, events: Sequence[str], judge: Judge | Match = mentions) -> float:
    """Share of `events` that `judge` finds in the caption; 0 for no events or an empty caption."""
    return caption_scores([caption], [events], judge)[0].recall


def _told(captions: Iterable[str], events: Sequence[Sequence[str]], judge: Judge) -> list[float]:
    """Share of each caption's events that it entails; 0 without any."""
    pairs = [(c, event) for c, some in zip(captions, events, strict=True) for event in some]
    answers = iter(judge.entails(pairs) if pairs else [])
    return [sum(next(answers) for _ in some) / max(len(some), 1) for some in events]


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
