"""How hard records are, from an earlier run's scores: which to train on, and in which order."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcr1_fast.data.records import Record
from vcr1_fast.files import read_jsonl
from vcr1_fast.train.config import DataConfig
from vcr1_fast.train.dataset import Sampler


@dataclass(frozen=True)
class Selection:
    """The records to train on, their order, and notes about the others."""

    records: list[Record]
    sampler: Sampler
    notes: list[str]


def read_scores(path: str | Path) -> dict[str, float]:
    """Scores by record id from JSONL lines {"id": text, "score": number}, high ones for easy
    records; other fields are not read. ValueError, naming file and line, for anything else and for
    an id that occurs twice."""
    scores: dict[str, float] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        name, score = row.get("id"), _number(row.get("score"))
        if not isinstance(name, str) or score is None:
            raise ValueError(f'{where}: expected {{"id": text, "score": number}}, got {row!r:.80}')
        if name in scores:
            raise ValueError(f"{where}: a second score of {name!r}")
        scores[name] = score
    return scores


def select(records: Sequence[Record], config: DataConfig, seed: int) -> Selection:
    """What `data.difficulty`, `data.difficulty_range` and `data.order` make of the records.

    With scores, records without one are left out; the notes count them, those outside the range,
    and scores of ids that no record has. ValueError where no record is left.
    """
    if config.difficulty is None:
        return Selection(list(records), Sampler(len(records), seed), [])
    scores = read_scores(config.difficulty)
    low, high = config.difficulty_range or (-math.inf, math.inf)
    scored = [record for record in records if record.id in scores]
    kept = [record for record in scored if low < scores[record.id] < high]
    notes = [
        f"{config.difficulty}: {count} {what}"
        for count, what in (
            (len(records) - len(scored), "records have no score and are left out"),
            (len(scores) - len(scored), "scores are of ids that no record has"),
            (len(scored) - len(kept), f"records lie outside ({low}, {high}) and are left out"),
        )
        if count
    ]
    notes.append(f"{config.difficulty}: training on {len(kept)} of {len(records)} records")
    if not kept:
        raise ValueError("; ".join(notes))
    easy_first = config.order == "easy_first"
    return Selection(
        kept,
        Sampler(
            len(kept),
            seed,
            tuple(scores[record.id] for record in kept) if easy_first else None,
            config.order_window,
            _digest(kept, scores if easy_first else {}, config.order_window),
        ),
        notes,
    )


def _digest(kept: Sequence[Record], scores: Mapping[str, float], window: int) -> str:
    content = [window if scores else 0, [[record.id, scores.get(record.id)] for record in kept]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _number(value: object) -> float | None:
    """A finite number as a float; None for anything else, a bool included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        return None
    return number if math.isfinite(number) else None
