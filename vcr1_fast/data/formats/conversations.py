"""Conversations as other trainers hold them; a record is the last question and its answer.

messages (ms-swift, LLaMA-Factory, OpenAI): [{messages: [{role, content}], videos or images,
    solution}]; content is a text, or parts [{type: "video", video}, {type: "text", text}]
sharegpt (LLaVA, LLaMA-Factory): [{conversations: [{from: "human" or "gpt", value}], video}]
trl: [{prompt: text or messages, completion or solution or answer, video or image}]

Media may also stand in `video`, `videos`, `image` or `images`. Placeholders such as <video> are
taken out of the question, and an answer within <answer></answer> out of what is around it. Options
"A. ..." or "(A) ..." of a question become `options` where the task is answered by a letter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vcr1_fast.data.formats.files import Format, Row, listing
from vcr1_fast.data.tables import decoded_value, is_lettered, lettered
from vcr1_fast.tasks import TASKS

KINDS = ("messages", "sharegpt", "trl")
_ROLES = {"human": "user", "gpt": "assistant"}
_PLACEHOLDER = re.compile(r"<(video|image)>\s*|<\|vision_start\|>.*?<\|vision_end\|>\s*")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$", re.MULTILINE)
_SOLUTIONS = ("solution", "answer", "ground_truth", "completion", "chosen")
_TAKEN = {
    "messages", "conversations", "prompt", "video", "videos", "image", "images", "id", *_SOLUTIONS
}  # fmt: skip


def conversation_format(kind: str, task: str) -> Format:
    """The format of one of `KINDS`, read as records of a task. ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(sorted(TASKS))}")
    return Format(listing, partial(_rows, kind, task))


def _rows(kind: str, task: str, place: str, entry: Mapping[str, Any], media: Path) -> Iterator[Row]:
    turns, found = _turns(kind, entry)
    asked = [number for number, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise ValueError("no turn of the user")
    question = _PLACEHOLDER.sub("", turns[asked[-1]][1]).strip()
    answers = [text for role, text in turns[asked[-1] + 1 :] if role == "assistant"]
    # A reward compares with the row's `solution` if there is one: the assistant's turn may reason.
    given = next((entry[name] for name in _SOLUTIONS if name in entry), None)
    if given is None or (isinstance(given, list) and given and isinstance(given[0], dict)):
        given = _text(given) if given else (answers[-1] if answers else None)
    if given is None:
        raise ValueError("no answer: no turn of the assistant and no solution")
    row: Row = {
        "id": str(entry.get("id", place)),
        "task": task,
        "prompt": {next(iter(TASKS[task].example.prompt)): question},
        "answer": given,
        **_media(entry, found),
    }
    if isinstance(given, str):
        inside = _ANSWER.search(given)
        row["answer"] = _fitting((inside[1] if inside else given).strip(), task)
    if is_lettered(task):
        _split_options(row, question)
    metadata = {name: value for name, value in entry.items() if name not in _TAKEN}
    if system := [text for role, text in turns if role == "system"]:
        metadata["system"] = system[0]
    if metadata:
        row["metadata"] = metadata
    yield row


def _turns(
    kind: str, entry: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """((role, text) of each turn, media paths in parts of turns)."""
    media: dict[str, list[str]] = {"video": [], "image": []}
    if kind == "sharegpt":
        turns = entry["conversations"]
        return [(_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in turns], media
    turns = entry["messages" if kind == "messages" else "prompt"]
    if isinstance(turns, str):
        return [("user", turns)], media
    out = []
    for turn in turns:
        if not isinstance(turn["content"], str):
            for part in turn["content"]:
                for name in media:
                    if part.get("type") == name and isinstance(part.get(name), str):
                        media[name].append(part[name])
        out.append((turn["role"], _text(turn["content"])))
    return out, media


def _text(content: Any) -> str:
    """The text of a turn's content: a text, its parts, or messages."""
    if isinstance(content, str):
        return content
    texts = [part["text"] if "text" in part else part.get("content", "") for part in content]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _media(entry: Mapping[str, Any], found: Mapping[str, Sequence[str]]) -> Row:
    """The one video or image of an entry."""
    media = []
    for name in ("video", "image"):
        given = entry.get(name, entry.get(f"{name}s")) or found[name]
        media += [(name, path) for path in ([given] if isinstance(given, str) else given)]
    if len(media) != 1:
        raise ValueError(f"expected one video or image, got {len(media)}")
    return dict(media)


def _fitting(text: str, task: str) -> Any:
    """An answer as the task holds it: a text where its example is one, else the JSON value."""
    return text if isinstance(TASKS[task].example.answer, str) else decoded_value(text)


def _split_options(row: Row, question: str) -> None:
    """Take lettered options out of the question. ValueError where their letters are no A, B, C."""
    found = list(_OPTION.finditer(question))
    letters = "".join(match[1] for match in found)
    if len(found) < 2 or letters != ascii_uppercase[: len(found)]:
        raise ValueError(f"expected options (A) ..., (B) ... in the question, got {letters!r}")
    row["options"] = [match[2] for match in found]
    name = next(iter(row["prompt"]))
    row["prompt"][name] = question[: found[0].start()].strip()
    # "A" and "(A) a bike" begin with a letter; "A bike" is an option's text.
    letter = re.match(r"\(?([A-Z])(?:[.):]|$)", str(row["answer"]))
    row["answer"] = letter[1] if letter else lettered(row["answer"], row["options"], row["task"])
