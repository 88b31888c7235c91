"""Writes rollouts.jsonl, or an evaluation's predictions, as one self-contained HTML page.

The page holds its data as JSON; `viewer.js` sorts, filters and draws the prompts as they scroll
into view, so that 50,000 completions open in seconds. Model text is untrusted: the script sets it
as text alone, and the page's content policy allows no other script and no network at all; videos
are played from their files.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vcr1_fast.data.requests import clip_key
from vcr1_fast.files import read_jsonl, write_atomic
from vcr1_fast.report.pictures import (
    COLOURS,
    MAX_BYTES,
    Picture,
    boxes_at,
    pictures_of,
    plain,
    spans_of,
)
from vcr1_fast.tasks import TASKS

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record
    from vcr1_fast.data.video import ClipReader

RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
CURVES = ("reward", "val/score", "finished", "length", "loss", "kl", "entropy", "grad_norm")
"""Metrics in the page's head; those that a run lacks are left out."""
CURVE_POINTS = 200
MAX_PROMPTS = 20_000
"""Prompts that a page lists; of more, evenly spaced ones."""


@dataclass(frozen=True)
class RunData:
    """A run as a page shows it: completions, one a row, and what its head says.

    rows: as in rollouts.jsonl, those of one group in a row. records: by id; only prompts whose
    record is known have pictures. metrics: rows of metrics.jsonl. settings: by dotted name.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    records: Mapping[str, Record] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a rollouts file. ValueError, naming the file, for a row that is no completion."""
    rows = [row for _, row in read_jsonl(path, torn="skip")]
    for row in rows:
        missing = [name for name in ("step", "task", "id", "completion") if name not in row]
        if missing:
            raise ValueError(f"{path}: a rollout has no {missing[0]!r}: {str(row)[:80]}")
    return rows


def write_rollouts_html(
    runs: str | Path | Sequence[RunData],
    out_path: str | Path,
    *,
    max_prompts: int = MAX_PROMPTS,
    pictured: int = 200,
    records: Mapping[str, Record] | None = None,
    reader: ClipReader | None = None,
    max_bytes: int = MAX_BYTES,
    watch: int = 0,
) -> Path:
    """Write the page of one run, or of several side by side; returns its path.

    runs: a rollouts file, with its `records` by id, or runs. Each row is one completion: step,
    task, id, prompt, target, completion, rewards (name -> number), and optionally reward,
    advantage, tokens, finished. Consecutive rows of one step, id and `group` (a number, where there
    is one) form a group. Of more than `max_prompts` groups, that many evenly spaced ones are shown,
    the last included. Of `pictured` of them, half the worst and half evenly spaced, the frames are
    shown, and the boxes and spans that its completions predict beside the annotated ones, until the
    frames take `max_bytes`; `reader` reads the clips (default: in this process). `watch`: seconds
    after which the page reads its file again; 0: never.
    """
    if max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
    if isinstance(runs, str | Path):
        runs = [RunData(Path(runs).name, read_rollouts(runs), records or {})]
    several = len(runs) > 1
    page = _Page("Rollouts", Path(out_path), max_prompts, watch=watch)
    for run in runs:
        groups = [list(group) for _, group in groupby(run.rows, key=_group_key)]
        page.add(run, groups, several=several)
    page.draw(pictured, reader, max_bytes)
    return page.write()


