"""Plots training curves: metrics.jsonl -> PNG.

One picture of all panels, and each panel alone. Lines carry their names at their right end, in
their colour, so there is no legend to look up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vcr1_fast.files import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito: distinguishable with any common colour blindness. Yellow is too faint for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
INK, FAINT = "#222222", "#dddddd"
DPI = 120


@dataclass(frozen=True)
class Panel:
    """A picture of all metrics whose whole name matches `pattern`.

    The pattern's first group, where there is one, is the line's label; a line without is "all".
    """

    name: str
    title: str
    pattern: str
    stacked: bool = False

    def series(self, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Label -> (steps, values), in the order in which metrics first appear."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in rows:
            for name, value in row.items():
                match = re.fullmatch(self.pattern, name)
                if match and isinstance(value, (int, float)) and math.isfinite(value):
                    label = match.group(1) if match.groups() and match.group(1) else ""
                    steps, values = found.setdefault(label, ([], []))
                    steps.append(row["step"])
                    values.append(float(value))
        return {label: (np.array(steps), np.array(v)) for label, (steps, v) in found.items()}


PANELS = (
    Panel("reward", "Reward, mean of a task", r"reward/([^/]+)"),
    Panel(
        "validation", "Evaluation, each task's metrics", r"val/(score|[^/]+/(?!parsed|finished).+)"
    ),
    Panel("length", "Completion length, tokens", r"length/([^/]+)"),
    Panel("finished", "Share of completions that end", r"finished/([^/]+)"),
    Panel("kl", "KL to the reference, nats a token", r"kl"),
    Panel("clip_fraction", "Share of clipped tokens", r"clip_(?:fraction|(low|high|delta))"),
    Panel("loss", "Loss", r"loss"),
    Panel("gradient", "Gradient norm", r"grad_norm"),
    Panel("speed", "Tokens a second", r"tokens_per_second"),
    Panel("seconds", "Seconds a step, by stage", r"seconds/([^/]+)", stacked=True),
)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file by ascending step; of rows with one step the last counts, as a
    resumed run may repeat steps. Nested objects become names with slashes. A row without an
    integer `step` raises ValueError naming the file."""
    by_step: dict[int, dict[str, Any]] = {}
    for _, row in read_jsonl(path, torn="skip"):
        step = row.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{path}: a row has no integer 'step': {str(row)[:80]}")
        by_step.setdefault(step, {}).update(_flat(row))
    return [by_step[step] for step in sorted(by_step)]


def write_curves(
    metrics_path: str | Path, out_dir: str | Path, panels: Sequence[Panel] = PANELS
) -> list[Path]:
    """Write curves.png (all panels that have data) and <panel name>.png; returns the paths.

    Raises ValueError when the file has no metric that any panel shows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_metrics(metrics_path)
    shown = [(panel, series) for panel in panels if (series := panel.series(rows))]
    if not shown:
        raise ValueError(f"{metrics_path}: none of its {len(rows)} rows has a metric to draw")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    def save(pictured: Sequence[tuple[Panel, dict]], path: Path, columns: int) -> Path:
        lines = -(-len(pictured) // columns)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(4.6 * columns, 3.0 * lines), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        ends = []
        for index, (panel, series) in enumerate(pictured):
            axes = figure.add_subplot(lines, columns, index + 1)
            ends.append((axes, draw_panel(axes, panel, series)))
        figure.canvas.draw()  # layout first: data coordinates are final only now
        for axes, line_ends in ends:
            _label_lines(axes, line_ends)
        figure.savefig(path)
        return path

    paths = [save(shown, out / "curves.png", min(3, len(shown)))]
    paths += [save([item], out / f"{item[0].name}.png", 1) for item in shown]
    return paths


def plain_axes(axes: Axes, title: str, *, grid: Literal["x", "y"]) -> None:
    """Axes without a frame but for the line below, with faint lines across `grid`."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.tick_params(labelsize=8, length=0, colors=INK)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def draw_panel(
    axes: Axes, panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]
) -> list[tuple[str, float, str]]:
    """Draw one panel: raw values faint, their running mean in full; or stacked areas.

    Returns (label, height of its right end in data units, colour) of each named line.
    """
    plain_axes(axes, panel.title, grid="y")
    axes.set_xlabel("step", fontsize=8, color=INK)
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(series)}
    ends = []
    if panel.stacked:
        steps = np.unique(np.concatenate([steps for steps, _ in series.values()]))
        total = np.zeros(len(steps))
        for label, (own_steps, values) in series.items():
            # A stage that is absent from a step took no time in it.
            layer = np.zeros(len(steps))
            layer[np.searchsorted(steps, own_steps)] = values
            layer = running_mean(layer)
            axes.fill_between(steps, total, total + layer, color=colour[label], linewidth=0)
            ends.append((label, total[-1] + layer[-1] / 2, colour[label]))
            total = total + layer
    else:
        for label, (steps, values) in series.items():
            smooth = running_mean(values)
            axes.plot(steps, values, color=colour[label], linewidth=0.7, alpha=0.25)
            axes.plot(steps, smooth, color=colour[label], linewidth=1.6)
            if len(steps) == 1:
                axes.plot(steps, values, "o", color=colour[label], markersize=4)
            ends.append((label, smooth[-1], colour[label]))
    axes.margins(x=0)
    if all(values.min() >= 0 for _, values in series.values()):
        axes.set_ylim(bottom=0)
    if len(ends) == 1 and not ends[0][0]:
        return []  # the title says it all
    return [(label or "all", height, colour) for label, height, colour in ends]


def running_mean(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred mean over about `share` of the points, cut off at both ends. (n,) -> (n,)."""
    half = int(len(values) * share) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart to at least `gap`, keeping their order and, as far as it goes, their
    places: overlapping runs are centred on their mean."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[list[float]] = []  # [sum of wanted first positions, members]
    for rank, i in enumerate(order):
        blocks.append([positions[i] - rank * gap, 1])
        # Merge while a block would start before the one below it (pool adjacent violators).
        while len(blocks) > 1 and blocks[-1][0] / blocks[-1][1] < blocks[-2][0] / blocks[-2][1]:
            wanted, members = blocks.pop()
            blocks[-1][0] += wanted
            blocks[-1][1] += members
    placed = [0.0] * len(positions)
    rank = 0
    for wanted, members in blocks:
        for _ in range(int(members)):
            placed[order[rank]] = wanted / members + rank * gap
            rank += 1
    return placed


def _label_lines(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the right ends, pushed apart in points so that they do not overlap."""
    to_points = 72 / axes.figure.dpi
    bottom = axes.transAxes.transform((0, 0))[1]
    wanted = [(axes.transData.transform((0, y))[1] - bottom) * to_points for _, y, _ in ends]
    placed = spread(wanted, 9.5)
    # Names pushed above the panel would run into its neighbour's title.
    available = axes.get_window_extent().height * to_points
    excess = max(0.0, max(placed, default=0.0) - available)
    for (label, _, colour), height in zip(ends, placed, strict=True):
        axes.annotate(
            label,
            xy=(1, 0),
            xycoords="axes fraction",
            xytext=(4, height - excess),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat
