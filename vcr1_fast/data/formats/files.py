"""Reading the entries of an annotation file: JSON, JSON Lines, Parquet, or a folder of JSON."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.files import read_jsonl

Row = dict[str, Any]
"""A record as JSON has it, before it is checked; media relative to the media folder."""

Entries = Iterator[tuple[str, Any]]
"""(place in the file, entry)."""


@dataclass(frozen=True)
class Format:
    """How a file is read.

    entries(path): its entries, with their places. rows(place, entry, media_root): the rows of one;
    KeyError, TypeError, ValueError and the like for one that is not of the format.
    `benchmark`: the published split that the file is, where it can be no other.
    """

    entries: Callable[[Path], Entries]
    rows: Callable[[str, Any, Path], Iterator[Row]]
    benchmark: str | None = None


def load(path: Path) -> Any:
    """Content of a JSON, JSON Lines (list of its lines) or Parquet file (list of its rows).

    ValueError, naming the file, for one that is neither; ImportError where Parquet needs pyarrow.
    """
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import read_table
        except ImportError as error:
            raise ImportError("reading Parquet needs the package pyarrow") from error
        return read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def mapping(path: Path) -> Entries:
    """Entries (key, value) of a JSON object."""
    content = load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    yield from content.items()


def listing(path: Path) -> Entries:
    """Entries of a JSON list, JSON Lines or Parquet file, by number."""
    content = load(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list, got a {type(content).__name__}")
    for number, entry in enumerate(content):
        yield str(number), entry


def folder(path: Path) -> Entries:
    """Entries of all JSON lists in a folder, or of one of them: "<file's stem>/<number>"."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: holds no .json files")
    for file in files:
        for number, entry in listing(file):
            yield f"{file.stem}/{number}", entry
