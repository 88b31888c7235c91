"""The list of samples that could not be used, and why. A sample is left out, never replaced."""

import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.files import append_jsonl, read_jsonl


@dataclass(frozen=True)
class QuarantineItem:
    """One bad sample: its id, where it came from (file, or file:line), and the reason."""

    record_id: str
    source: str
    reason: str


class Quarantine:
    """Collects bad samples; with a `path` each is also appended to that JSONL file at once.

    A file that exists is read first, so that a resumed run goes on with its list. The same sample
    with the same reason is listed once, however many epochs meet it. `log` receives a line for each
    one that is added.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.log = log
        self.path = None if path is None else Path(path)
        self.items: list[QuarantineItem] = []
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self.items = [_parse(self.path, *row) for row in read_jsonl(self.path, torn="cut")]

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
                append_jsonl(self.path, [asdict(item)])
        if self.log is not None:
            self.log(f"quarantined {item.record_id or item.source}: {item.reason}")


def _parse(path: Path, number: int, row: dict[str, Any]) -> QuarantineItem:
    try:
        return QuarantineItem(**row)
    except TypeError as error:
        raise ValueError(f"{path}:{number}: not a quarantine line: {error}") from error
