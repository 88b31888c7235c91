"""Fill the tables of README.md and docs/ from the measurements in benches/results/.

    python benches/readme_tables.py            write the tables
    python benches/readme_tables.py --check    exit 1 when a page differs from them

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. NAME is "demo", made from
demo_*.json (one file a seed); "integrations", the steps of other trainers with our ops in them;
"ops", a summary of all other benches; or the stem of a file that benches/harness.py wrote.
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
PAGES = (ROOT / "README.md", ROOT / "docs" / "integrations.md", ROOT / "docs" / "ops.md")
MARKED = re.compile(r"(<!-- table:([\w.-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def build(name: str, results: Path) -> str:
    """Markdown of the table NAME. Raises ValueError for a name without results."""
    if name == "demo":
        return demo_markdown(_load(name, results, "demo_*.json"))
    if name == "integrations":
        return steps_markdown(_load(name, results, "integrations_*.json"))
    if name == "ops":
        contents = _load(name, results, "*.json")
        # A demo has no rows.
        benches = [content for content in contents if "rows" in content]
        return ops_markdown([b for b in benches if b["header"]["stem"] != "integrations"])
    return bench_markdown(_load(name, results, f"{name}.json")[0])


def _load(name: str, results: Path, pattern: str) -> list[dict[str, Any]]:
    paths = sorted(results.glob(pattern))
    if not paths:
        raise ValueError(f"table:{name} needs {results / pattern}, there is none")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def bench_markdown(content: Mapping[str, Any]) -> str:
    """Every row of one bench, and below it the machine, the versions and the commit."""
    columns = ["op", "shape", "dtype", "other", "ms", "ours, ms", "speed-up", "GB/s", "of limit"]
    columns += ["error", "ours", "extra MiB", "ours"]
    rows = []
    for row in content["rows"]:
        if "skipped" in row:
            cells = [row["skipped"], *[""] * (len(columns) - 5)]
        else:
            cells = [
                f"{row['baseline_ms']:.3f}",
                f"{row['ours_ms']:.3f}",
                f"{row['speedup']:.1f}x",
                f"{row['GBps']:.1f}",
                _share(row),
                *(f"{row[key]:.1e}" if key in row else "" for key in _ERRORS),
                *(f"{row[key]:.0f}" if key in row else "" for key in _MEMORY),
            ]
        rows.append([row["op"], row["shape"], row["dtype"], row["baseline"], *cells])
    table = markdown_table(Table(columns, rows, left=frozenset({0, 1, 2, 3})))
    return f"{table}\n\nGeometric mean {content['geometric_mean']:.1f}x. {_machines([content])[0]}"


_ERRORS, _MEMORY = (
    tuple(f"{side}_{what}" for side in ("baseline", "ours")) for what in ("error", "extra_MiB")
)


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['percent_of_limit']:.0f} % {row['limit']}"


def ops_markdown(contents: Sequence[Mapping[str, Any]]) -> str:
    """One row an op and machine: its longest case beside the fastest other, the geometric mean
    and the range of that ratio over all cases; below it the machines and what was not timed."""
    rows = []
    for content in contents:
        cases: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
        for row in content["rows"]:
            if "skipped" not in row:
                fastest = cases.setdefault(row["op"], {})
                key = (row["shape"], row["dtype"])
                fastest[key] = min(fastest.get(key, row), row, key=lambda r: r["baseline_ms"])
        header = content["header"]
        for op, fastest in cases.items():
            shown = max(fastest.values(), key=lambda r: r["ours_ms"])
            name = op if op.startswith(header["stem"]) else f"{header['stem']}: {op}"
            ratios = [row["baseline_ms"] / row["ours_ms"] for row in fastest.values()]
            ratio = f"{shown['baseline_ms'] / shown['ours_ms']:.1f}x"
            if len(ratios) > 1:
                mean = statistics.geometric_mean(ratios)
                ratio += f" (mean {mean:.1f}, {min(ratios):.1f} to {max(ratios):.1f})"
            memory = " / ".join(f"{shown[key]:.0f}" for key in _MEMORY if key in shown)
            rows.append(
                [
                    name,
                    header["device"],
                    f"{shown['shape']} {shown['dtype']}",
                    shown["baseline"],
                    f"{shown['baseline_ms']:.2f}",
                    f"{shown['ours_ms']:.2f}",
                    ratio,
                    _share(shown),
                    memory,
                ]
            )
    columns = ["op", "device", "case", "fastest other", "ms", "ours, ms"]
    columns += ["speed-up (all cases)", "of limit", "extra MiB, other / ours"]
    table = markdown_table(Table(columns, rows, left=frozenset({0, 1, 2, 3})))
    notes = [*_machines(contents), *_not_timed(contents)]
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes)


def steps_markdown(contents: Sequence[Mapping[str, Any]]) -> str:
    """One row a step: as the trainer runs it, and with our ops."""
    columns = ["step", "case", "without", "ms", "with ours, ms", "speed-up"]
    columns += ["extra MiB, without / with"]
    rows = [
        [
            row["op"],
            f"{row['shape']} {row['dtype']}",
            row["baseline"],
            f"{row['baseline_ms']:.0f}",
            f"{row['ours_ms']:.0f}",
            f"{row['speedup']:.1f}x",
            " / ".join(f"{row[key]:.0f}" for key in _MEMORY if key in row),
        ]
        for content in contents
        for row in content["rows"]
        if "skipped" not in row
    ]
    table = markdown_table(Table(columns, rows, left=frozenset({0, 1, 2})))
    return f"{table}\n\n" + "\n".join(_machines(contents))


def _machines(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence a machine: threads, versions, commits and days of its measurements."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for header in (content["header"] for content in contents):
        key = (header["device"], header["threads"], header["torch"], header["python"])
        groups.setdefault(key, []).append(header)
    lines = []
    for (device, threads, torch, python), headers in groups.items():
        peers = {name: v for header in headers for name, v in header.get("peers", {}).items()}
        versions = [f"torch {torch}", f"Python {python}"]
        versions += [f"{name} {version}" for name, version in sorted(peers.items())]
        commits = list(dict.fromkeys(header["commit"] for header in headers))
        days = sorted({header["date"][:10] for header in headers})
        lines.append(
            f"{device}, {threads} thread{'s' * (threads > 1)}; {', '.join(versions)}; "
            f"commit {', '.join(commits)}; {', '.join(days)}."
        )
        load = max(header.get("other_load") or 0.0 for header in headers)
        if load > 0.1:
            lines[-1] += f" Not clean: others kept up to {load:.1f} processors busy."
    return lines


def _not_timed(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The peers that no row of a device has a time for, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for content in contents:
        timed = {row["baseline"] for row in content["rows"] if "skipped" not in row}
        for row in content["rows"]:
            if "skipped" in row and row["baseline"] not in timed:
                names = reasons.setdefault((content["header"]["device"], row["skipped"]), [])
                if row["baseline"] not in names:
                    names.append(row["baseline"])
    return [
        f"Not timed on {device}, {reason}: {', '.join(names)}."
        for (device, reason), names in reasons.items()
    ]


def demo_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over the seeds, and below it what was run."""
    table = markdown_table(stages_table([summary["stages"] for summary in summaries]))
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    minutes = [sum(summary["seconds"].values()) / 60 for summary in summaries]
    kind = "Mean (lowest to highest) over seeds" if len(summaries) > 1 else "Seed"
    return f"{table}\n\n{kind} {seeds}; {max(minutes):.1f} minutes at most, on the CPU."


def fill(page: str, results: Path) -> str:
    """The page's text with every marked table replaced; the rest stays as it is."""
    opened, whole = page.count("<!-- table:"), len(MARKED.findall(page))
    if opened != whole or page.count("<!-- /table -->") != whole:
        raise ValueError(f"{opened} table markers open, {whole} are closed properly")
    return MARKED.sub(lambda m: f"{m[1]}\n{build(m[2], results)}\n\n{m[4]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 when --check finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--pages", type=Path, nargs="+", default=list(PAGES))
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    options = parser.parse_args(arguments)
    stale = 0
    for page in options.pages:
        old = page.read_text(encoding="utf-8")
        new = fill(old, options.results)
        if not options.check:
            page.write_text(new, encoding="utf-8")
        elif old != new:
            stale = 1
            drift = difflib.unified_diff(
                old.splitlines(), new.splitlines(), page.name, "benches/results", lineterm="", n=0
            )
            print("\n".join(drift))
            print(f"{page.name} differs from benches/results: run python benches/readme_tables.py")
    return stale


if __name__ == "__main__":
    sys.exit(main())
