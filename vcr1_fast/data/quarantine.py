"""The list of samples that could not be used, and why. A sample is left out, never replaced."""

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class QuarantineItem:
    """One bad sample: its id, where it came from (file, or file:line), and what is wrong."""

    record_id: str
    source: str
    reason: str


class Quarantine:
    """Collects bad samples; with a `path` each is also appended to that JSONL file at once.

    A file that exists is read first, so that a resumed run goes on with its list. The same sample
    with the same reason is listed once, however many epochs meet it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.items: list[QuarantineItem] = []
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self.items = [_parse(self.path, *row) for row in _complete_lines(self.path)]

    def __len__(self) -> int:
        return len(self.items)

    def add(self, record_id: str, source: str, reason: str) -> None:
        """List one bad sample. OSError where the file cannot be written."""
        item = QuarantineItem(record_id, source, reason)
        with self._lock:
            if item in self.items:
                return
            self.items.append(item)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                line = json.dumps(asdict(item), ensure_ascii=False) + "\n"
                # One write of a whole line: ranks of one run may append to the same file. Half a
                # character, in an id or a path, is written as JSON's escape of it.
                with self.path.open("ab") as file:
                    file.write(line.encode(errors="backslashreplace"))


def _complete_lines(path: Path) -> list[tuple[int, str]]:
    # A killed run may leave half a line at the end; it is cut off, else the next one would join it.
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return list(enumerate(whole.decode().split("\n")[:-1], start=1))


def _parse(path: Path, number: int, line: str) -> QuarantineItem:
    try:
        return QuarantineItem(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number}: not a quarantine line: {error}") from error
