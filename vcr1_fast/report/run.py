"""`vcr1 report`: plots training runs' curves and shows their rollouts with their frames."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import load_records
from vcr1_fast.data.video import ClipReader
from vcr1_fast.report.curves import read_metrics, write_curves
from vcr1_fast.report.rollouts import RunData, read_rollouts, write_rollouts_html

WATCH_EVERY = 30
"""Seconds between the writes of a page that follows a run."""


def main_report(
    runs: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    prompts: int = 200,
    watch: bool = False,
) -> int:
    """Write `run`/curves/*.png and `run`/rollouts.html, and print their paths; of several runs,
    their comparison, compare.html, in the first one's folder. Returns 0.

    data: the records trained on; None takes those that a run's config.yaml names; without them the
    page has no frames. `prompts` are shown with frames. `watch`: write the page again every 30
    seconds until interrupted. ValueError for a folder without a training run.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    for folder in folders:
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} holds no training run: it has no metrics.jsonl")
    if len(folders) == 1:
        print(*write_curves(folders[0] / "metrics.jsonl", folders[0] / "curves"), sep="\n")
    page = folders[0] / ("rollouts.html" if len(folders) == 1 else "compare.html")
    while True:
        found = [run_data(folder, data) for folder in folders]
        if not any(run.rows for run in found):  # supervised, or none were kept
            return 0
        with ClipReader() as reader:
            write_rollouts_html(
                found, page, pictured=prompts, reader=reader, watch=WATCH_EVERY if watch else 0
            )
        print(page, flush=True)
        if not watch:
            return 0
        time.sleep(WATCH_EVERY)


def run_data(folder: Path, data: str | Path | None) -> RunData:
    """What a page shows of a run's folder. Without its records, which is said, without frames."""
    rollouts = folder / "rollouts.jsonl"
    settings = _settings(folder)
    section = settings.get("data") or {}
    path = data or section.get("train")
    records = []
    if path is None:
        print(f"no frames: {folder}/config.yaml names no records; name them with --data")
    else:
        try:
            records = load_records(
                path,
                media_root=section.get("media_root"),
                columns=section.get("columns"),
                tasks=section.get("tasks"),
                on_error="quarantine",
                quarantine=Quarantine(None),
            )
        except FileNotFoundError as error:
            if data is not None:
                raise
            # A run that was copied to another machine still has all its text.
            print(f"no frames: {error.filename or path} is not here; name the records with --data")
    return RunData(
        name=folder.resolve().name,
        rows=read_rollouts(rollouts) if rollouts.exists() else [],
        records={record.id: record for record in records},
        metrics=read_metrics(folder / "metrics.jsonl"),
        settings=dict(_flat(settings)),
    )


def _settings(folder: Path) -> dict[str, Any]:
    """The run's settings, nested; {} where there are none."""
    import yaml

    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return settings or {}


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
