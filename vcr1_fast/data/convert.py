"""From the annotation files as their authors publish them to records.

| format | file | task |
|---|---|---|
| charades, activitynet | {video: {duration, timestamps, sentences}} | temporal_grounding |
| nextgqa | [{id, video, question, options, duration, glue, type, answer}] | grounded_qa |
| got10k | [{path, object, gt}], `path` a folder of JPEG frames | tracking |
| quality | [{video, instruction, answer}] (VidTAB) | classification |

A row that breaks the record schema goes to the quarantine list with its place; all others are
written. Ends past the duration stay, since the rewards clip them. One repair: evidence of NExT-GQA
that begins a frame or so before the video (-0.1 s) begins at 0.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import FieldError, parse_record, write_records

Row = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: the file, and counts of videos, annotations, records, refusals."""

    path: Path
    videos: int
    annotations: int
    records: int
    quarantined: int


def convert(
    kind: str,
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    media_root: str | os.PathLike[str],
) -> Conversion:
    """Write the records of an annotation file to `output` (JSONL); `FORMATS` names the kinds.

    media_root: folder that holds the videos. Refused rows: `output` with the ending
    .quarantine.jsonl, written anew. ValueError for an unknown format, or a file whose structure is
    not the format's, naming the file and the entry.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}, expected one of {', '.join(FORMATS)}")
    source, output = Path(annotations), Path(output)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: not JSON: {error}") from error
    refused = output.with_suffix(".quarantine.jsonl")
    refused.unlink(missing_ok=True)
    quarantine, records, videos, count = Quarantine(refused), [], set(), 0
    for place, row in _rows(kind, source, content):
        count += 1
        videos.add(row["video"])
        try:
            records.append(parse_record(row, media_root))
        except FieldError as error:
            quarantine.add(row["id"], f"{source}:{place}", str(error))
    write_records(output, records)
    return Conversion(output, len(videos), count, len(records), len(quarantine))


def _rows(kind: str, source: Path, content: Any) -> Iterator[tuple[str, Row]]:
    expected, read = FORMATS[kind]
    if not isinstance(content, expected):
        raise ValueError(f"{source}: {kind} is a JSON {expected.__name__}, not {type(content)}")
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for place, entry in entries:
        try:
            for number, row in enumerate(read(place, entry)):
                yield f"{place}[{number}]" if expected is dict else str(place), row
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{source}: entry {place!r} is not {kind}'s: {error!r}") from error


def _timestamps(video: str, entry: Row) -> Iterator[Row]:
    pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
    for number, (span, sentence) in enumerate(pairs):
        yield {
            "id": f"{video}-{number}",
            "task": "temporal_grounding",
            "video": f"{video}.mp4",
            "prompt": {"event": sentence.strip().rstrip(".").lower()},
            "answer": span,
            "metadata": {"duration": entry["duration"]},
        }


_LETTERED = re.compile(r"\(([A-Z])\) ?(.*)", re.DOTALL)


def _nextgqa(place: int, entry: Row) -> Iterator[Row]:
    matches = [_LETTERED.fullmatch(option) for option in entry["options"]]
    if [match[1] for match in matches] != list("ABCDEFGH"[: len(matches)]):
        raise ValueError(f"options {entry['options']}")
    yield {
        "id": entry["id"],
        "task": "grounded_qa",
        "video": entry["video"],
        "prompt": {"question": entry["question"].strip()},
        "options": [match[2] for match in matches],
        "answer": {
            "answer": entry["answer"].strip("()"),
            "glue": [
                [max(start, 0.0) if start > -0.5 else start, end] for start, end in entry["glue"]
            ],
        },
        "metadata": {"duration": entry["duration"], "type": entry["type"]},
    }


def _got10k(place: int, entry: Row) -> Iterator[Row]:
    *_, split, folder = Path(entry["path"]).parts
    yield {
        "id": folder,
        "task": "tracking",
        "video": f"{split}/{folder}",
        "prompt": {"object": entry["object"]},
        "answer": entry["gt"],
    }


_CHOICE = re.compile(r"(.*\S)\s*Choice one answer from \[(.*)\]\.?\s*", re.DOTALL)


def _quality(place: int, entry: Row) -> Iterator[Row]:
    match = _CHOICE.fullmatch(entry["instruction"])
    if match is None:
        raise ValueError(f"no list of labels in {entry['instruction']!r}")
    yield {
        "id": Path(entry["video"]).stem,
        "task": "classification",
        "video": entry["video"],
        "prompt": {"question": match[1]},
        "options": [label.strip(" '\"") for label in match[2].split(",")],
        "answer": entry["answer"].strip(),
    }


FORMATS: dict[str, tuple[type, Callable[[Any, Row], Iterator[Row]]]] = {
    "charades": (dict, _timestamps),
    "activitynet": (dict, _timestamps),
    "nextgqa": (list, _nextgqa),
    "got10k": (list, _got10k),
    "quality": (list, _quality),
}
