"""What VideoChat-R1 ships (its folder Annotations/): times, evidence, tracks, quality; and
TimeLens, times that were annotated again (arXiv 2512.14698).

| format | file | task |
|---|---|---|
| charades, activitynet | {video: {duration, timestamps, sentences}} | temporal_grounding |
| nextgqa | [{id, video, question, options, duration, glue, type, answer}] | grounded_qa |
| got10k | [{path, object, gt}], `path` a folder of JPEG frames | tracking |
| quality, vidtab | [{video, instruction, answer}], labels in the instruction | classification |
| timelens_bench | {video: {duration, spans, queries}}, a span a query | temporal_grounding |
| timelens_100k | JSON Lines {source, video_path, duration, events: [{query, span}]} | \
  temporal_grounding, or moment_retrieval where a query has several spans |

Ends past the duration stay, since the rewards clip them. One repair: evidence of NExT-GQA that
begins a frame or so before the video (-0.1 s) begins at 0.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vcr1_fast.data.formats.files import Format, Row, listing, mapping


def _timestamps(video: str, entry: Any, media_root: Path) -> Iterator[Row]:
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


def _nextgqa(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    matches = [match for option in entry["options"] if (match := _LETTERED.fullmatch(option))]
    letters, count = [match[1] for match in matches], len(entry["options"])
    if len(matches) != count or letters != list("ABCDEFGH"[:count]):
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


def _got10k(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    *_, split, folder = Path(entry["path"]).parts
    yield {
        "id": folder,
        "task": "tracking",
        "video": f"{split}/{folder}",
        "prompt": {"object": entry["object"]},
        "answer": entry["gt"],
    }


_CHOICE = re.compile(r"(.*\S)\s*Choice one answer from \[(.*)\]\.?\s*", re.DOTALL)


def _quality(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
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


def _query(text: str) -> str:
    """A query as TimeLens' loader asks it: single blanks, no full stop at its ends."""
    return " ".join(text.split()).strip(".").strip()


def _timelens_bench(video: str, entry: Any, media_root: Path) -> Iterator[Row]:
    pairs = zip(entry["spans"], entry["queries"], strict=True)
    for number, (span, query) in enumerate(pairs):
        yield {
            "id": f"{video}-{number}",
            "task": "temporal_grounding",
            "video": f"{video}.mp4",
            "prompt": {"event": _query(query)},
            "answer": span,
            "metadata": {"duration": entry["duration"]},
        }


def _timelens_100k(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    path = Path(entry["video_path"])
    for number, event in enumerate(entry["events"]):
        spans = event["span"]
        several = len(spans) > 1
        yield {
            "id": f"{path.with_suffix('')}-{number}",
            "task": "moment_retrieval" if several else "temporal_grounding",
            "video": str(path),
            "prompt": {"event": _query(event["query"])},
            "answer": spans if several else spans[0],
            "metadata": {"duration": entry["duration"], "source": entry["source"]},
        }


FORMATS = {
    "charades": Format(mapping, _timestamps),
    "activitynet": Format(mapping, _timestamps),
    "nextgqa": Format(listing, _nextgqa),
    "got10k": Format(listing, _got10k),
    "quality": Format(listing, _quality),
    "vidtab": Format(listing, _quality),
    "timelens_bench": Format(mapping, _timelens_bench),
    "timelens_100k": Format(listing, _timelens_100k),
}
