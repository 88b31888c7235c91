"""The record: one question about one video or image, and the JSONL files that hold them.

A row needs five fields: `id`, `video` or `image`, `task`, `prompt`, `answer`. All times, in answers
too, are seconds counted from `start` (from the beginning of the file where there is no `start`),
since that is the part the model sees.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vcr1_fast.data.quarantine import Quarantine


@dataclass(frozen=True)
class Record:
    """One sample.

    `video` is a path, or `image` is and `video` is None; `prompt` holds the task's texts, e.g.
    {"event": "..."}; `options` are the texts of a choice without their letters; `start` and `end`
    (seconds) are the part of the file to watch; `boxes` are given boxes [x0, y0, x1, y1],
    normalised to 0..1. `answer` by task:
    temporal_grounding [start, end]; tracking a list of boxes, the first being the one given;
    multiple_choice a letter; classification one of the options; grounded_qa
    {"answer": letter, "glue": [[start, end], ...]}.
    """

    id: str
    task: str
    video: str | None
    prompt: dict[str, str]
    answer: Any
    image: str | None = None
    options: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> str:
        """Path of the video or image."""
        return self.video or self.image or ""


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


class FieldError(ValueError):
    """What an answer check raises: the field at fault (e.g. "answer.glue") and the fault."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.field, self.reason = name, reason

    def __str__(self) -> str:
        return f"field {self.field!r}: {self.reason}"


AnswerCheck = Callable[[Record], None]


def load_records(
    path: str | os.PathLike[str],
    *,
    media_root: str | os.PathLike[str] | None = None,
    tasks: Collection[str] | None = None,
    on_error: str = "raise",
    quarantine: Quarantine | None = None,
) -> list[Record]:
    """The records of a JSONL file, in order, each checked.

    A relative `video` or `image` is taken from `media_root`, or from the JSONL's own folder.
    `tasks` keeps those tasks only. The first fault raises RecordError; with on_error="quarantine"
    the row goes to `quarantine` instead and is left out. Blank lines are allowed.
    FileNotFoundError for no file.
    """
    if on_error not in ("raise", "quarantine"):
        raise ValueError(f'on_error must be "raise" or "quarantine", got {on_error!r}')
    if (on_error == "quarantine") != (quarantine is not None):
        raise ValueError('a quarantine list goes together with on_error="quarantine"')
    for task in tasks or ():
        _check_task(task)
    path = Path(path)
    root = path.parent if media_root is None else Path(media_root)
    records: list[Record] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        row: Any = None
        try:
            row = _decode(line)
            record = parse_record(row, root)
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
        path = Path(os.path.abspath(record.media))
        row[medium] = (
            path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        )
        try:
            parse_record(row, folder)
        except FieldError as error:
            raise ValueError(f"record {record.id!r}: {error}") from error
        rows.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text("".join(rows), encoding="utf-8", newline="\n")
    os.replace(partial, target)


def parse_record(row: Any, media_root: str | os.PathLike[str] = ".") -> Record:
    """A checked Record from one decoded JSON object; FieldError names the field at fault."""
    if not isinstance(row, dict):
        raise FieldError("", f"expected an object, got {_kind(row)}")
    for name in row:
        if name not in _FIELDS:
            raise FieldError(name, f"unknown; the fields are {', '.join(_FIELDS)}")
    for name in _REQUIRED:
        if name not in row:
            raise FieldError(name, "missing")
    if ("video" in row) == ("image" in row):
        raise FieldError("video", "expected either a video or an image")
    medium = "video" if "video" in row else "image"
    for name in ("id", "task", medium):
        if not isinstance(row[name], str) or not row[name].strip():
            raise FieldError(name, f"expected a text, got {_kind(row[name])}")
    _check_task(row["task"])
    prompt, options, metadata = row["prompt"], row.get("options", ()), row.get("metadata", {})
    if not isinstance(prompt, dict) or not all(isinstance(v, str) for v in prompt.values()):
        raise FieldError("prompt", f"expected an object of texts, got {_kind(prompt)}")
    if not isinstance(metadata, dict):
        raise FieldError("metadata", f"expected an object, got {_kind(metadata)}")
    if not isinstance(options, list | tuple) or not all(isinstance(v, str) for v in options):
        raise FieldError("options", f"expected a list of texts, got {_kind(options)}")
    start, end = (_seconds(name, row.get(name)) for name in ("start", "end"))
    if start is not None and end is not None and start >= end:
        raise FieldError("start", f"{start:g} is not before end {end:g}")
    duration = metadata.get("duration")
    if duration is not None and not (_is_number(duration) and duration > 0):
        raise FieldError("metadata.duration", f"expected seconds above 0, got {_kind(duration)}")
    for name in ("start", "end"):
        if medium == "image" and row.get(name) is not None:
            raise FieldError(name, "an image has no time")
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
        boxes=tuple(tuple(box) for box in _boxes("boxes", row.get("boxes", ()))),
        metadata=metadata,
    )
    ANSWER_CHECKS[record.task](record)
    return record


def register_answer_check(name: str, check: AnswerCheck) -> None:
    """Make task `name` known to `load_records`; `check` raises FieldError for a bad record."""
    if name in ANSWER_CHECKS:
        raise ValueError(f"task {name!r} has an answer check already")
    ANSWER_CHECKS[name] = check


