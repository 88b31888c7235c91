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


class Scan(NamedTuple):
    """What one scan finds in a completion.

    blocks: tag -> text inside its last closed block after the reasoning. Whatever stands inside a
        closed `<think>` block is reasoning, not an answer. Of nested blocks the innermost counts;
        an unclosed block (a truncated completion) does not.
    sequence: tags of the blocks in order, if the completion is blocks and nothing else: each
        opens and closes once, is not blank and holds no other tag, and only white space stands
        outside. None for any other text.
    """

    blocks: dict[str, str]
    sequence: tuple[str, ...] | None


def scan(completion: str, tags: Iterable[str]) -> Scan:
    """Scan a completion for `<think>` and `tags`, names without brackets; other tags are text."""
    blocks: dict[str, str] = {}
    opened: dict[str, int] = {}  # tag -> where the content of its open block begins
    sequence: list[str] = []
    exact, inside, end = True, "", 0
    thinking = False
    closing_think: int | None = None  # place of the last one; looked up once, to stay linear
    for match in _pattern(tuple(tags)).finditer(completion):
        closes, tag = match.groups()
        start = match.start()
        if exact:
            blank = start == end or completion[end:start].isspace()
            exact = (tag == inside and not blank) if closes else (not inside and blank)
            inside, end = "" if closes else tag, match.end()
            if not closes:
                sequence.append(tag)
        if tag == THINK:
            if closes:
                thinking = False
                if THINK in opened:
                    blocks[THINK] = completion[opened[THINK] : start]
                opened = {}
            else:
                if closing_think is None:
                    closing_think = completion.rfind(f"</{THINK}>")
                # A reasoning block that is never closed hides nothing: the format is wrong already.
                thinking = start < closing_think
                opened = {THINK: match.end()}
        elif not thinking:
            if not closes:
                opened[tag] = match.end()
            elif tag in opened:
                blocks[tag] = completion[opened.pop(tag) : start]
    exact = exact and not inside and (end == len(completion) or completion[end:].isspace())
    return Scan(blocks, tuple(sequence) if exact else None)


def last_block(completion: str, tag: str) -> str | None:
    """Text inside the last closed `<tag>…</tag>` after the reasoning, or None; see `Scan`."""
    return scan(completion, (tag,)).blocks.get(tag)


def well_formed(completion: str, tags: Sequence[str]) -> bool:
    """Whether the completion is exactly these blocks in this order and nothing else; see `Scan`."""
    return scan(completion, tags).sequence == tuple(tags)


@lru_cache(maxsize=256)
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"<(/?)({'|'.join(map(re.escape, dict.fromkeys((THINK, *tags))))})>")
