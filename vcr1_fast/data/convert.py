"""From the annotation files as their authors publish them to records; `formats/` knows the files.

A row that breaks the record schema, or an entry that is not of the format, goes to the quarantine
list with its place and the field at fault; all others are written.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vcr1_fast.data.formats import FORMATS, Format
from vcr1_fast.data.formats.conversations import KINDS, conversation_format
from vcr1_fast.data.formats.files import Row
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import FieldError, parse_record, write_records

# What reading a field of another type or a missing one raises.
_MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion: the file, and counts of videos (or images), annotations, records by
    task, and refusals."""

    path: Path
    videos: int
    annotations: int
    tasks: dict[str, int]
    quarantined: int

    @property
    def records(self) -> int:
        return sum(self.tasks.values())


def convert(
    kind: str,
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    media_root: str | os.PathLike[str],
    benchmark: str | None = None,
    task: str | None = None,
) -> Conversion:
    """Write the records of an annotation file to `output` (JSONL); `FORMATS` and, for
    conversations, `KINDS` name the kinds.

    media_root: folder that holds the media. benchmark: the published split that these are, kept as
    `metadata.benchmark`; None: the format's own, where it has one. Refused rows: `output` with the
    ending .quarantine.jsonl, overwritten. ValueError for an unknown format, or a file of which no
    entry is of the format, naming the file, the entry and the field.
    """
    if kind not in FORMATS and kind not in KINDS:
        known = ", ".join([*FORMATS, *KINDS])
        raise ValueError(f"unknown format {kind!r}, expected one of {known}")
    if (kind in KINDS) != (task is not None):
        needed = "needs the task that its questions are" if kind in KINDS else "has its own tasks"
        raise ValueError(f"format {kind} {needed} (--task)")
    form = FORMATS[kind] if task is None else conversation_format(kind, task)
    source, output = Path(annotations), Path(output)
    refused = output.with_suffix(".quarantine.jsonl")
    refused.unlink(missing_ok=True)
    quarantine, records, media, ids = Quarantine(refused), [], set(), set()
    benchmark = benchmark or form.benchmark
    for place, row in _rows(kind, form, source, Path(media_root), quarantine):
        media.add(row.get("video", row.get("image")))
        if benchmark is not None:
            row["metadata"] = {**row.get("metadata", {}), "benchmark": benchmark}
        try:
            record = parse_record(row, media_root)
            if record.id in ids:
                raise FieldError("id", f"{record.id!r} occurs twice")
            ids.add(record.id)
            records.append(record)
        except FieldError as error:
            name = row["id"] if isinstance(row["id"], str) else ""
            quarantine.add(name, f"{source}:{place}", str(error))
    write_records(output, records)
    tasks = Counter(record.task for record in records)
    return Conversion(
        output, len(media), len(records) + len(quarantine), dict(tasks), len(quarantine)
    )


def _rows(
    kind: str, form: Format, source: Path, media_root: Path, quarantine: Quarantine
) -> Iterator[tuple[str, Row]]:
    good, first_fault = 0, None
    for place, entry in form.entries(source):
        try:
            rows = list(form.rows(place, entry, media_root))
        except _MALFORMED as error:
            fault = f"field {error}: missing" if isinstance(error, KeyError) else str(error)
            first_fault = first_fault or f"entry {place!r} is not {kind}'s: {fault}"
            quarantine.add("", f"{source}:{place}", f"not {kind}'s: {fault}")
            continue
        good += 1
        for number, row in enumerate(rows):
            yield f"{place}[{number}]" if len(rows) > 1 else place, row
    if first_fault is not None and not good:
        raise ValueError(f"{source}: {first_fault}")