def check_span(name: str, value: Any, *, empty: bool = False) -> None:
    """FieldError unless `value` is [start, end], seconds, 0 <= start < end (or = with `empty`)."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_number, value)):
        raise FieldError(name, f"expected [start, end] in seconds, got {_kind(value)}")
    start, end = value
    if start < 0:
        raise FieldError(name, f"start {start:g} is negative")
    if start > end or (start == end and not empty):
        raise FieldError(name, f"start {start:g} is not before end {end:g}")


def check_letter(name: str, value: Any, options: tuple[str, ...]) -> None:
    """FieldError unless `value` is the capital letter of one of at least two `options`."""
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise FieldError("options", f"expected 2 to 26 options, got {len(options)}")
    letters = ascii_uppercase[: len(options)]
    if not isinstance(value, str) or len(value) != 1 or value not in letters:
        raise FieldError(name, f"expected a letter A to {letters[-1]}, got {_kind(value)}")


def check_prompt(record: Record, *names: str) -> None:
    """FieldError unless the prompt holds each of `names`, not empty."""
    for name in names:
        if not record.prompt.get(name, "").strip():
            raise FieldError(f"prompt.{name}", f"missing; task {record.task} needs it")


def check_video(record: Record) -> None:
    """FieldError unless the record shows a video."""
    if record.video is None:
        raise FieldError("image", f"task {record.task} asks for times: it needs a video")


def _check_temporal_grounding(record: Record) -> None:
    check_video(record)
    check_prompt(record, "event")
    check_span("answer", record.answer)


def _check_tracking(record: Record) -> None:
    check_video(record)
    check_prompt(record, "object")
    if len(_boxes("answer", record.answer)) < 2:
        raise FieldError("answer", "expected at least 2 boxes, the first being the given one")
    times = record.metadata.get("times")
    if times is not None and not (
        isinstance(times, list | tuple)
        and len(times) == len(record.answer)
        and all(_is_number(time) and time >= 0 for time in times)
    ):
        raise FieldError("metadata.times", f"expected one time a box, got {_kind(times)}")


def _check_multiple_choice(record: Record) -> None:
    check_prompt(record, "question")
    check_letter("answer", record.answer, record.options)


def _check_classification(record: Record) -> None:
    check_prompt(record, "question")
    if len(set(record.options)) < 2:
        raise FieldError("options", f"expected at least 2 labels, got {list(record.options)}")
    if record.answer not in record.options:
        raise FieldError("answer", f"{_kind(record.answer)} is none of {list(record.options)}")


def _check_grounded_qa(record: Record) -> None:
    check_video(record)
    check_prompt(record, "question")
    answer = record.answer
    if not isinstance(answer, dict) or set(answer) != {"answer", "glue"}:
        raise FieldError(
            "answer", f'expected {{"answer": letter, "glue": spans}}, got {_kind(answer)}'
        )
    check_letter("answer.answer", answer["answer"], record.options)
    if not isinstance(answer["glue"], list | tuple) or not answer["glue"]:
        raise FieldError("answer.glue", f"expected a list of spans, got {_kind(answer['glue'])}")
    for index, span in enumerate(answer["glue"]):
        check_span(f"answer.glue[{index}]", span, empty=True)


def _check_single(field: str, fits: Callable[[Any], bool], expected: str) -> AnswerCheck:
    def check(record: Record) -> None:
        check_prompt(record, field)
        if not fits(record.answer):
            raise FieldError("answer", f"expected {expected}, got {_kind(record.answer)}")

    return check


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))


def _check_spatial_grounding(record: Record) -> None:
    check_prompt(record, "question")
    _boxes("answer", [record.answer])


ANSWER_CHECKS: dict[str, AnswerCheck] = {
    "temporal_grounding": _check_temporal_grounding,
    "tracking": _check_tracking,
    "grounded_qa": _check_grounded_qa,
    "multiple_choice": _check_multiple_choice,
    "classification": _check_classification,
    "caption": _check_single("instruction", _is_text_list, "a list of events"),
    "spatial_grounding": _check_spatial_grounding,
    "numeric": _check_single("question", lambda value: _is_number(value), "a number"),
    "regression": _check_single("question", lambda value: _is_number(value), "a number"),
    "boolean": _check_single("question", lambda value: isinstance(value, bool), "true or false"),
    "ocr": _check_single("question", _is_text, "a text"),
    "open_ended": _check_single("question", _is_text, "a text"),
}

_FIELDS = tuple(f.name for f in fields(Record))
_REQUIRED = ("id", "task", "prompt", "answer")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FieldError("", f"not JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_task(task: str) -> None:
    if task not in ANSWER_CHECKS:
        raise FieldError(
            "task", f"unknown task {task!r}; known tasks: {', '.join(sorted(ANSWER_CHECKS))}"
        )


def _is_number(value: Any) -> bool:
    # The comparison also refuses NaN, infinities and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value < 0:
        raise FieldError(name, f"expected seconds of at least 0, got {_kind(value)}")
    return float(value)


def _boxes(name: str, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise FieldError(name, f"expected a list of boxes, got {_kind(value)}")
    for index, box in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
            raise FieldError(where, f"expected [x0, y0, x1, y1], got {_kind(box)}")
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise FieldError(where, f"expected 0 <= x0 < x1 <= 1, and y alike, got {_kind(box)}")
    return value


def _kind(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
