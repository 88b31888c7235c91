"""Tables for a terminal, a pipe, and Markdown.

A Table is plain text cells, so that the terminal and the README show the same digits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO


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
    if table.title:
        console.print(Text(table.title))  # rich would fold a table's title to the table's width
    view = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: Literal["left", "right"] = "left" if index in table.left else "right"
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


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Every table of what `vcr1 eval` writes to summary.json: scores, scores by kind, published
    numbers beside ours, and the cost of each pass over the clips."""
    tables = [evaluation_table(summary)] if summary["tasks"] else []
    level = percent(summary["level"])
    for name, task in summary["tasks"].items():
        tables += [breakdown_table(name, task, field, level) for field in task["breakdown"]]
    for name, split in summary["published"].items():
        if name in summary["tasks"]:
            tables.append(published_table(summary["tasks"][name], split))
    return [*tables, cost_table(summary["cost"])] if summary["cost"] else tables


def evaluation_table(summary: Mapping[str, Any]) -> Table:
    """One row a metric: score, interval, blind baseline; the first, the primary metric's, also has
    the task's failures.

    `summary` is what `vcr1 eval` writes to summary.json.
    """
    rows = []
    for name, task in summary["tasks"].items():
        for metric in _metrics(task):
            first = metric == task["primary"]
            rows.append(
                [
                    name if first else "",
                    metric,
                    number(task["metrics"][metric]),
                    _interval(task["intervals"].get(metric)),
                    number(task["floor"].get(metric)),
                    str(task["n"]) if first else "",
                    f"{100 * task['parse_failure_rate']:.1f} %" if first else "",
                    str(task["unfinished"]) if first else "",
                ]
            )
    level = percent(summary["level"])
    columns = ["task", "metric", "score", level, "blind baseline", "n", "unparsed", "cut off"]
    quarantined = len(summary["quarantined"])
    title = f"{quarantined} quarantined, in no score" if quarantined else None
    return Table(columns, rows, title=title, left=frozenset({0, 1}))


def breakdown_table(name: str, task: Mapping[str, Any], field: str, level: str) -> Table:
    """One row a value of the metadata field `field`: the primary metric with its interval, whose
    coverage is `level`, then the others."""
    primary, *others = _metrics(task)
    rows = [
        [
            value,
            str(part["n"]),
            number(part["metrics"][primary]),
            _interval(part["interval"]),
            *(number(part["metrics"][metric]) for metric in others),
        ]
        for value, part in task["breakdown"][field].items()
    ]
    return Table([field, "n", primary, level, *others], rows, title=f"{name} by {field}")


def published_table(task: Mapping[str, Any], split: Mapping[str, Any]) -> Table:
    """Ours, the blind baseline and every published model, by the metrics that any reports."""
    found = {metric for scores in split["models"].values() for metric in scores}
    metrics = [metric for metric in _metrics(task) if metric in found]
    lines = {"this run": task["metrics"], "blind baseline": task["floor"], **split["models"]}
    rows = [
        [model, *(number(scores.get(metric)) for metric in metrics)]
        for model, scores in lines.items()
    ]
    note = f"; {split['note']}" if split["note"] else ""
    return Table(["model", *metrics], rows, title=f"{split['name']}: {split['source']}{note}")


def cost_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a pass over the clips: means over the records that had it."""
    rows = [
        [
            "all" if cost["number"] == 0 else str(cost["number"]),
            str(cost["records"]),
            *(f"{cost[name]:.1f}" for name in ("frames", "prompt_tokens", "tokens")),
            f"{cost['seconds']:.2f}",
        ]
        for cost in costs
    ]
    columns = ["pass", "records", "frames", "prompt tokens", "tokens", "seconds"]
    return Table(columns, rows, title="cost, mean of a record")


def _metrics(task: Mapping[str, Any]) -> list[str]:
    """Names of a task's metrics, the primary one first."""
    primary = task["primary"]
    return [primary, *(metric for metric in task["metrics"] if metric != primary)]


def _interval(bounds: Sequence[float] | None) -> str:
    return number(None) if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def stages_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a task: the blind baseline, the primary metric after each stage, and the gain of the
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
    columns = ["task", "metric", "n", "blind baseline", *stages, "gain"]
    return Table(columns, rows, left=frozenset({0, 1}))


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; an en dash where there is no value."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}"


def _mean_and_range(values: Sequence[float], sign: str = "") -> str:
    mean = f"{sum(values) / len(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
