"""Rows of a data file, by its suffix: JSON Lines, JSON, CSV, TSV, Parquet; of a folder that the
package datasets saved, or of its hub (`hf:NAME:SPLIT`); made into our fields.

Columns become fields by name (`columns` renames them); a dotted name is a field of a field
(`prompt.question`). What is no field of ours goes to `metadata`. An id that is missing is made from
the file's name and the row's number; an option's own text stands for its letter.
"""

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vcr1_fast.files import read_lines
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.record import FieldError, Record, describe

FIELDS = tuple(field.name for field in fields(Record))
TEXT_SUFFIXES = (".csv", ".tsv")
"""Files in which every value is a text."""
HUB = "hf:"
"""Starts the name of a data set on the hub: hf:NAME:SPLIT."""
_CHAT = ("messages", "conversations")
_TOO_CLOSE = 0.8  # difflib's ratio from which an unknown column is taken for a misspelt field


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a file; the row is an object, or the FieldError that explains why it
    is none. The number is that of the line in JSON Lines and CSV, of the row in other files.

    ValueError for a file that is of another format as a whole, with a guess which; ImportError
    where Parquet needs pyarrow; OSError for no file.
    """
    suffix = path.suffix.lower()
    rows: Iterator[tuple[int, Any]]
    if hub_name(path) is not None or is_saved_dataset(path):
        rows = enumerate(_read_dataset(path), start=1)
    elif path.is_dir():
        raise ValueError(f"{path}: a folder, not a file of records")
    elif suffix in TEXT_SUFFIXES:
        rows = _read_csv(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix == ".json":
        rows = _read_json(path)
    else:
        rows = _read_json_lines(path)
    # Conversations all along are another format; beside records they are rows without a task.
    chats: list[tuple[int, Any]] | None = []
    for number, row in rows:
        if chats is not None and _chat_format(row):
            chats.append((number, row))
            continue
        yield from chats or ()
        chats = None
        yield number, row
    if chats:
        raise ValueError(
            f"{path}: conversations, not records: vcr1 data convert {_chat_format(chats[0][1])} "
            f"{path} OUT.jsonl --media FOLDER --task TASK"
        )


def complete(row: Any, *, made_id: str, task: str | None = None) -> Any:
    """A row with our fields: columns nested by their dots, the id made, a lone text as the prompt,
    an option's text as its letter, the rest in metadata.

    `task` is that of rows which name none. FieldError for a column that is probably a misspelt
    field. What is no object is returned as it is.
    """
    if not isinstance(row, dict):
        return row
    # A column exists for all rows of a table; what a row lacks is null in it.
    row = _nested({name: value for name, value in row.items() if value is not None})
    if task is not None:
        row.setdefault("task", task)
    for name in [name for name in row if name not in FIELDS and name not in _prompt_names(row)]:
        if not isinstance(name, str) or not name.isprintable():
            continue  # the record's own check says what is wrong with it
        if close := difflib.get_close_matches(name, FIELDS, n=1, cutoff=_TOO_CLOSE):
            raise FieldError(name, f"unknown; did you mean {close[0]}? Else rename the column")
        metadata = row.setdefault("metadata", {})
        if isinstance(metadata, dict):
            metadata.setdefault(name, row.pop(name))
            row.pop(name, None)
    if "id" not in row:
        row["id"] = made_id
    elif isinstance(row["id"], int) and not isinstance(row["id"], bool):
        row["id"] = str(row["id"])
    _complete_prompt(row)
    named = row.get("task")
    if isinstance(named, str) and named in TASKS and "answer" in row:
        row["answer"] = lettered(row["answer"], row.get("options"), named)
    return row


def decoded(row: Any) -> Any:
    """A row of texts with its lists, numbers and objects, all but the answer, which may be a text
    that looks like a number; options may also be separated by "|"."""
    if not isinstance(row, dict):
        return row
    out = {}
    for name, value in row.items():
        if value == "":  # an empty cell
            continue
        if name in ("id", "task", "video", "image", "answer") or name.startswith("prompt"):
            out[name] = value
            continue
        out[name] = decoded_value(value)
        if name == "options" and isinstance(out[name], str) and "|" in value:
            out[name] = [part.strip() for part in value.split("|")]
    return out


def decoded_value(text: Any) -> Any:
    """The JSON value that a text holds, else the text; True and False as Python writes them too."""
    if not isinstance(text, str):
        return text
    try:
        return {"True": True, "False": False}[text]
    except KeyError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with columns under the names of our fields (field -> column). FieldError for a column
    that the row does not have."""
    for name, column in columns.items():
        if column not in row:
            reason = f"no column {column!r} (data.columns); there are {', '.join(map(str, row))}"
            raise FieldError(name, reason)
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken | set(columns)}
    return {**kept, **{name: row[column] for name, column in columns.items()}}


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b` as {"a": {"b": ...}}, where a is a field of ours."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        section, dot, rest = name.partition(".")
        if not dot or section not in ("prompt", "metadata", "answer"):
            out[name] = dict(value) if name == "metadata" and isinstance(value, dict) else value
            continue
        inner = out.setdefault(section, {})
        if not isinstance(inner, dict):
            raise FieldError(name, f"stands beside a {section} that is {describe(inner)}")
        inner[rest] = value
    return out


def _prompt_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the texts that the row's task asks for, where the row has no prompt."""
    task = row.get("task")
    if "prompt" in row or not isinstance(task, str) or task not in TASKS:
        return ()
    return tuple(TASKS[task].example.prompt)


def _complete_prompt(row: dict[str, Any]) -> None:
    """A prompt that is one text, or whose texts are columns, as the object that it should be."""
    names = _prompt_names(row)
    found = {name: row.pop(name) for name in names if name in row}
    if found:
        row["prompt"] = found
    task, prompt = row.get("task"), row.get("prompt")
    if isinstance(prompt, str) and isinstance(task, str) and task in TASKS:
        asked = tuple(TASKS[task].example.prompt)
        if len(asked) == 1:
            row["prompt"] = {asked[0]: prompt}


def is_lettered(task: str) -> bool:
    """Whether a task's whole answer is the letter of an option."""
    example = TASKS[task].example.answer
    return isinstance(example, str) and len(example) == 1 and example in ascii_uppercase


def lettered(answer: Any, options: Any, task: str) -> Any:
    """The letter of the option whose text the answer is, in tasks that are answered by a letter."""
    example = TASKS[task].example.answer
    if isinstance(answer, dict) and isinstance(example, dict) and "answer" in example:
        return {**answer, **{"answer": _lettered_text(answer.get("answer"), options)}}
    return _lettered_text(answer, options) if is_lettered(task) else answer


def _lettered_text(answer: Any, options: Any) -> Any:
    if not isinstance(answer, str) or not isinstance(options, list | tuple):
        return answer
    if len(answer) == 1 and answer in ascii_uppercase[: len(options)]:
        return answer  # a letter, even where an option reads "A"
    same = [number for number, option in enumerate(options) if _same(answer, option)]
    return ascii_uppercase[same[0]] if len(same) == 1 and same[0] < 26 else answer


def _same(one: str, other: Any) -> bool:
    return isinstance(other, str) and one.strip().casefold() == other.strip().casefold()


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for index, (number, line) in enumerate(read_lines(path)):
        if index == 0 and (guess := _guess(path, line)) and not _has_objects(path):
            raise ValueError(f"{path}: not JSON Lines: {guess}")
        yield number, _decode(line)


def _has_objects(path: Path) -> bool:
    """Whether a line of the file is a JSON object: its first line is then a damaged one, unless the
    file as a whole is one JSON value, with an object in the last line, say."""
    if not any(isinstance(_decode(line), dict) for _, line in read_lines(path)):
        return False
    return isinstance(_decode(path.read_bytes()), FieldError)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        lines = text.lstrip().split(b"\n", 1)
        if isinstance(_decode(lines[0]), dict):  # JSON Lines under the name of JSON
            yield from _read_json_lines(path)
            return
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list):
        names = f" with {', '.join(list(content)[:5])}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{path}: expected a list of records, got a {type(content).__name__}{names}; published "
            "annotations are read by vcr1 data convert"
        )
    yield from enumerate(content, start=1)


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        start = file.read(4096).lstrip()
        if start.startswith(("{", "[")) or "\0" in start:
            raise ValueError(f"{path}: not CSV: looks like JSON; rename the file")
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    names = reader.fieldnames or []
                    found = sum(value is not None for value in row.values()) - (None in row)
                    found += len(row.get(None) or [])
                    reason = f"{found} cells, the header has {len(names)}"
                    yield reader.line_num, FieldError("", reason)
                    continue
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("reading Parquet needs the package pyarrow") from error
    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _decode(line: bytes) -> Any:
    """The value of a JSON line, or the FieldError of a line that is none."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return FieldError("", f"not JSON: {error}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _guess(path: Path, line: bytes) -> str | None:
    """What a file is whose first line is no JSON object; None where it may be JSON Lines."""
    if line.startswith(b"PAR1"):
        return f"looks like Parquet; name it {path.stem}.parquet"
    text = line.decode("utf-8-sig", errors="replace").strip()
    if text.startswith("["):
        return f"looks like a JSON list; name it {path.stem}.json"
    if text == "{":
        return f"looks like a JSON object over several lines; name it {path.stem}.json"
    if not text.startswith("{"):
        for separator, suffix in (("\t", "tsv"), (",", "csv")):
            cells = text.split(separator)
            if len(cells) > 2:
                return (
                    f"looks like {suffix.upper()} ({len(cells)} columns: {', '.join(cells)}); name "
                    f"it {path.stem}.{suffix}"
                )
    return None


def _chat_format(row: Any) -> str | None:
    """The name by which `vcr1 data convert` knows a row of conversations; None for another row."""
    if not isinstance(row, dict) or "task" in row:
        return None
    if isinstance(row.get("prompt"), list):
        return "trl"
    for name, known in zip(_CHAT, ("messages", "sharegpt"), strict=True):
        if isinstance(row.get(name), list):
            return known
    return None


def hub_name(path: str | Path) -> tuple[str, str] | None:
    """(data set, split) of `hf:NAME:SPLIT`; None for a path. The split of `hf:NAME` is train."""
    text = str(path)
    if not text.startswith(HUB):
        return None
    name, _, split = text.removeprefix(HUB).partition(":")
    return name, split or "train"


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of the package datasets wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read_dataset(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the package datasets; media that it holds itself, decoded or as bytes, are refused
    where the record is checked: ours are files."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the package datasets ({error})") from error
    named = hub_name(path)
    try:
        if named is not None:
            found = datasets.load_dataset(named[0], split=named[1])
        else:
            found = datasets.load_from_disk(str(path))
    except Exception as error:  # of the hub, the network or the format, each of another class
        line = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be loaded ({type(error).__name__}: {line})") from error
    if isinstance(found, dict):
        splits = ", ".join(found)
        raise ValueError(f"{path}: holds the splits {splits}; name the folder of one of them")
    yield from found
