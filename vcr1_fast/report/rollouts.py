"""Writes rollouts.jsonl, or an evaluation's predictions, as one self-contained HTML page.

Model text is untrusted: it is escaped, and the page's content policy allows no script but its own
and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from vcr1_fast.files import read_jsonl, write_atomic
from vcr1_fast.report import pictures
from vcr1_fast.report.pictures import MAX_BYTES, Pictures
from vcr1_fast.tasks import TASKS

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record
    from vcr1_fast.data.video import ClipReader

PREDICTIONS_SHOWN = len(pictures.COLOURS)
"""Completions of a prompt whose boxes and spans are shown, the best rewarded first."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #0072b2; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto;
  padding: 0 1rem; }
form { position: sticky; top: 0; z-index: 1; padding: .6rem 0; background: Canvas; display: flex;
  gap: 1rem; border-bottom: 1px solid var(--line); flex-wrap: wrap; align-items: baseline; }
section { margin: 1.4rem 0; border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem 1rem; }
h2 { font-size: 1rem; margin: 0 0 .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0;
  font: 13px/1.4 ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; margin-top: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-top: 1px solid var(--line); }
.wide { overflow-x: auto; }
td pre { min-width: 26em; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.target { color: var(--ink); }
[hidden] { display: none; }
"""

SCRIPT = """
const form = document.querySelector('form'), cards = [...document.querySelectorAll('section')];
function show() {
  const { task, from, to, text } = form.elements, words = text.value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    const step = +card.dataset.step;  // of an evaluation there are none, and no fields for them
    const fits = (!task.value || card.dataset.task === task.value)
      && (!from || from.value === '' || step >= +from.value)
      && (!to || to.value === '' || step <= +to.value)
      && (!words || card.textContent.toLowerCase().includes(words));
    card.hidden = !fits;
    count += fits;
  }
  document.querySelector('output').textContent = count + ' of ' + cards.length + ' prompts';
}
form.addEventListener('input', show);
form.addEventListener('submit', event => event.preventDefault());
show();
"""


def write_rollouts_html(
    rollouts_path: str | Path,
    out_path: str | Path,
    *,
    max_prompts: int = 1000,
    records: Mapping[str, Record] | None = None,
    reader: ClipReader | None = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the page; returns its path.

    Each line of the file is one completion: step, task, id, prompt, target, completion, rewards
    (name -> number), and optionally advantage. Consecutive lines of one step, id and `group` (a
    number, where there is one) form a group.
    Of more than `max_prompts` groups, that many evenly spaced ones are shown, the last included.
    With `records` (by id) a group is shown with frames of its clip and the boxes and spans that its
    completions predict beside the annotated ones, until the frames take `max_bytes`; `reader` reads
    the clips (default: in this process).
    """
    if max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
    rows = [row for _, row in read_jsonl(rollouts_path, torn="skip")]
    for row in rows:
        missing = [name for name in ("step", "task", "id", "completion") if name not in row]
        if missing:
            raise ValueError(f"{rollouts_path}: a rollout has no {missing[0]!r}: {str(row)[:80]}")
    groups = [list(group) for _, group in groupby(rows, key=_group)]
    kept = [ranked(group) for group in _spaced(groups, max_prompts)]
    note = f"{len(kept)} of {len(groups)} prompts, {len(rows)} completions in the file"
    pictured = [""] * len(kept)
    if records is not None:
        shown = [records.get(group[0]["id"]) for group in kept]
        known = [record for record in shown if record is not None]
        frames = Pictures(known, reader, max_bytes=max_bytes)
        pictured = [
            "" if record is None else frames.next(record, _parsed(record, group))
            for record, group in zip(shown, kept, strict=True)
        ]
    page = _page("Rollouts", Path(rollouts_path).name, note, kept, pictured)
    write_atomic(out_path, page)
    return Path(out_path)


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

    `think`: whether the prompts asked for reasoning; None: they are not known, and the records' own
    texts are shown. Other prompt templates are shown where the call is within `prompts_from`.
    Of more than `max_examples`, that many evenly spaced ones are shown. Frames, boxes and spans as
    in `write_rollouts_html`; of several passes over a clip also the spans each was aimed at.
    """
    kept = _spaced(lines, max_examples)
    frames = Pictures([records[line["id"]] for line in kept], reader, max_bytes=max_bytes)
    groups, pictured = [], []
    for line in kept:
        record, passes = records[line["id"]], enumerate(line.get("passes", ()), start=1)
        aims = {f"pass {number} aims": one["spans"] for number, one in passes if one["spans"]}
        groups.append(
            [
                {
                    "task": line["task"],
                    "id": line["id"],
                    "prompt": _question(record)
                    if think is None
                    else TASKS[record.task].prompt(record, think),
                    "target": line["answer"],
                    "completion": line["completion"],
                    "rewards": line["metrics"],
                }
            ]
        )
        pictured.append(frames.next(record, {"predicted": line["prediction"]}, aims))
    note = f"{len(kept)} of {len(lines)} answers"
    page = _page("Predictions", Path(out_path).name, note, groups, pictured)
    write_atomic(out_path, page)
    return Path(out_path)


def _group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # The number keeps apart a record that a step holds twice; rows of earlier runs have none.
    return row["step"], row.get("group"), row["id"]


def ranked(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Completions of a prompt, best total reward first."""
    return sorted(group, key=lambda row: -sum(row.get("rewards", {}).values()))


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the last included."""
    if len(items) <= count:
        return list(items)
    last = len(items) - 1
    return [items[last - i * len(items) // count] for i in range(count)][::-1]


def _parsed(record: Record, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parse = TASKS[record.task].parse
    return {
        f"{number}": parse(row["completion"], record)
        for number, row in enumerate(group[:PREDICTIONS_SHOWN], start=1)
    }


def _question(record: Record) -> str:
    lettered = zip(ascii_uppercase, record.options, strict=False)
    options = [f"({letter}) {text}" for letter, text in lettered]
    return "\n".join([*map(str, record.prompt.values()), *options])


def _page(
    heading: str,
    title: str,
    note: str,
    groups: Sequence[Sequence[Mapping[str, Any]]],
    pictured: Sequence[str],
) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    tasks = sorted({str(group[0]["task"]) for group in groups})
    options = "".join(f"<option>{_text(task)}</option>" for task in tasks)
    cards = "\n".join(map(_card, groups, pictured))
    steps = """<label>steps <input name="from" type="number" style="width:6em"></label>
