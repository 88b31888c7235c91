"""Every setting of a tree of dataclasses, with its type, default and documentation, as the code
declares them: the source of `vcr1 <command> --help` and of docs/config.md."""

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vcr1_fast.config.loader import is_settable, plain

_NAMES = {bool: "true or false", int: "int", float: "float", str: "text", type(None): "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: dotted `name`, `kind` (type and bounds in words), `default` as JSON (None: the
    setting is required), and `text`, its documentation as one paragraph."""

    name: str
    kind: str
    default: str | None
    text: str

    @property
    def summary(self) -> str:
        """The first sentence of the documentation."""
        return self.text.split(". ", 1)[0].rstrip(".")


@dataclasses.dataclass(frozen=True)
class Section:
    """The settings that one dataclass declares; `name` is "" for the root, `text` the first
    paragraph of its docstring."""

    name: str
    text: str
    settings: list[Setting]


def sections(cls: type, name: str = "", default: Any = None) -> Iterator[Section]:
    """The sections of a tree, each before those inside it. `default`: an instance that holds the
    section's defaults, where they are not those of the class."""
    hints, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    found, inner = [], []
    for field in dataclasses.fields(cls):
        where = f"{name}.{field.name}" if name else field.name
        value = _default(field) if default is None else getattr(default, field.name)
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner.append((hint, where, None if value is dataclasses.MISSING else value))
        elif is_settable(hint):
            shown = None if value is dataclasses.MISSING else json.dumps(plain(value))
            found.append(Setting(where, kind(hint), shown, docs.get(field.name, "")))
    # No docstring in the class: dataclass writes the signature there.
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    yield Section(name, " ".join(text.split()), found)
    for hint, where, value in inner:
        yield from sections(hint, where, value)


def field_docs(cls: type) -> dict[str, str]:
    """Documentation by field, as one paragraph each, of a dataclass and its bases: the string below
    the field, or its entry under "Attributes:" in the class's docstring."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        docs |= _attributes(owner.__doc__ or "")
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def kind(hint: Any) -> str:
    """A type in words: "int >= 1", "list of text", "float > 0 or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(item, key):g}"
            for mark in parts[1:]
            for item in getattr(mark, "metadata", [mark])
            for key, sign in _BOUNDS.items()
            if getattr(item, key, None) is not None
        ]
        return " ".join([kind(parts[0]), ", ".join(bounds)]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in parts)
    if origin is Literal:
        return ", ".join(json.dumps(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"list of {kind(parts[0])}"
        return f"[{', '.join(kind(part) for part in parts)}]"
    if origin is dict:
        return f"{kind(parts[1])} by name"
    return _NAMES[hint]


def help_text(cls: type) -> str:
    """All settings of a tree, one line each, for a command's help."""
    lines = ["settings (section.field=value, or in the file of --config), with their defaults:"]
    for section in sections(cls):
        for setting in section.settings:
            shown = "required" if setting.default is None else setting.default
            lines.append(f"  {setting.name} ({shown}): {setting.summary or setting.kind}")
    return "\n".join(lines) + "\n"


def page(cls: type) -> str:
    """All settings of a tree as Markdown, one table a section."""
    blocks = []
    for section in sections(cls):
        if section.name:
            blocks.append(f"### {section.name}\n\n{section.text}")
        if not section.settings:
            continue
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for setting in section.settings:
            default = "required" if setting.default is None else f"`{setting.default}`"
            cells = (f"`{setting.name}`", setting.kind, default, setting.text)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _attributes(docstring: str) -> dict[str, str]:
    _, found, entries = inspect.cleandoc(docstring).partition("\nAttributes:\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in entries.splitlines() if found else ():
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            docs |= dict.fromkeys(names, entry[2])
        elif line.startswith("     "):
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return docs
