"""Tag structure of a completion, such as `<think>…</think> <answer>…</answer> <glue>…</glue>`.

One left-to-right scan over the tags, so the time is linear in the text whatever a policy emits;
a pattern such as `<think>.*?</think>.*?<answer>` is not, on unclosed or repeated tags.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

THINK = "think"
"""Tag of the reasoning."""
_LONGEST = 4 * 16 + 1
"""Pieces of 16 blocks: orders of more tags are not kept in memory."""


class Scan(NamedTuple):
    """The tags of a completion, from one scan.

    blocks: tag -> text inside its last closed block after the reasoning. Whatever stands inside a
        closed `<think>` block is reasoning, not an answer. Of nested blocks the innermost counts;
        an unclosed block (a truncated completion) does not.
    sequence: tags of the blocks in order, if the completion is at most 16 blocks and nothing else:
        each tag opens and closes once, no block is blank or holds another tag, and only white space
        stands outside. None for any other text.
    """

    blocks: dict[str, str]
    sequence: tuple[str, ...] | None


def scan(completion: str, tags: Iterable[str]) -> Scan:
    """Scan a completion for `<think>` and `tags`, names without brackets; other tags are text.

    A `</think>` that nothing opens closes the block that the chat template opened in the prompt.
    """
    if _thinks_from_start(completion):
        completion = f"<{THINK}>{completion}"
    # Text and tags in turn, a closing tag as "/name".
    pieces = _pattern(tuple(tags)).split(completion)
    # Most completions of a trained model are a few blocks one after the other.
    sequence = _sequence(tuple(pieces[1::2])) if len(pieces) <= _LONGEST else None
    if (
        sequence is not None
        and all(map(str.strip, pieces[2::4]))
        and not "".join(pieces[0::4]).strip()
    ):
        return Scan(dict(zip(sequence, pieces[2::4], strict=True)), sequence)
    return Scan(_last_blocks(completion, pieces), None)


def _thinks_from_start(completion: str) -> bool:
    """Whether the first think tag closes: the chat template ends the prompt with `<think>`."""
    closing = completion.find(f"</{THINK}>")
    return closing >= 0 and completion.find(f"<{THINK}>", 0, closing) < 0


@lru_cache(maxsize=256)
def _sequence(tags: tuple[str, ...]) -> tuple[str, ...] | None:
    """Tags of blocks one after the other, each once; None for any other order of tags."""
    opening = tags[0::2]
    blocks = len(set(opening)) == len(opening) and tags[1::2] == tuple(f"/{t}" for t in opening)
    return opening if blocks else None


def _last_blocks(completion: str, pieces: Sequence[str]) -> dict[str, str]:
    """Last closed block of each tag, in a text that is not a sequence of blocks."""
    closes_think = [i for i, piece in enumerate(pieces) if i % 2 and piece == f"/{THINK}"]
    last_close = closes_think[-1] if closes_think else -1
    blocks: dict[str, str] = {}
    opened: dict[str, int] = {}  # tag -> where the content of its open block begins
    thinking, end = False, 0
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            end += len(piece)
            continue
        start, end = end, end + len(f"<{piece}>")
        closes, tag = piece.startswith("/"), piece.removeprefix("/")
        if tag == THINK:
            if closes and THINK in opened:
                blocks[THINK] = completion[opened[THINK] : start]
            opened = {} if closes else {THINK: end}
            # A reasoning block that is never closed hides nothing: the format is wrong already.
            thinking = not closes and i < last_close
        elif thinking:
            continue
        elif not closes:
            opened[tag] = end
        elif tag in opened:
            blocks[tag] = completion[opened.pop(tag) : start]
    return blocks


def last_block(completion: str, tag: str) -> str | None:
    """Text inside the last closed `<tag>…</tag>` after the reasoning, or None; see `Scan`."""
    return scan(completion, (tag,)).blocks.get(tag)


def well_formed(completion: str, tags: Sequence[str]) -> bool:
    """Whether the completion is exactly these blocks in this order and nothing else; see `Scan`."""
    return scan(completion, tags).sequence == tuple(tags)


@lru_cache(maxsize=256)
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    names = "|".join(map(re.escape, dict.fromkeys((THINK, *tags))))
    return re.compile(f"<(/?(?:{names}))>")
