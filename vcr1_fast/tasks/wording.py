"""Prompts as texts with named gaps, the built-in ones and those of a file.

In a wording `{name}` is filled with the task's field of that name and `{{`, `}}` are braces. Names
are plain: nothing is looked up in what they stand for, and what is filled in is not read again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcr1_fast.tasks.base import Task

_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}"}
KINDS = ("think", "no_think")


@dataclass(frozen=True)
class Wording:
    """How a task asks: with reasoning before the answer, and without. None: not worded so."""

    no_think: str | None
    think: str | None

    def fill(self, think: bool, value: Callable[[str], str]) -> str:
        """The prompt, `value(name)` filling each gap. ValueError where it is not worded so."""
        template = self.think if think else self.no_think
        if template is None:
            raise ValueError(
                f"the prompts given have no {'think' if think else 'no_think'} wording"
            )
        return _PIECE.sub(lambda m: _BRACES.get(m[0]) or value(m[1]), template)


def ask(question: str, answer: str) -> Wording:
    """The question, then how to answer it: `answer` names the content and shows the tags."""
    return Wording(
        f"{question} Reply {answer}.",
        f"{question} First reason step by step inside <think> </think>, giving the times you rely "
        f"on as <timestep>2.0 to 3.5</timestep>. Then reply {answer}.",
    )


def names(template: str) -> list[str]:
    """The gaps of a wording, in order. ValueError for a brace that is neither a gap's nor doubled,
    attribute and index look-ups among them."""
    found = []
    for match in _PIECE.finditer(template):
        if match[1]:
            found.append(match[1])
        elif match[0] not in _BRACES:
            near = template[max(match.start() - 8, 0) : match.end() + 16]
            raise ValueError(f"expected {{name}}, or a doubled brace, at {near!r}")
    return found


def load_prompts(path: str | Path, tasks: Mapping[str, Task]) -> dict[str, Wording]:
    """Wordings by task from a YAML or JSON file: task -> {think: text, no_think: text}, either of
    the two or both.

    ValueError, naming the file, task and field: for an unknown task or field; for a wording that
    leaves out a field the task cannot be answered without, or a tag that its parser reads. OSError
    where the file cannot be read.
    """
    content = _read(Path(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected task: {{think: text, no_think: text}}")
    wordings = {}
    for name, given in content.items():
        if name not in tasks:
            raise ValueError(f"{path}: unknown task {name!r}; known: {', '.join(sorted(tasks))}")
        if not isinstance(given, dict) or not given or not set(given) <= set(KINDS):
            raise ValueError(f"{path}: {name}: expected think and no_think, got {given!r:.80}")
        wordings[name] = Wording(given.get("no_think"), given.get("think"))
        try:
            check_wording(replace(tasks[name], wording=wordings[name]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return wordings


@contextmanager
def prompts_from(
    path: str | Path | None, tasks: MutableMapping[str, Task], *, think: bool
) -> Iterator[None]:
    """Have the tasks ask in the words of a file meanwhile; those it does not name, and all without
    a file, ask in their own. Errors as `load_prompts`, and for a task worded in the other way only.
    """
    wordings = {} if path is None else load_prompts(path, tasks)
    kind = "think" if think else "no_think"
    for name, wording in wordings.items():
        if getattr(wording, kind) is None:
            raise ValueError(f"{path}: {name} has no {kind} wording, which this run needs")
    own = {name: tasks[name] for name in wordings}
    try:
        for name, wording in wordings.items():
            tasks[name] = replace(tasks[name], wording=wording)
        yield
    finally:
        tasks.update(own)


def check_wording(task: Task) -> None:
    """ValueError, naming task and kind, where the task's prompts and its fields or tags do not go
    together."""
    for kind in KINDS:
        text = getattr(task.wording, kind)
        if text is not None:
            try:
                _check(task, kind, text)
            except ValueError as error:
                raise ValueError(f"{task.name}.{kind}: {error}") from None


def _check(task: Task, kind: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a text, got {text!r:.80}")
    given = names(text)
    for name in given:
        if name not in task.fields:
            known = ", ".join(f"{{{field}}}" for field in task.fields)
            raise ValueError(f"unknown field {{{name}}}; the task has {known}")
    for alternatives in task.needs:
        if not set(alternatives) & set(given):
            missing = " or ".join(f"{{{name}}}" for name in alternatives)
            raise ValueError(f"{missing} is missing: the question cannot be answered without it")
    tags = (*task.tags, "think") if kind == "think" else task.tags
    for tag in tags:
        if f"<{tag}>" not in text:
            raise ValueError(f"it does not ask for <{tag}>, which the parser reads")


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
