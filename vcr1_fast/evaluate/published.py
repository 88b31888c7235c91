"""Published numbers of benchmark splits, to stand beside ours where they are of these records."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vcr1_fast.data.records import Record

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """One benchmark split: the task it is asked as, its size, and models' scores in [0, 1] under
    our metrics' names. `records` is None where the source does not name the split."""

    name: str
    task: str
    records: int | None
    source: str
    note: str
    models: dict[str, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@cache
def benchmarks() -> dict[str, Published]:
    """All of them, by the name that `eval.benchmark` and `metadata.benchmark` take."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    for row in rows.values():  # the file has per cent, as the papers print them
        for scores in row["models"].values():
            scores.update({metric: value / 100 for metric, value in scores.items()})
    return {name: Published(**row) for name, row in rows.items()}


def published_beside(
    records: Sequence[Record],
    benchmark: str | None = None,
    *,
    unanswered: Collection[str] = (),
) -> tuple[dict[str, Published], list[str]]:
    """(task -> published numbers for these very records, reasons why something is not shown).

    The split is `benchmark`, else what the metadata of all records of a task agree on. Numbers of
    another number of records than are evaluated are not comparable, and left out; so are those of
    a task that has ids in `unanswered`, which no score counts. ValueError for an unknown
    `benchmark`, or one of a task that no record has.
    """
    known, shown, reasons = benchmarks(), {}, []
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    if benchmark is not None:
        if benchmark not in known:
            raise ValueError(f"benchmark must be one of {', '.join(known)}, got {benchmark!r}")
        if known[benchmark].task not in by_task:
            raise ValueError(
                f"{benchmark} is a benchmark of {known[benchmark].task}, the records are of "
                f"{', '.join(by_task) or 'no task'}"
            )
    for task, group in by_task.items():
        name = benchmark
        if name is None:
            named = {str(record.metadata.get("benchmark")) for record in group}
            name = named.pop() if len(named) == 1 else None
        split = known.get(name or "")
        if split is None or split.task != task:
            continue
        failed = sum(record.id in unanswered for record in group)
        if failed:
            reasons.append(
                f"no published numbers beside {task}: {failed} of {len(group)} records of "
                f"{split.name} are not scored"
            )
            continue
        if split.records not in (None, len(group)):
            reasons.append(
                f"no published numbers beside {task}: {split.name} has {split.records} records, "
                f"these are {len(group)}"
            )
            continue
        shown[task] = split
    return shown, reasons
