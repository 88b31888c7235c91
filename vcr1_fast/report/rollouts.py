"""rollouts.jsonl -> one self-contained HTML page.

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
from typing import Any

from vcr1_fast.report.jsonl import read_jsonl

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #0072b2; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto;
  padding: 0 1rem; }
form { position: sticky; top: 0; padding: .6rem 0; background: Canvas; display: flex; gap: 1rem;
  border-bottom: 1px solid var(--line); flex-wrap: wrap; align-items: baseline; }
section { margin: 1.4rem 0; border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem 1rem; }
h2 { font-size: 1rem; margin: 0 0 .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0;
  font: 13px/1.4 ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; margin-top: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-top: 1px solid var(--line); }
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
    const step = +card.dataset.step;
    const fits = (!task.value || card.dataset.task === task.value)
      && (from.value === '' || step >= +from.value) && (to.value === '' || step <= +to.value)
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
    rollouts_path: str | Path, out_path: str | Path, *, max_prompts: int = 1000
) -> Path:
    """Write the page; returns its path.

    Each line of the file is one completion: step, task, id, prompt, target, completion, rewards
    (name -> number), and optionally advantage. Consecutive lines of one step and id form a group.
    Of more than `max_prompts` groups, that many evenly spaced ones are shown, the last included.
    """
    if max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
    rows = read_jsonl(rollouts_path)
    for row in rows:
        missing = [name for name in ("step", "task", "id", "completion") if name not in row]
        if missing:
            raise ValueError(f"{rollouts_path}: a rollout has no {missing[0]!r}: {str(row)[:80]}")
    groups = [list(group) for _, group in groupby(rows, key=lambda row: (row["step"], row["id"]))]
    kept = groups
    if len(groups) > max_prompts:
        last = len(groups) - 1
        kept = [groups[last - i * len(groups) // max_prompts] for i in range(max_prompts)][::-1]
    note = f"{len(kept)} of {len(groups)} prompts, {len(rows)} completions in the file"
    page = _page(Path(rollouts_path).name, note, kept)
    Path(out_path).write_text(page, encoding="utf-8")
    return Path(out_path)


def _page(title: str, note: str, groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    tasks = sorted({str(group[0]["task"]) for group in groups})
    options = "".join(f"<option>{_text(task)}</option>" for task in tasks)
    cards = "\n".join(_card(group) for group in groups)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{_text(title)}</title><style>{STYLE}</style></head><body>
<h1>Rollouts</h1><p>{_text(title)}: {_text(note)}.</p>
<form>
<label>task <select name="task"><option value="">all</option>{options}</select></label>
<label>steps <input name="from" type="number" style="width:6em"></label>
<label>to <input name="to" type="number" style="width:6em"></label>
<label>text <input name="text" type="search"></label><output></output>
</form>
{cards}
<script>{SCRIPT}</script></body></html>
"""


def _card(group: Sequence[Mapping[str, Any]]) -> str:
    """One prompt with its completions, best total reward first."""
    head = group[0]
    names = list(dict.fromkeys(name for row in group for name in row.get("rewards", {})))
    ranked = sorted(group, key=lambda row: -sum(row.get("rewards", {}).values()))
    advantage = any("advantage" in row for row in group)
    columns = [*names, *(["advantage"] if advantage else [])]
    heads = "".join(f'<th class="n">{_text(name)}</th>' for name in columns)
    lines = []
    for row in ranked:
        values = [row.get("rewards", {}).get(name) for name in names]
        values += [row.get("advantage")] if advantage else []
        cells = "".join(f'<td class="n">{_number(value)}</td>' for value in values)
        lines.append(f"<tr><td><pre>{_text(row['completion'])}</pre></td>{cells}</tr>")
    return (
        f'<section data-step="{_text(head["step"])}" data-task="{_text(head["task"])}">'
        f"<h2>step {_text(head['step'])}, {_text(head['task'])}, {_text(head['id'])}</h2>"
        f"<pre>{_text(head.get('prompt', ''))}</pre>"
        f'<pre class="target">target: {_text(head.get("target", ""))}</pre>'
        f"<table><tr><th>completion</th>{heads}</tr>{''.join(lines)}</table></section>"
    )


def _text(value: Any) -> str:
    """Text of anything, escaped for element content and double-quoted attributes."""
    return html.escape(value if isinstance(value, str) else json.dumps(value), quote=True)


def _number(value: Any) -> str:
    return _text("" if value is None else f"{value:.3g}" if isinstance(value, float) else value)
