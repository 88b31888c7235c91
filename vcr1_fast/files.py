"""Files on disk that survive a kill: writes that appear whole, and JSON Lines with torn ends.

A file or folder is written under another name, flushed, and renamed: after a crash at any moment
the name holds the old content or the new. A JSON Lines file is appended to; a crash leaves at most
one line without its newline at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Torn = Literal["refuse", "skip", "cut"]
"""What becomes of a last line without its newline: read like any other; left out where it is not
JSON; or left out and cut off the file, so that the next line does not join it."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, which takes the name `path` when the block ends.

    It lies in the same folder, which is made, and has the same suffix. Where the block raises,
    nothing is left of it and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number: two processes may write the same file, the last rename wins.
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        rename_flushed(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file (a str as UTF-8), which readers see as it was or as it is now."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def rename_flushed(source: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`, on disk when this returns; a file there is
    replaced in one step, a folder is moved aside first and deleted afterwards."""
    # The content before the name: a file system may order them the other way round, and a crash
    # would leave an empty file under the final name.
    flush(source)
    if not path.is_dir():
        os.replace(source, path)
        flush(path.parent)
        return
    # POSIX renames no folder over another that holds files.
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    source.rename(path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that a folder is on, or would be on if it existed."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def json_line(row: Mapping[str, Any]) -> str:
    """One JSON line. ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    if not _is_utf8(text):  # half of a surrogate pair, as a byte-level tokenizer may decode
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def append_jsonl(
    path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], *, fsync: bool = False
) -> None:
    """Append rows, whose lines no other process's appended lines can cut. `fsync`: they are on disk
    when this returns."""
    data = "".join(map(json_line, rows)).encode("utf-8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In append mode each write goes to the end, and the lines are one write: ranks of one run, and
    # shards of one evaluation, append to the same file.
    with path.open("ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        if fsync:
            os.fsync(file.fileno())


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its newline) of the lines that are not blank."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def read_jsonl(
    path: str | os.PathLike[str], *, torn: Torn = "refuse"
) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON Lines file; blank lines are allowed.

    ValueError, naming file:line, for a line that is not a JSON object. OSError for no file.
    """
    rows = []
    for number, line in read_lines(path):
        if torn != "refuse" and not line.endswith(b"\n"):
            if torn == "cut":
                os.truncate(path, os.path.getsize(path) - len(line))
                break
            if not _is_json(line):
                break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append((number, row))
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