<label>to <input name="to" type="number" style="width:6em"></label>"""
    if not any("step" in group[0] for group in groups):
        steps = ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{_text(title)}</title><style>{STYLE}{pictures.STYLE}</style></head><body>
<h1>{heading}</h1><p>{_text(title)}: {_text(note)}.</p>
<form>
<label>task <select name="task"><option value="">all</option>{options}</select></label>
{steps}
<label>text <input name="text" type="search"></label><output></output>
</form>
{cards}
<script>{SCRIPT}</script></body></html>
"""


def _card(group: Sequence[Mapping[str, Any]], pictured: str) -> str:
    """One prompt with its frames and its completions."""
    head = group[0]
    names = list(dict.fromkeys(name for row in group for name in row.get("rewards", {})))
    advantage = any("advantage" in row for row in group)
    columns = [*names, *(["advantage"] if advantage else [])]
    heads = "".join(f'<th class="n">{_text(name)}</th>' for name in columns)
    lines = []
    for number, row in enumerate(group, start=1):
        values = [row.get("rewards", {}).get(name) for name in names]
        values += [row.get("advantage")] if advantage else []
        cells = "".join(f'<td class="n">{_number(value)}</td>' for value in values)
        lines.append(
            f'<tr><td class="n">{number}</td><td><pre>{_text(row["completion"])}</pre></td>'
            f"{cells}</tr>"
        )
    place = f"step {_text(head['step'])}, " if "step" in head else ""
    return (
        f'<section data-step="{_text(head.get("step", ""))}" data-task="{_text(head["task"])}">'
        f"<h2>{place}{_text(head['task'])}, {_text(head['id'])}</h2>"
        f"<pre>{_text(head.get('prompt', ''))}</pre>"
        f'<pre class="target">target: {_text(head.get("target", ""))}</pre>{pictured}'
        f'<div class="wide"><table><tr><th class="n"></th><th>completion</th>{heads}</tr>'
        f"{''.join(lines)}</table></div></section>"
    )


def _text(value: Any) -> str:
    """Text of anything, escaped for element content and double-quoted attributes."""
    return html.escape(value if isinstance(value, str) else json.dumps(value), quote=True)


def _number(value: Any) -> str:
    return _text("" if value is None else f"{value:.3g}" if isinstance(value, float) else value)
