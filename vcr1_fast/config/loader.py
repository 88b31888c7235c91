"""Dataclass trees from YAML and `section.field=value` overrides, every value validated.

Works on any tree of dataclasses, `section` or plain, whose fields are bool, int, float, str,
Literal, tuples of these, dict[str, one of these], optional, or further dataclasses. A field of
another type cannot be set from outside.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml

from vcr1_fast.config.section import (
    PYDANTIC,
    ConfigError,
    UnknownField,
    config_error,
    unknown_field,
)

__all__ = ["ConfigError", "build", "dump_config", "load_config", "read_values", "suggestion"]

T = TypeVar("T")
_SCALARS = (bool, int, float, str)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: by YAML 1.1, PyYAML takes 1e-6, which has no point, for a text."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for a float."""


_FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(
    cls: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """The dataclass `cls` from a YAML file (without one: the defaults), then from `overrides` such
    as "optim.lr=1e-5"; the last override of a field wins. `defaults`, by section, take the place of
    the dataclass's own.

    ConfigError names the field that is unknown, of a wrong type or impossible, and the file it
    stands in. OSError names a file that cannot be read.
    """
    values = read_values(path, overrides)
    try:
        return build(cls, values if defaults is None else _merged(defaults, values))
    except UnknownField as error:
        # Only here the whole tree is known, in which the setting may stand elsewhere.
        unknown = UnknownField(error.field, suggestion(cls, error.field))
        raise _in_file(unknown, path, overrides) from None
    except ConfigError as error:
        raise _in_file(error, path, overrides) from None


def read_values(path: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a YAML file and `overrides` as nested mappings, not yet checked. Errors of
    `load_config` for text that is no YAML."""
    values: Any = {}
    if path is not None:
        try:
            values = _load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(str(path), f"not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(str(path), f"expected fields, got {values!r}")
    for override in overrides:
        _override(values, override)
    return values


def suggestion(cls: type, field: str) -> str:
    """Words that follow "unknown field" for the dotted name `field`: the setting of the tree `cls`
    that is meant, by the names that other trainers use (`cls.ALIASES`) or by similarity; else the
    fields of its section."""
    *sections, name = field.split(".")
    known = _names(cls)
    aliases: Mapping[str, str] = getattr(cls, "ALIASES", {})
    if name in aliases:
        return f"; did you mean {aliases[name]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    section = ".".join(sections)
    here = {other.rpartition(".")[2]: other for other in known if _section(other) == section}
    others = {other.rpartition(".")[2]: other for other in known}
    for candidates, cutoff in ((here, 0.6), (aliases, 0.6), (others, 0.75)):
        if close := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return f"; did you mean {candidates[close[0]]}?"
    if here:
        return f"; the fields of {section or 'the top level'} are {', '.join(here)}"
    return f"; the sections are {', '.join(dict.fromkeys(other.split('.')[0] for other in known))}"


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a tree."""
    hints = get_type_hints(cls, include_extras=True)
    names: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            names += _names(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.init and is_settable(hint):
            names.append(f"{prefix}{field.name}")
    return names


def _in_file(error: ConfigError, path: str | Path | None, overrides: Sequence[str]) -> ConfigError:
    """The error with the file that the setting stands in, where it stands in one."""
    if path is None or _is_overridden(error.field, overrides):
        return error
    return ConfigError(error.field, f"{error.reason} ({path})")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, of which `above` wins."""
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            merged[name] = _merged(inner, value)
        else:
            merged[name] = value
    return merged


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", default: T | None = None) -> T:
    """`cls(**values)`, with nested mappings as nested dataclasses.

    Fields without a value keep that of `default`, or the field's own default. `prefix` starts the
    names in messages. A class says in `REPLACED` which field took the place of a former one.
    """
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        where = f"{prefix}{name}"
        if name not in known:
            raise unknown_field(cls, str(name), prefix)
        inherited = _default(known[name]) if default is None else getattr(default, name)
        arguments[name] = _value(hints[name], value, where, inherited)
    if default is None:
        for name, field in known.items():
            if name not in arguments and _default(field) is dataclasses.MISSING:
                arguments[name] = _missing(hints[name], f"{prefix}{name}")
    try:
        if default is not None:
            return dataclasses.replace(default, **arguments)  # type: ignore[type-var]
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error.field}", error.reason) from None
    except ValueError as error:
        # A plain dataclass's own check names the field in its message.
        raise ConfigError(prefix.rstrip(".") or cls.__name__, str(error)) from error


def dump_config(config: Any) -> str:
    """YAML that `load_config` reads back equal."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_settable(hint: Any) -> bool:
    """Whether YAML can hold a value of this type."""
    if hint in _SCALARS or get_origin(hint) in (tuple, dict, Literal):
        return True
    if get_origin(hint) is Annotated:
        return is_settable(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return all(is_settable(kind) for kind in get_args(hint) if kind is not type(None))
    return False


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(override, "expected section.field=value")
    try:
        value = _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(name, f"not a YAML value: {text!r}") from error
    *sections, last = name.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            where = ".".join(sections[: depth + 1])
            raise ConfigError(where, f"not a section, it is {values!r}")
    values[last] = value


def _is_overridden(field: str, overrides: Sequence[str]) -> bool:
    names = [override.partition("=")[0] for override in overrides]
    return any(f"{field}.".startswith(f"{name}.") for name in names)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _missing(hint: Any, where: str) -> Any:
    # A section that is not there lacks its first required field: that is the name to report.
    if dataclasses.is_dataclass(hint):
        return build(hint, {}, f"{where}.")  # type: ignore[arg-type]
    raise ConfigError(where, "missing")


def _value(hint: Any, value: Any, where: str, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(where, f"is a section with fields, got {value!r}")
        default = default if isinstance(default, hint) else None  # type: ignore[arg-type]
        return build(hint, value, f"{where}.", default)  # type: ignore[arg-type]
    if value is None and type(None) in get_args(hint):
        return None
    if not is_settable(hint):
        raise ConfigError(where, "cannot be set in a configuration")
    # Validated here and not only by a section's __init__: plain dataclasses (those of the ops and
    # rewards, which do without pydantic) check no types themselves.
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint, config=PYDANTIC)
    value = _tuples(value)
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        raise config_error(error, where, value) from None


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that frozen dataclasses hold."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def plain(value: Any) -> Any:
    """A setting as YAML and JSON hold it: mappings, lists and scalars."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: plain(v) for name, v in fields.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value
