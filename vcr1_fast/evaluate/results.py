"""The files of a finished evaluation."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcr1_fast.files import json_line, write_atomic
from vcr1_fast.report.table import markdown_table, summary_tables

if TYPE_CHECKING:
    from vcr1_fast.evaluate.run import Evaluation


def write_results(out_dir: str | Path, evaluation: Evaluation, identity: dict[str, Any]) -> None:
    """Write predictions.jsonl, quarantine.jsonl, summary.json and tables.md, each atomically."""
    out = Path(out_dir)
    lines = (json_line(item.as_line()) for item in evaluation.predictions)
    write_atomic(out / "predictions.jsonl", "".join(lines))
    write_atomic(
        out / "quarantine.jsonl",
        "".join(json_line(asdict(item)) for item in evaluation.quarantined),
    )
    summary = {**evaluation.summary(), "run": identity, "versions": versions()}
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "summary.json", text + "\n")
    tables = summary_tables(json.loads(text))
    parts = [f"{table.title or 'scores'}\n\n{markdown_table(table)}\n" for table in tables]
    write_atomic(out / "tables.md", "\n".join(parts))


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers may depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
