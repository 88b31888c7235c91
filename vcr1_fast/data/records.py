"""The files that hold records: JSON Lines, JSON, CSV, Parquet (`tables.py` knows the files).

A row needs four fields: `video` or `image`, `task`, `prompt`, `answer`. The fields are those of
`Record`; what `prompt` and `answer` hold is checked by the task.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.tables import (
    FIELDS,
    TEXT_SUFFIXES,
    complete,
    decoded,
    decoded_value,
    hub_name,
    read_rows,
    renamed,
)
from vcr1_fast.files import json_line, write_atomic
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.record import FieldError, Record, check_boxes, describe, is_number

__all__ = ["FieldError", "Record", "RecordError", "load_records", "parse_record", "write_records"]


class RecordError(ValueError):
    """A row that breaks the schema; names the file, the line, the field and the fault."""

    def __init__(self, path: str, line: int, name: str, reason: str) -> None:
        super().__init__(path, line, name, reason)
        self.path, self.line, self.field, self.reason = path, line, name, reason

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}"
        return (
            f"{where}: field {self.field!r}: {self.reason}"
            if self.field
            else (f"{where}: {self.reason}")
        )


def load_records(
    path: str | os.PathLike[str],
    *,
    media_root: str | os.PathLike[str] | None = None,
    inside_root: bool = False,
    tasks: Collection[str] | None = None,
    on_error: str = "raise",
    quarantine: Quarantine | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Record]:
    """The records of a file, or of a data set of the package datasets (`tables.read_rows`), in
    order, each checked.

    A relative `video` or `image` is taken from `media_root`, or from the file's own folder.
    `inside_root` refuses media outside that folder. `columns`: our field -> the file's column
    (`{"prompt.question": "q"}`). `tasks` keeps those tasks only; a single one is also that of rows
    which name none. The first fault raises RecordError; with on_error="quarantine" the row goes to
    `quarantine` instead and is left out. Blank lines are allowed.
    FileNotFoundError for no file; ValueError for a file that is of another format as a whole.
    """
    if on_error not in ("raise", "quarantine"):
        raise ValueError(f'on_error must be "raise" or "quarantine", got {on_error!r}')
    if (on_error == "quarantine") != (quarantine is not None):
        raise ValueError('a quarantine list goes together with on_error="quarantine"')
    for task in tasks or ():
        _check_task(task)
    path = Path(path)
    # What the hub holds lies in no folder of ours.
    own = Path() if hub_name(path) is not None else path.parent
    root = own if media_root is None else Path(media_root)
    records: list[Record] = []
    first_line: dict[str, int] = {}
    only = next(iter(tasks)) if tasks is not None and len(tasks) == 1 else None
    texts = path.suffix.lower() in TEXT_SUFFIXES
    for number, row in read_rows(path):
        try:
            if isinstance(row, FieldError):
                raise row
            made = f"{path.stem}-{number}"
            if columns and isinstance(row, dict):
                row = renamed(row, columns)
            row = complete(decoded(row) if texts else row, made_id=made, task=only)
            record = _parse_texts(row, root) if texts else parse_record(row, root)
            if inside_root:
                _check_inside(record, root)
            if record.id in first_line:
                raise FieldError("id", f"{record.id!r} is already on line {first_line[record.id]}")
            first_line[record.id] = number
        except FieldError as error:
            if quarantine is None:
                raise RecordError(str(path), number, error.field, error.reason) from None
            name = row.get("id") if isinstance(row, dict) else None
            reason = f"field {error.field!r}: {error.reason}" if error.field else error.reason
            quarantine.add(name if isinstance(name, str) else "", f"{path}:{number}", reason)
            continue
        if tasks is None or record.task in tasks:
            records.append(record)
    return records


def _parse_texts(row: Any, root: str | os.PathLike[str]) -> Record:
    """The record of a row of texts. Its answer is a text where the task takes one, else the JSON
    value that it holds: "12" answers one task as a text, another as a number."""
    try:
        return parse_record(row, root)
    except FieldError as error:
        if not error.field.startswith("answer") or not isinstance(row, dict):
            raise
        answer = decoded_value(row["answer"])
        if answer == row["answer"]:
            raise
    return parse_record({**row, "answer": answer}, root)


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write a JSONL file that `load_records` reads back equal, fields at their default left out.

    Media below the file's own folder are written relative to it, so the folder can be moved. The
    file appears whole or not at all. ValueError for a record that `load_records` would refuse.
    """
    target = Path(path)
    folder = target.parent.resolve()
    rows = []
    for record in records:
        row = {f.name: getattr(record, f.name) for f in fields(Record)}
        row = {k: v for k, v in row.items() if k in _REQUIRED or v not in ((), None, {})}
        medium = "video" if record.image is None else "image"
        # Not abspath: behind a symbolic link ".." leads elsewhere than the text of the path says.
        path = Path(record.media).absolute()
        row[medium] = (
            path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        )
        try:
            parse_record(row, folder)
        except FieldError as error:
            raise ValueError(f"record {record.id!r}: {error}") from error
        rows.append(json_line(row))
    write_atomic(target, "".join(rows))


