"""Prompt templates: texts with named placeholders, the built-in ones and those of a file.

`{name}` is filled with the task's field of that name; `{{` and `}}` are braces. Names are plain:
no attribute or index of a field can be looked up, and the text filled in is not parsed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcr1_fast.tasks.record import Record

if TYPE_CHECKING:
    from vcr1_fast.tasks.base import Task

_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}"}
_CLOSING = re.compile(r"</([A-Za-z_][\w-]*)>", re.ASCII)
KINDS = ("think", "no_think")


@dataclass(frozen=True)
class PromptTemplate:
    """Prompts of a task, with reasoning before the answer and without. None: no such prompt."""

    no_think: str | None
    think: str | None

    def fill(self, think: bool, value: Callable[[str], str]) -> str:
        """The prompt, with `value(name)` in each placeholder. ValueError without such a prompt."""
        template = self.think if think else self.no_think
        if template is None:
            raise ValueError(f"the prompt template has no {'think' if think else 'no_think'} text")
        return _PIECE.sub(lambda m: _BRACES.get(m[0]) or value(m[1]), template)


def ask(question: str, answer: str) -> PromptTemplate:
    """A question and how to answer it: `answer` names the content and shows the tags."""
    return PromptTemplate(
        f"{question} Reply {answer}.",
        f"{question} First reason step by step inside <think> </think>{{times}}. "
        f"Then reply {answer}.",
    )


def ask_for_times(record: Record) -> str:
    """The text for `{times}` in every task: empty for an image, which has no times."""
    if record.image is not None:
        return ""
    return ", giving the times you rely on as <timestep>2.0 to 3.5</timestep>"


def placeholder_names(text: str) -> list[str]:
    """Names of the placeholders of a text, in order. ValueError for a brace that is neither a
    placeholder's nor doubled, such as those of an attribute or index look-up."""
    found = []
    for match in _PIECE.finditer(text):
        if match[1]:
            found.append(match[1])
        elif match[0] not in _BRACES:
            near = text[max(match.start() - 8, 0) : match.end() + 16]
            raise ValueError(f"expected {{name}}, or a doubled brace, at {near!r}")
    return found


def example_tags(template: PromptTemplate) -> set[str]:
    """Names of the tags that the prompts show closed, as in `<answer>B</answer>`."""
    return set(_CLOSING.findall(f"{template.think or ''} {template.no_think or ''}"))


def load_prompts(path: str | Path, tasks: Mapping[str, Task]) -> dict[str, PromptTemplate]:
    """Prompt templates by task from a YAML or JSON file: task -> {think: text, no_think: text},
    either of the two or both.

    ValueError, naming the file, task and field: for an unknown task or field, and for a prompt that
    leaves out a field the task cannot be answered without, or a tag that its parser reads. OSError
    where the file cannot be read.
    """
    content = _load(Path(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected task: {{think: text, no_think: text}}")
    templates = {}
    for name, given in content.items():
        if name not in tasks:
            raise ValueError(f"{path}: unknown task {name!r}; known: {', '.join(sorted(tasks))}")
        if not isinstance(given, dict) or not given or not set(given) <= set(KINDS):
            raise ValueError(f"{path}: {name}: expected think and no_think, got {given!r:.80}")
        templates[name] = PromptTemplate(given.get("no_think"), given.get("think"))
        try:
            check_prompt_template(replace(tasks[name], prompt_template=templates[name]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return templates


@contextmanager
def prompts_from(
    path: str | Path | None, tasks: MutableMapping[str, Task], *, think: bool
) -> Iterator[None]:
    """Use the prompt templates of a file inside the `with` block, in the whole process; tasks that
    the file does not name keep their own. No file: no change.

    ValueError as `load_prompts`, and for a task whose template lacks the kind of prompt needed.
    """
    templates = {} if path is None else load_prompts(path, tasks)
    kind = "think" if think else "no_think"
    for name, template in templates.items():
        if getattr(template, kind) is None:
            raise ValueError(f"{path}: {name} has no {kind} text, which this run needs")
    own = {name: tasks[name] for name in templates}
    try:
        for name, template in templates.items():
            tasks[name] = replace(tasks[name], prompt_template=template)
        yield
    finally:
        tasks.update(own)


def check_prompt_template(task: Task) -> None:
    """ValueError, naming task and kind, for prompts that do not fit the task's fields and tags."""
    for kind in KINDS:
        text = getattr(task.prompt_template, kind)
        if text is not None:
            try:
                _check(task, kind, text)
            except ValueError as error:
                raise ValueError(f"{task.name}.{kind}: {error}") from None


def _check(task: Task, kind: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a text, got {text!r:.80}")
    given = placeholder_names(text)
    for name in given:
        if name not in task.placeholders:
            known = ", ".join(f"{{{field}}}" for field in task.placeholders)
            raise ValueError(f"unknown field {{{name}}}; the task has {known}")
    for alternatives in task.required_placeholders:
        if not set(alternatives) & set(given):
            missing = " or ".join(f"{{{name}}}" for name in alternatives)
            raise ValueError(f"{missing} is missing: the question cannot be answered without it")
    tags = (*task.tags, "think") if kind == "think" else task.tags
    for tag in tags:
        if f"<{tag}>" not in text:
            raise ValueError(f"it does not ask for <{tag}>, which the parser reads")


def _load(path: Path) -> Any:
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
