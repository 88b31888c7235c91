"""Fuzz target: rows of records files.

Every row becomes a record or a line of the quarantine, never an exception. An accepted record makes
its prompt and its target, the target earns its own reward, and it survives being written.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import load_records, write_records
from vcr1_fast.tasks import TASKS

ROWS = 40  # of a file: opening one costs as much as reading a few rows
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, 2**70, 10**400, "", " ", "a", "A", "\ud83d"),
    *("\0", "<|im_end|>", "../x.mp4", "9" * 5000, [], [[]], {}, [1, 2], [2, 1], [1, 2, 3], ["a"]),
    *([[0, 0, 1, 1]], [[0, 1], [2, 3]], {"answer": "B", "glue": [[0, 1]]}, {"time": [1, 2]}),
    *({"question": "why?"}, {"event": "it falls"}, {"time": [0, 3], "boxes": {"1": [0, 0, 1, 1]}}),
)
NAMES = ("id", "video", "image", "task", "prompt", "answer", "options", "start", "end", "boxes")
NESTED = (*NAMES, "metadata", "duration", "fps", "times", "question", "event", "glue", "time", "7")


def _seeds() -> list[dict[str, Any]]:
    rows = []
    for task in TASKS.values():
        row = {name: value for name, value in asdict(task.example).items() if value is not None}
        rows.append(json.loads(json.dumps(row)))
    return rows


class Records:
    """The target; it writes its files into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seeds = folder, _seeds()

    def __call__(self, rng: random.Random) -> int:
        path = self.folder / "rows.jsonl"
        lines = [self._line(rng, number) for number in range(ROWS)]
        path.write_bytes(b"\n".join(lines))
        listed = self.folder / "quarantine.jsonl"
        listed.unlink(missing_ok=True)
        bad = Quarantine(listed)
        records = load_records(path, on_error="quarantine", quarantine=bad)
        given = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
        assert len(records) + len(bad.items) == given, (len(records), len(bad.items), given)
        for record in records:
            task = TASKS[record.task]
            for think in (False, True):
                task.prompt(record, think)
            target = task.target(record)
            scores = task.score(target, record)
            assert scores["format"] == 1.0, f"the target {target!r:.200} of {record!r:.300}"
        write_records(self.folder / "again.jsonl", records)
        again = load_records(self.folder / "again.jsonl")
        for record, read in zip(records, again, strict=True):
            assert read == record, f"{record!r:.300} is read as {read!r:.300}"
        return given + 4 * len(records)

    def _line(self, rng: random.Random, number: int) -> bytes:
        row = json.loads(json.dumps(rng.choice(self.seeds)))
        row["id"] = f"r{number}"
        for _ in range(rng.randrange(4)):
            self._edit(rng, row)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            at = rng.randrange(len(line))
            cut = line[at : at + rng.randrange(9)]
            line = rng.choice((line[:at], line.replace(cut, b""), line[:at] + b"\xff" + line[at:]))
        return line.replace(b"\n", b"").replace(b"\r", b"")

    def _edit(self, rng: random.Random, row: dict[str, Any]) -> None:
        """Change one value somewhere in the row."""
        place: Any = row
        while True:
            if isinstance(place, dict):
                keys: list[Any] = list(place)
            else:
                keys = list(range(len(place)))
            if not keys:
                return
            key = rng.choice(keys)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
                place = inner
                continue
            edit = rng.randrange(4)
            if edit == 0:
                del place[key]
            elif edit == 1 and isinstance(place, dict):
                place[rng.choice(NESTED)] = copy.deepcopy(rng.choice(ODD))
            else:
                place[key] = copy.deepcopy(rng.choice(ODD))
            return
