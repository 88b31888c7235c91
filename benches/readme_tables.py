"""Fill the tables of README.md from the measurements stored in benches/results/.

    python benches/readme_tables.py            write the tables
    python benches/readme_tables.py --check    exit 1 when the README differs from them

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. NAME is "demo", made from
demo_*.json (one file a seed); "ops", a summary of all benches; or the stem of a file that
benches/harness.py wrote.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vcr1_fast.report.table import Table, markdown_table, stages_table

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table:([\w.-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def build(name: str, results: Path) -> str:
    """Markdown of the table NAME. Raises ValueError for a name without results."""
    if name == "demo":
        return demo_markdown(_load(name, results, "demo_*.json"))
    if name == "ops":
        return ops_markdown(_load(name, results, "*.json"))
    return bench_markdown(_load(name, results, f"{name}.json")[0])


def _load(name: str, results: Path, pattern: str) -> list[dict[str, Any]]:
    paths = sorted(results.glob(pattern))
    if not paths:
        raise ValueError(f"table:{name} needs {results / pattern}, there is none")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def bench_markdown(content: Mapping[str, Any]) -> str:
    """Every row of one bench, and below it the machine, the versions and the commit."""
    columns = ["op", "shape", "dtype", "baseline", "ms", "ours, ms", "speed-up", "GB/s", "of limit"]
    rows = [
        [
            row["op"],
            row["shape"],
            row["dtype"],
            row["baseline"],
            f"{row['baseline_ms']:.3f}",
            f"{row['ours_ms']:.3f}",
            f"{row['speedup']:.1f}x",
            f"{row['GBps']:.1f}",
            f"{row['percent_of_limit']:.0f} % {row['limit']}",
        ]
        for row in content["rows"]
    ]
    table = markdown_table(Table(columns, rows, left=frozenset({0, 1, 2, 3})))
    return f"{table}\n\nGeometric mean {content['geometric_mean']:.1f}x. {_machine(content)}."


def ops_markdown(contents: Sequence[Mapping[str, Any]]) -> str:
    """One row an op and machine: speed-ups over the fastest baseline of each shape and dtype."""
    rows = []
    machines = {}
    for content in contents:
        if "rows" not in content:  # a demo's summary lies in the same folder
            continue
        cases: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
        for row in content["rows"]:
            best = cases.setdefault(row["op"], {})
            key = (row["shape"], row["dtype"])
            best[key] = min(best.get(key, row), row, key=lambda r: r["speedup"])
        device = content["header"]["device"]
        machines[_machine(content)] = None
        for op, best in cases.items():
            ratios = [row["speedup"] for row in best.values()]
            shares = [row["percent_of_limit"] for row in best.values()]
            baselines = sorted({row["baseline"] for row in best.values()})
            ratio = f"{statistics.geometric_mean(ratios):.1f}x"
            if len(ratios) > 1:
                ratio += f" ({min(ratios):.1f} to {max(ratios):.1f})"
            cells = [str(len(best)), ", ".join(baselines), ratio, f"{max(shares):.0f} %"]
            rows.append([op, device, *cells])
    columns = ["op", "device", "cases", "fastest other", "speed-up", "of memory limit, at best"]
    table = markdown_table(Table(columns, rows, left=frozenset({0, 1, 3})))
    notes = "\n".join(f"- {machine}" for machine in machines)
    return f"{table}\n\n{notes}"


def _machine(content: Mapping[str, Any]) -> str:
    header = content["header"]
    threads = f"{header['threads']} threads, " if header["threads"] > 1 else ""
    versions = f"torch {header['torch']}, Python {header['python']}"
    return f"{header['device']}, {threads}{versions}, commit {header['commit']}, {header['date']}"


def demo_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over the seeds, and below it what was run."""
    table = markdown_table(stages_table([summary["stages"] for summary in summaries]))
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    minutes = [sum(summary["seconds"].values()) / 60 for summary in summaries]
    kind = "Mean (lowest to highest) over seeds" if len(summaries) > 1 else "Seed"
    return f"{table}\n\n{kind} {seeds}; {max(minutes):.1f} minutes at most, on the CPU."


def fill(readme: str, results: Path) -> str:
    """The README's text with every marked table made anew; all else as it is."""
    opened, whole = readme.count("<!-- table:"), len(MARKED.findall(readme))
    if opened != whole or readme.count("<!-- /table -->") != whole:
        raise ValueError(f"{opened} table markers open, {whole} are closed properly")
    return MARKED.sub(lambda m: f"{m[1]}\n{build(m[2], results)}\n\n{m[4]}", readme)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 when --check finds the README out of date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    options = parser.parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    new = fill(old, options.results)
    if not options.check:
        options.readme.write_text(new, encoding="utf-8")
        return 0
    drift = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "README.md", "benches/results", lineterm="", n=0
    )
    lines = list(drift)
    if lines:
        print("\n".join(lines))
        print("README.md differs from benches/results: run python benches/readme_tables.py")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
