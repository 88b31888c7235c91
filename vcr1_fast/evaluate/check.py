"""The data set doctor: what is wrong with records and their media, and what a blind guess earns.

Faults are counted by kind and the first of each are named. Floors are the scores of strategies that
never look at the video: a model below them has learned nothing from it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.data.progress import Progress
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.data.video import VideoError, probe, read_image
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.base import Metrics

DURATION_TOLERANCE = 1.0
"""Seconds by which a file's length may differ from the annotated one."""


@dataclass(frozen=True)
class Fault:
    """One finding: its kind, the record, and what was found."""

    kind: str
    record: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Of a set of records: counts, faults, share of the letters or labels, blind scores."""

    records: int
    videos: int
    tasks: dict[str, int]
    faults: list[Fault]
    balance: dict[str, dict[str, float]]
    floors: dict[str, dict[str, Metrics]]

    def counts(self) -> dict[str, int]:
        return dict(Counter(fault.kind for fault in self.faults))

    def as_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "videos": self.videos,
            "tasks": self.tasks,
            "faults": self.counts(),
            "balance": self.balance,
            "floors": self.floors,
        }


def check(
    path: str | Path,
    *,
    train: str | Path | None = None,
    media_root: str | Path | None = None,
    media: bool = True,
) -> Report:
    """Examine the records of a JSONL file.

    train: records that a model is trained on; floors are fitted on them, and a video in both is a
        fault. Without it floors are fitted on the examined records: then they can only be higher.
    media: open every video, to compare its length with the annotation.
    """
    bad = Quarantine()
    records = load_records(path, media_root=media_root, on_error="quarantine", quarantine=bad)
    faults = [
        Fault("malformed row", item.record_id, f"{item.source}: {item.reason}")
        for item in bad.items
    ]
    trained = [] if train is None else load_records(train, media_root=media_root)
    faults += _repeated(records) + _overlap(records, trained)
    lengths = _open_all(records, faults) if media else {}
    for record in records:
        faults += _time_faults(record, lengths.get(record.media))
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.task].append(record)
    fitted = {task: [r for r in trained if r.task == task] or by_task[task] for task in by_task}
    return Report(
        records=len(records),
        videos=len({record.media for record in records}),
        tasks={task: len(group) for task, group in by_task.items()},
        faults=faults,
        balance={task: shares for task, group in by_task.items() if (shares := _balance(group))},
        floors={task: TASKS[task].blind(fitted[task], group) for task, group in by_task.items()},
    )


def _repeated(records: Sequence[Record]) -> list[Fault]:
    """Records that ask the same of the same video."""
    first: dict[str, str] = {}
    faults = []
    for record in records:
        parts = [record.media, record.task, record.prompt, record.start, record.end]
        key = json.dumps(parts, sort_keys=True)
        if key in first:
            faults.append(Fault("repeated question", record.id, f"as {first[key]}"))
        first.setdefault(key, record.id)
    return faults


def _overlap(records: Sequence[Record], trained: Sequence[Record]) -> list[Fault]:
    seen = {record.media for record in trained}
    return [
        Fault("video also trained on", record.id, record.media)
        for record in records
        if record.media in seen
    ]


def _open_all(records: Sequence[Record], faults: list[Fault]) -> dict[str, float]:
    """Seconds of each video; media that cannot be opened become faults of their first record."""
    owner: dict[str, Record] = {}
    for record in records:
        owner.setdefault(record.media, record)
    lengths = {}
    with Progress(len(owner), "open media") as progress:
        for path, record in owner.items():
            kind = "video" if record.image is None else "image"
            try:
                if kind == "image":
                    read_image(path)
                else:
                    lengths[path] = probe(path).duration
            except VideoError as error:
                what = "unreadable" if Path(path).exists() else "missing"
                faults.append(Fault(f"{what} {kind}", record.id, str(error)))
            progress.advance()
    return lengths


def _time_faults(record: Record, length: float | None) -> list[Fault]:
    faults = []
    annotated = record.metadata.get("duration")
    if None not in (annotated, length) and abs(annotated - length) > DURATION_TOLERANCE:
        detail = f"annotated {annotated:g} s, the file has {length:.2f} s"
        faults.append(Fault("duration mismatch", record.id, detail))
    duration = annotated if length is None else length
    if record.task == "tracking" and record.metadata.get("times") is None:
        detail = f"{len(record.answer)} boxes without their times are taken at equal steps"
        faults.append(Fault("boxes without times", record.id, detail))
    if duration is None:
        return faults
    end = duration if record.end is None else min(record.end, duration)
    spans = TASKS[record.task].spans
    last = max((stop for _, stop in spans(record)), default=0.0) if spans else 0.0
    last += record.start or 0.0
    if last > end:
        detail = f"ends at {last:g} s of {end:g} s"
        faults.append(Fault("answer past the end", record.id, detail))
    return faults


def _balance(records: Sequence[Record]) -> dict[str, float]:
    """Share of each letter or label among the right answers."""
    label = TASKS[records[0].task].label
    if label is None:
        return {}
    counts = Counter(map(label, records))
    return {answer: counts[answer] / len(records) for answer in sorted(counts)}


def report_text(report: Report, examples: int = 3) -> str:
    """The report in lines: counts, faults with the first few of each kind, balance, floors."""
    tasks = ", ".join(f"{task} {count}" for task, count in report.tasks.items())
    lines = [f"{report.records} records of {report.videos} videos: {tasks}"]
    for kind, count in sorted(report.counts().items()):
        lines.append(f"{kind}: {count} ({100 * count / max(report.records, 1):.1f} %)")
        named = [fault for fault in report.faults if fault.kind == kind]
        lines += [f"  {fault.record}: {fault.detail}" for fault in named[:examples]]
        if count > examples:
            lines.append(f"  and {count - examples} more")
    for task, shares in report.balance.items():
        told = ", ".join(f"{answer} {100 * share:.1f} %" for answer, share in shares.items())
        lines.append(f"{task}: {told}")
    lines.append("without looking at the video:")
    for task, strategies in report.floors.items():
        for strategy, metrics in strategies.items():
            told = ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())
            lines.append(f"  {task}, {strategy}: {told}")
    return "\n".join(lines)
