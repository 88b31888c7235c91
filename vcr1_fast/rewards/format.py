"""Tag structure of a completion: `<think>…</think> <answer>…</answer> <glue>…</glue>`.

One left-to-right scan over the tags, so the time is linear in the text whatever a policy emits;
a pattern such as `<think>.*?</think>.*?<answer>` is not, on unclosed or repeated tags.
"""

import re
from collections.abc import Sequence

_TAG = re.compile(r"<(/?)(think|answer|glue)>")


def last_block(completion: str, tag: str) -> str | None:
    """Text inside the last closed `<tag>…</tag>` after the reasoning, or None.

    Text inside a closed `<think>` block is reasoning, not an answer; so is all text before a
    `</think>` that nothing opens, since the chat template opened it in the prompt. Of nested
    blocks the innermost counts; an unclosed block (a truncated completion) does not.
    """
    found, opened = None, None
    closing_think = completion.rfind("</think>")
    thinking = tag != "think" and _thinks_from_start(completion)
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


def _thinks_from_start(completion: str) -> bool:
    """Whether the first think tag closes: the chat template ends the prompt with `<think>`."""
    closing = completion.find("</think>")
    return closing >= 0 and completion.find("<think>", 0, closing) < 0


def well_formed(completion: str, tags: Sequence[str]) -> bool:
    """Whether the completion is exactly these blocks in this order and nothing else.

    Each block opens and closes once and is not blank; only white space may stand outside. The
    tag that opens a leading think block may be missing: some chat templates end the prompt with it.
    """
    end = 0
    expected = [(closes, tag) for tag in tags for closes in ("", "/")]
    if tags[:1] == ("think",) and _thinks_from_start(completion):
        del expected[0]
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
