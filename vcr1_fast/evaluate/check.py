"""The data set doctor: faults of records and their media, and the blind baselines.

Faults are counted by kind, and the first of each are named. A blind baseline is the score of a
strategy that ignores the video: a model below it has learned nothing from the video.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vcr1_fast.data.convert import convert
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.data.video import DECODER
from vcr1_fast.evaluate.faults import (
    Fault,
    Timed,
    dead_media,
    doubled_boxes,
    malformed,
    overlap,
    repeated,
    time_faults,
    timed,
)
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.base import Metrics


@dataclass(frozen=True)
class Report:
    """Counts, faults, shares of the letters or labels, and blind baselines of a set of records.

    rows: all that were read, refused ones too. videos: counts images too. floors: task -> strategy
    -> metrics of the blind baseline.
    """

    rows: int
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
            "rows": self.rows,
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
    inside_root: bool = False,
    media: bool = True,
    decode: bool = False,
    decoder: str = DECODER,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
) -> Report:
    """Examine the records of a file, and the rows that were refused when it was converted.

    train: records that a model is trained on; blind baselines are fitted on them, and a video in
        both is a fault. Without it they are fitted on the examined records, which can only raise
        them.
    inside_root: media outside `media_root` are faults, as with data.inside_root of a run.
    media: open every video and image, to compare lengths with the annotation.
    decode: also decode each record's frames, as training does.
    decoder: which decoder opens the videos, as data.decoder of a run.
    columns, task: as data.columns and a single data.tasks of a run.
    """
    bad = Quarantine()
    tasks = None if task is None else [task]
    records = load_records(
        path,
        media_root=media_root,
        inside_root=inside_root,
        tasks=tasks,
        on_error="quarantine",
        quarantine=bad,
        columns=columns,
    )
    refused = Path(path).with_suffix(".quarantine.jsonl")
    refusals = Quarantine(refused).items if refused.exists() else []
    faults = [malformed(item) for item in [*refusals, *bad.items]]
    trained = (
        []
        if train is None
        else load_records(train, media_root=media_root, tasks=tasks, columns=columns)
    )
    faults += repeated(records) + overlap(records, trained)
    lengths: dict[Timed, float] = {}
    if media or decode:
        dead, lengths = dead_media(records, decode=decode, decoder=decoder)
        faults += dead
    for record in records:
        faults += time_faults(record, lengths.get(timed(record)))
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.task].append(record)
    faults += doubled_boxes(by_task["tracking"]) if "tracking" in by_task else []
    fitted = {task: [r for r in trained if r.task == task] or by_task[task] for task in by_task}
    return Report(
        rows=len(records) + len(bad) + len(refusals),
        records=len(records),
        videos=len({record.media for record in records}),
        tasks={task: len(group) for task, group in by_task.items()},
        faults=faults,
        balance={task: shares for task, group in by_task.items() if (shares := _balance(group))},
        floors={
            task: TASKS[task].blind_baselines(fitted[task], group)
            for task, group in by_task.items()
        },
    )


def check_annotations(
    kind: str, path: str | Path, *, media_root: str | Path | None = None, **options: Any
) -> Report:
    """`check` of an annotation file as its authors publish it; `kind` as for `convert`."""
    with TemporaryDirectory() as folder:
        done = convert(kind, path, Path(folder) / "records.jsonl", media_root=media_root or ".")
        return check(done.path, **options)


def _balance(records: Sequence[Record]) -> dict[str, float]:
    """Share of each letter or label among the right answers."""
    label = TASKS[records[0].task].label
    if label is None:
        return {}
    counts = Counter(map(label, records))
    return {answer: counts[answer] / len(records) for answer in sorted(counts)}


def report_text(report: Report, examples: int = 3) -> str:
    """The report in lines: counts, faults with the first few of each kind, balance, baselines."""
    tasks = ", ".join(f"{task} {count}" for task, count in report.tasks.items())
    lines = [f"{report.records} records of {report.videos} videos or images: {tasks or 'none'}"]
    if report.rows != report.records:
        lines[0] += f"; {report.rows - report.records} of {report.rows} rows were refused"
    for kind, count in sorted(report.counts().items()):
        lines.append(f"{kind}: {count} ({100 * count / max(report.rows, 1):.1f} %)")
        named = [fault for fault in report.faults if fault.kind == kind]
        lines += [f"  {fault.record}: {fault.detail}" for fault in named[:examples]]
        if count > examples:
            lines.append(f"  and {count - examples} more")
    for task, shares in report.balance.items():
        text = ", ".join(f"{answer} {100 * share:.1f} %" for answer, share in shares.items())
        lines.append(f"{task}: {text}")
    lines.append("blind baselines:")
    for task, strategies in report.floors.items():
        for strategy, metrics in strategies.items():
            text = ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())
            lines.append(f"  {task}, {strategy}: {text}")
    return "\n".join(lines)
