"""Scores of an evaluation as a picture: each metric with its interval, the blind baseline,
and published numbers where the records are a published split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcr1_fast.report.curves import COLOURS, DPI, INK, plain_axes
from vcr1_fast.report.table import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, FLOOR, BEST = COLOURS[0], COLOURS[1], COLOURS[2]
OTHERS = "#999999"
ROW_INCHES, HEAD_INCHES = 0.26, 1.15


def write_scores(summary: Mapping[str, Any], path: str | Path) -> Path:
    """Plot every task of a summary.json, one below the other, to a PNG; returns its path.

    Raises ValueError when the summary has no task, ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = summary["tasks"]
    if not tasks:
        raise ValueError("the evaluation has no scored task to draw")
    heights = [HEAD_INCHES + ROW_INCHES * len(task["metrics"]) for task in tasks.values()]
    figure = Figure(figsize=(8.0, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, task) in zip(panels, tasks.items(), strict=True):
        draw_task(axes, name, task, summary["published"].get(name), percent(summary["level"]))
    figure.savefig(path)
    return Path(path)


def draw_task(
    axes: Axes,
    name: str,
    task: Mapping[str, Any],
    split: Mapping[str, Any] | None,
    level: str = "95 %",
) -> None:
    """Plot one row a metric, the primary one on top; scores run from 0 to 1. `split`: published
    scores of the same records; `level`: coverage of the intervals."""
    primary = task["primary"]
    metrics = [primary, *(metric for metric in task["metrics"] if metric != primary)]
    rows = {metric: row for row, metric in enumerate(metrics)}
    for metric, row in rows.items():
        low, high = task["intervals"][metric]
        axes.plot([low, high], [row, row], color=OURS, linewidth=2.2, solid_capstyle="butt")
    ours = [task["metrics"][metric] for metric in metrics]
    axes.plot(ours, list(rows.values()), "o", color=OURS, markersize=5, label=f"this run, {level}")
    floors = {metric: task["floor"][metric] for metric in metrics if metric in task["floor"]}
    _marks(axes, rows, floors, "D", FLOOR, f"blind baseline: {task['floor_strategy']}")
    if split is not None:
        models = split["models"]
        best = max(models, key=lambda model: models[model].get(primary, -1.0))
        for model, scores in models.items():
            label = "published models" if model == next(iter(models)) else None
            _marks(axes, rows, scores, "|", OTHERS, label)
        _marks(axes, rows, models[best], "^", BEST, f"published: {best}")
    plain_axes(axes, f"{name}, n = {task['n']}", grid="x")
    axes.set_yticks(list(rows.values()), metrics, fontsize=8, color=INK)
    axes.set_ylim(len(metrics) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False, labelcolor=INK
    )


def _marks(
    axes: Axes,
    rows: Mapping[str, int],
    scores: Mapping[str, float],
    marker: str,
    colour: str,
    label: str | None,
) -> None:
    shown = [(scores[metric], row) for metric, row in rows.items() if metric in scores]
    if shown:
        xs, ys = zip(*shown, strict=True)
        size = 9 if marker == "|" else 5
        filled = "none" if marker == "D" else "full"
        axes.plot(
            xs, ys, marker, color=colour, markersize=size, fillstyle=filled, label=label, zorder=3
        )
