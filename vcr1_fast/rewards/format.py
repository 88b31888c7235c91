"""Tag structure of a completion: `<think>…</think> <answer>…</answer> <glue>…</glue>`.

One left-to-right scan over the tags, so the time is linear in the text whatever a policy emits;
a pattern such as `<think>.*?</think>.*?<answer>` is not, on unclosed or repeated tags.
"""

import re
from collections.abc import Sequence

_TAG = re.compile(r"<(/?)(think|answer|glue)>")


def last_block(completion: str, tag: str) -> str | None:
    """Text inside the last closed `<tag>…</tag>` after the reasoning, or None.

    Whatever stands inside a closed `<think>` block is reasoning, not an answer. Of nested blocks
    the innermost counts; an unclosed block (a truncated completion) does not.
    """
    found, opened, thinking = None, None, False
    closing_think = completion.rfind("</think>")
    for match in _TAG.finditer(completion):
        closes, name = match.groups()
        if name == "think" and tag != "think":
            # A reasoning block that is never closed hides nothing: the format is wrong already.
            thinking = not closes and match.start() < closing_think
            opened = None
        elif name == tag and not thinking:
            if not closes:
                opened = match.end()
            elif opened is not None:
                found, opened = completion[opened : match.start()], None
    return found


def well_formed(completion: str, tags: Sequence[str]) -> bool:
    """Whether the completion is exactly these blocks in this order and nothing else.

    Each block opens and closes once and is not blank; only white space may stand outside.
    """
    end = 0
    expected = [(closes, tag) for tag in tags for closes in ("", "/")]
    matches = _TAG.finditer(completion)
    for closes, tag in expected:
        match = next(matches, None)
        if match is None or match.groups() != (closes, tag):
            return False
        between = completion[end : match.start()]
        # Before an opening tag: nothing. Before a closing tag: the block's content.
        if bool(between.strip()) != bool(closes):
            return False
        end = match.end()
    return next(matches, None) is None and not completion[end:].strip()
