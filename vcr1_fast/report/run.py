"""`vcr1 report`: plots a training run's curves and shows its rollouts with their frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import load_records
from vcr1_fast.data.video import ClipReader
from vcr1_fast.report.curves import write_curves
from vcr1_fast.report.rollouts import write_rollouts_html


def main_report(run: str | Path, data: str | Path | None = None, *, prompts: int = 200) -> int:
    """Write `run`/curves/*.png and `run`/rollouts.html, and print their paths. Returns 0.

    data: the records trained on; None takes those that the run's config.yaml names. `prompts` of
    the rollouts are shown, at even distances. ValueError for a folder without a training run,
    OSError if the records cannot be read.
    """
    folder = Path(run)
    metrics, rollouts = folder / "metrics.jsonl", folder / "rollouts.jsonl"
    if not metrics.exists():
        raise ValueError(f"{folder} holds no training run: it has no metrics.jsonl")
    print(*write_curves(metrics, folder / "curves"), sep="\n")
    if not rollouts.exists():  # supervised, or none were kept
        return 0
    settings = _data_settings(folder)
    path = data or settings.get("train")
    if path is None:
        raise ValueError(f"{folder}/config.yaml names no records; name them with --data")
    records = load_records(
        path,
        media_root=settings.get("media_root"),
        columns=settings.get("columns"),
        tasks=settings.get("tasks"),
        on_error="quarantine",
        quarantine=Quarantine(None),
    )
    with ClipReader() as reader:
        page = write_rollouts_html(
            rollouts,
            folder / "rollouts.html",
            max_prompts=prompts,
            records={record.id: record for record in records},
            reader=reader,
        )
    print(page)
    return 0


def _data_settings(folder: Path) -> dict[str, Any]:
    """The section of the run's settings that names its records; {} where there are none."""
    import yaml

    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return (settings or {}).get("data", {})