def parse_record(row: Any, media_root: str | os.PathLike[str] = ".") -> Record:
    """A checked Record from one decoded JSON object; FieldError names the field at fault."""
    if not isinstance(row, dict):
        raise FieldError("", f"expected an object, got {describe(row)}")
    for name, value in row.items():
        if half := _half_character(name) or _half_character(value):
            reason = f"holds half a character ({half}), which no file or tokenizer can take"
            raise FieldError(ascii(name)[1:-1], reason)
        if name not in FIELDS:
            raise FieldError(name, f"unknown; the fields are {', '.join(FIELDS)}")
    for name in _REQUIRED:
        if name not in row:
            raise FieldError(name, "missing")
    if ("video" in row) == ("image" in row):
        raise FieldError("video", "expected either a video or an image")
    medium = "video" if "video" in row else "image"
    for name in ("id", "task", medium):
        if not isinstance(row[name], str) or not row[name].strip():
            raise FieldError(name, f"expected a text, got {describe(row[name])}")
    _check_task(row["task"])
    prompt, options, metadata = row["prompt"], row.get("options", ()), row.get("metadata", {})
    if not isinstance(prompt, dict) or not all(isinstance(v, str) for v in prompt.values()):
        raise FieldError("prompt", f"expected an object of texts, got {describe(prompt)}")
    if not isinstance(metadata, dict):
        raise FieldError("metadata", f"expected an object, got {describe(metadata)}")
    if not isinstance(options, list | tuple) or not all(isinstance(v, str) for v in options):
        raise FieldError("options", f"expected a list of texts, got {describe(options)}")
    start, end = (_seconds(name, row.get(name)) for name in ("start", "end"))
    if start is not None and end is not None and start >= end:
        raise FieldError("start", f"{start:g} is not before end {end:g}")
    for name, unit in (("duration", "seconds"), ("fps", "frames a second")):
        value = metadata.get(name)
        if value is not None and not (is_number(value) and value > 0):
            reason = f"expected {unit} above 0, got {describe(value)}"
            raise FieldError(f"metadata.{name}", reason)
    for name in ("start", "end"):
        if medium == "image" and row.get(name) is not None:
            raise FieldError(name, "an image has no time")
    boxes = row.get("boxes", ())
    check_boxes("boxes", boxes)
    media = {"video": None, medium: os.path.join(media_root, row[medium])}
    record = Record(
        **media,
        id=row["id"],
        task=row["task"],
        prompt=prompt,
        answer=row["answer"],
        options=tuple(options),
        start=start,
        end=end,
        boxes=tuple(tuple(box) for box in boxes),
        metadata=metadata,
    )
    TASKS[record.task].check(record)
    return record


def _check_inside(record: Record, root: Path) -> None:
    """FieldError unless the record's file, and each picture of a folder of frames, lies in `root`
    once symbolic links are followed."""
    name = "image" if record.video is None else "video"
    media, real_root = Path(record.media), root.resolve()
    pictures = media.iterdir() if media.is_dir() else ()
    for path in (media, *pictures):
        real = path.resolve()
        if not real.is_relative_to(real_root):
            raise FieldError(name, f"{path} is {real}, outside the media root {real_root}")


_REQUIRED = ("id", "task", "prompt", "answer")


def _half_character(value: Any) -> str | None:
    """The first lone surrogate in a JSON value, as it is escaped there; None for sound texts."""
    waiting = [value]  # a stack: rows may be nested deeper than Python can call
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                return ascii(part[error.start])[1:-1]
        elif isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
    return None


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise FieldError("task", f"unknown task {task!r}; known tasks: {', '.join(sorted(TASKS))}")


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not is_number(value) or value < 0:
        raise FieldError(name, f"expected seconds of at least 0, got {describe(value)}")
    return float(value)