def write_predictions_html(
    lines: Sequence[Mapping[str, Any]],
    records: Mapping[str, Record],
    out_path: str | Path,
    *,
    think: bool | None,
    max_examples: int = 40,
    reader: ClipReader | None = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the page of an evaluation: `lines` as in predictions.jsonl, their `records` by id.

    `think`: whether the prompts asked for reasoning; None where they are not known: the record's
    texts are shown. Other prompt templates are shown where the call is within `prompts_from`.
    Of more than `max_examples`, that many evenly spaced ones are shown. Frames, boxes and spans as
    in `write_rollouts_html`; of several passes over a clip also the spans each was aimed at.
    """
    page = _Page("Predictions", Path(out_path), max_examples, total=False)
    groups = []
    for line in lines:
        record, passes = records[line["id"]], enumerate(line.get("passes", ()), start=1)
        aims = {f"pass {number} aims": one["spans"] for number, one in passes if one["spans"]}
        asked = _question(record) if think is None else TASKS[record.task].prompt(record, think)
        primary = TASKS[record.task].primary
        groups.append(
            [
                {
                    "task": line["task"],
                    "id": line["id"],
                    "prompt": asked,
                    "target": line["answer"],
                    "completion": line["completion"],
                    "rewards": line["metrics"],
                    "reward": line["metrics"].get(primary, 0.0),
                    "prediction": line["prediction"],
                    "aims": aims,
                    **{name: line[name] for name in ("finished", "tokens") if name in line},
                }
            ]
        )
    page.add(RunData("", [], records), groups, several=False)
    page.metric = "metric to watch"
    page.draw(max_examples, reader, max_bytes)
    return page.write()


class _Page:
    """The data of a page, gathered group by group."""

    def __init__(
        self, heading: str, path: Path, limit: int, *, total: bool = True, watch: int = 0
    ) -> None:
        self.heading, self.path, self.limit = heading, path, limit
        self.total, self.watch, self.metric = total, watch, "reward"
        self.groups: list[dict[str, Any]] = []
        self.records: list[Record | None] = []
        self.rows: list[list[Mapping[str, Any]]] = []
        self.clips: list[dict[str, Any]] = []
        self.runs: dict[str, str] = {}
        self.curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        self.settings: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def add(
        self, run: RunData, groups: Sequence[Sequence[Mapping[str, Any]]], *, several: bool
    ) -> None:
        """A run's groups, curves and settings."""
        name, index = (run.name if several else ""), len(self.runs)
        self.runs[name] = RUN_COLOURS[index % len(RUN_COLOURS)]
        kept = _spaced(groups, self.limit)
        completions, unit = sum(map(len, groups)), "prompts" if self.total else "answers"
        of_run = f"{name}: " if several else ""
        counted = f", {completions} completions in the file" if self.total else ""
        self.notes.append(f"{of_run}{len(kept)} of {len(groups)} {unit}{counted}")
        used: Counter[str] = Counter()
        for group in kept:
            rows = merged(group)
            self.rows.append(rows)
            self.records.append(run.records.get(group[0]["id"]))
            self.groups.append(_group_data(name, group, rows, used))
        for metric in CURVES:
            points = _thinned(
                [(r["step"], r[metric]) for r in run.metrics if _is_number(r, metric)]
            )
            if points:
                self.curves.setdefault(metric, {})[name] = points
        for setting, value in run.settings.items():
            self.settings.setdefault(setting, [""] * index).append(_text(value))
        for values in self.settings.values():
            values += [""] * (index + 1 - len(values))

    def draw(self, count: int, reader: ClipReader | None, max_bytes: int) -> None:
        """Pictures, spans and boxes of `count` groups whose records are known."""
        known = [i for i, record in enumerate(self.records) if record is not None]
        worst = sorted(known, key=lambda i: self.groups[i]["mean"])[: count // 2]
        others = [i for i in known if i not in set(worst)]
        chosen = [*worst, *_spaced(others, count - len(worst))]
        # In the order of the page, so that a limit on bytes leaves the first ones.
        chosen.sort()
        asked = [record for i in chosen if (record := self.records[i]) is not None]
        found = pictures_of(asked, reader, max_bytes=max_bytes)
        numbers: dict[Any, int] = {}
        for i, record in zip(chosen, asked, strict=True):
            picture = found.get(clip_key(record))
            if picture is None:  # beyond max_bytes
                continue
            group, key = self.groups[i], clip_key(record)
            if picture.frames and key not in numbers:
                numbers[key] = len(self.clips)
                self.clips.append(picture.as_json())
            group |= {"clip": numbers.get(key), "note": picture.fault}
            group |= {"duration": picture.duration, "annotated": spans_of(record.answer)}
            group |= {"video": self._video(record), "start": record.start or 0.0}
            group["boxes"] = _boxes(record.answer, picture)
            for data, row in zip(group["rows"], self.rows[i], strict=True):
                prediction = plain(
                    row["prediction"]
                    if "prediction" in row
                    else TASKS[record.task].parse(row["completion"], record)
                )
                data |= {"spans": spans_of(prediction), "boxes": _boxes(prediction, picture)}
            aims = self.rows[i][0].get("aims") or {}
            group["aims"] = [{"label": label, "spans": spans} for label, spans in aims.items()]

    def _video(self, record: Record) -> str | None:
        """Where the page finds the video, as a URL relative to it; None for other media."""
        path = Path(record.media)
        if record.image is not None or not path.is_file():
            return None
        return quote(os.path.relpath(path.resolve(), self.path.resolve().parent))

    def write(self) -> Path:
        """Write the file."""
        ids = Counter((group["run"], group["id"]) for group in self.groups)
        # Only where they differ, when there are several runs.
        settings = [
            (name, values)
            for name, values in self.settings.items()
            if len(self.runs) == 1 or len(set(values)) > 1
        ]
        data = {
            "groups": self.groups,
            "clips": self.clips,
            "runs": self.runs,
            "curves": self.curves,
            "settings": settings,
            "repeated": sorted({name for (_, name), count in ids.items() if count > 1}),
            "colours": COLOURS,
            "metric": self.metric,
            "total": self.total,
            "watch": self.watch,
        }
        write_atomic(self.path, _page(self.heading, self.path.name, "; ".join(self.notes), data))
        return self.path


def _group_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # The number keeps apart a record that a step holds twice; rows of earlier runs have none.
    return row["step"], row.get("group"), row["id"]


def total(row: Mapping[str, Any]) -> float:
    """A completion's reward; where it is not written down, the sum of its terms."""
    reward = row.get("reward")
    return float(sum(row.get("rewards", {}).values()) if reward is None else reward)


def ranked(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Completions of a prompt, best total reward first."""
    return sorted(group, key=lambda row: -total(row))


def merged(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Completions of a prompt, the best first; equal ones with equal rewards once, with their
    number under `times`."""
    found: dict[str, dict[str, Any]] = {}
    for row in ranked(group):
        key = json.dumps([row["completion"], row.get("rewards"), row.get("finished")])
        found.setdefault(key, {**row, "times": 0})["times"] += 1
    return list(found.values())


def _group_data(
    run: str,
    group: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    used: Counter[str],
) -> dict[str, Any]:
    """What the page's script knows of a group, without its pictures."""
    head, rewards = group[0], [total(row) for row in group]
    step = head.get("step")
    key = str(head["id"]) if step is None else f"{head['id']}@{step}"
    key = f"{run}/{key}" if run else key
    used[key] += 1
    if used[key] > 1:  # a step may hold a record twice
        key = f"{key}.{used[key]}"
    optional = ("advantage", "tokens", "finished")
    return {
        "key": key,
        "run": run,
        "step": step,
        "task": _text(head["task"]),
        "id": _text(head["id"]),
        "prompt": _text(head.get("prompt", "")),
        "target": _text(head.get("target", "")),
        "count": len(group),
        "mean": statistics.fmean(rewards),
        "spread": statistics.pstdev(rewards),
        "longest": max(row.get("tokens", len(row["completion"])) for row in group),
        "clip": None,
        "annotated": [],
        "rows": [
            {
                "text": row["completion"],
                "times": row["times"],
                "rewards": row.get("rewards", {}),
                "reward": total(row),
                **{name: row[name] for name in optional if row.get(name) is not None},
            }
            for row in rows
        ],
    }


def _boxes(answer: Any, picture: Picture) -> list[list[float] | None] | None:
    """A box a frame, None where no frame has one."""
    boxes = boxes_at(answer, picture.times)
    return boxes if any(box is not None for box in boxes) else None


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the last included."""
    if len(items) <= count:
        return list(items)
    last = len(items) - 1
    return [items[last - i * len(items) // count] for i in range(count)][::-1]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most CURVE_POINTS points: means of as many steps each."""
    size = -(-len(points) // CURVE_POINTS) or 1
    parts: Iterable[Sequence[tuple[float, float]]] = (
        points[i : i + size] for i in range(0, len(points), size)
    )
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def _is_number(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def _question(record: Record) -> str:
    lettered = zip(ascii_uppercase, record.options, strict=False)
    options = [f"({letter}) {text}" for letter, text in lettered]
    return "\n".join([*map(str, record.prompt.values()), *options])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _page(heading: str, title: str, note: str, data: Mapping[str, Any]) -> str:
    folder = Path(__file__).parent
    script = (folder / "viewer.js").read_text(encoding="utf-8")
    style = (folder / "viewer.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    # Escaped so that no text of the data can end the element that holds it; half of a surrogate
    # pair, as a byte-level tokenizer may decode, is no UTF-8.
    text = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace").decode()
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    number = '<input type="number" step="any"'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{style}</style></head><body>
<h1>{html.escape(heading)}</h1><p class="soft">{html.escape(note)}.</p>
<div id="curves" class="curves"></div>
<details id="settings"><summary>settings</summary><table class="settings"><tbody></tbody></table>
</details>
<form>
<label>sort <select name="sort"><option value="step">by step</option>
<option value="newest">newest</option><option value="worst">worst</option>
<option value="best">best</option><option value="spread">widest spread</option>
<option value="longest">longest</option><option value="record">by record</option></select></label>
<label>task <select name="task"><option value="">all</option></select></label>
<label>run <select name="run"><option value="">all</option></select></label>
<label>show <select name="kind"><option value="">all</option><option value="mixed">with a gradient
</option><option value="silent">without a gradient</option><option value="cut">cut off</option>
</select></label>
<label>reward from {number} name="low"></label><label>to {number} name="high"></label>
<label>steps from {number} name="from"></label><label>to {number} name="to"></label>
<label>record <input name="id" size="10"></label>
<label>text <input name="text" type="search"></label>
<button type="reset">all</button> <output></output>
<span class="soft">keys: j next, k previous, / search</span>
</form>
<main id="list"></main><div id="end"></div>
<script type="application/json" id="data">{text}</script>
<script>{script}</script></body></html>
"""
