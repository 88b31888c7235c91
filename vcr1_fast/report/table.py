"""Tables for a terminal, a pipe, and Markdown.

A Table is plain text cells, so that the terminal and the README show the same digits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text. `left` columns are aligned left, the others right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    left: frozenset[int] = frozenset({0})

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells for {len(self.columns)} columns: {list(row)}")


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Print with rich in a terminal; unwrapped, uncoloured text over a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    file = file or sys.stdout
    # A pipe has no width; rich would assume 80 and wrap cells that grep and diff want whole.
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=10_000, color_system=None)
    view = RichTable(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", pad_edge=False)
    for index, column in enumerate(table.columns):
        justify = "left" if index in table.left else "right"
        view.add_column(column, justify=justify, no_wrap=True)
    for row in table.rows:
        view.add_row(*(Text(cell) for cell in row))  # Text: brackets are not rich mark-up
    console.print(view)


def markdown_table(table: Table) -> str:
    """GitHub Markdown, columns padded so that the source reads well too. Ends without a newline."""
    rows = [[_escape(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
    rules = [
        "-" * width if i in table.left else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    lines = []
    for row in (rows[0], rules, *rows[1:]):
        cells = [
            cell.ljust(width) if i in table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluation_table(summary: Mapping[str, Any]) -> Table:
    """One row a metric: score, interval (primary metric only), floor, and the task's failures.

    `summary` is what `vcr1 eval` writes to summary.json.
    """
    rows = []
    for name, task in summary["tasks"].items():
        primary = task["primary"]
        metrics = [primary, *(metric for metric in task["metrics"] if metric != primary)]
        for metric in metrics:
            first = metric == primary
            low, high = task["interval"]
            rows.append(
                [
                    name if first else "",
                    metric,
                    number(task["metrics"][metric]),
                    f"{number(low)} to {number(high)}" if first else "",
                    number(task["floor"].get(metric)),
                    str(task["n"]) if first else "",
                    f"{100 * task['parse_failure_rate']:.1f} %" if first else "",
                    str(task["unfinished"]) if first else "",
                ]
            )
    columns = ["task", "metric", "score", "95 %", "no look", "n", "unparsed", "cut off"]
    quarantined = len(summary["quarantined"])
    title = f"{quarantined} quarantined, in no score" if quarantined else None
    return Table(columns, rows, title=title, left=frozenset({0, 1}))


def stages_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a task: the no-look floor, the primary metric after each stage, and the gain of the
    last stage over the first.

    Each run (one seed) maps a stage's name to what `vcr1 eval` writes; with several runs a cell is
    their mean and, in brackets, their range.
    """
    stages = list(runs[0])
    rows = []
    for name, task in runs[0][stages[0]]["tasks"].items():
        metric = task["primary"]
        tasks = {stage: [run[stage]["tasks"][name] for run in runs] for stage in stages}
        scores = [[task["metrics"][metric] for task in tasks[stage]] for stage in stages]
        floors = [task["floor"][metric] for task in tasks[stages[0]]]
        gains = [last - first for first, last in zip(scores[0], scores[-1], strict=True)]
        cells = [_mean_and_range(values) for values in (floors, *scores)]
        rows.append([name, metric, str(task["n"]), *cells, _mean_and_range(gains, sign="+")])
    columns = ["task", "metric", "n", "no look", *stages, "gain"]
    return Table(columns, rows, left=frozenset({0, 1}))


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; an en dash where there is no value."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}"


def _mean_and_range(values: Sequence[float], sign: str = "") -> str:
    mean = f"{sum(values) / len(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
