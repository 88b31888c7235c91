"""Frozen dataclass trees from YAML and `a.b=value` overrides, every value checked.

Works on any tree of dataclasses whose fields are bool, int, float, str, Literal, tuples of these,
dict[str, one of these], optional, or further dataclasses. A dict may be given nested: its keys are
then joined by dots. A field of another type cannot be set from outside.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that is unknown or impossible; the message starts with the field's dotted name."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a YAML file (all defaults where there is none), then `overrides`
    such as "optim.lr=1e-5", the later ones winning.

    ConfigError names the field that is unknown, of the wrong type or impossible, OSError the file
    that cannot be read.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(str(path), f"not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(str(path), f"expected fields, got {values!r}")
    for override in overrides:
        _override(values, override)
    return build(cls, values)


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", default: T | None = None) -> T:
    """`cls(**values)`, nested mappings becoming nested dataclasses; what `values` leave open is as
    in `default`, or the field's own default. `prefix` is for messages. A class may say in
    `REPLACED` what became of fields that it no longer has."""
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    arguments = {}
    for name, value in values.items():
        where = f"{prefix}{name}"
        if name not in known:
            replaced = getattr(cls, "REPLACED", {})
            if name in replaced:
                raise ConfigError(where, replaced[name])
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ConfigError(where, f"unknown field{hint}")
        arguments[name] = _convert(
            hints[name],
            value,
            where,
            _default(known[name]) if default is None else getattr(default, name),
        )
    if default is None:
        for name, field in known.items():
            if name not in arguments and _default(field) is dataclasses.MISSING:
                arguments[name] = _missing(hints[name], f"{prefix}{name}")
    try:
        if default is not None:
            return dataclasses.replace(default, **arguments)
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error.field}", error.reason) from None
    except ValueError as error:
        raise ConfigError(prefix.rstrip(".") or cls.__name__, str(error)) from error


def dump_config(config: Any) -> str:
    """YAML that `load_config` reads back equal."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(override, "expected section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(name, f"not a YAML value: {text!r}") from error
    *sections, last = name.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            where = ".".join(sections[: depth + 1])
            raise ConfigError(where, f"not a section, it is {values!r}")
    values[last] = value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _missing(hint: Any, where: str) -> Any:
    # A section that is not there lacks its first required field: that is the name to report.
    if dataclasses.is_dataclass(hint):
        return build(hint, {}, f"{where}.")
    raise ConfigError(where, "missing")


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        kinds = get_args(hint)
        if value is None and type(None) in kinds:
            return None
        settable = [kind for kind in kinds if kind is not type(None) and _is_settable(kind)]
        if len(settable) == 1:
            return _convert(settable[0], value, where)
    elif origin is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(where, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}")
    elif origin is tuple:
        return _convert_tuple(get_args(hint), value, where)
    elif origin is dict:
        return _convert_dict(get_args(hint)[1], value, where)
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            default = default if isinstance(default, hint) else None
            return build(hint, value, f"{where}.", default)
        raise ConfigError(where, f"is a section with fields, got {value!r}")
    elif hint in _SCALARS:
        return _SCALARS[hint](value, where)
    raise ConfigError(where, "cannot be set in a configuration")


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(where, f"expected a list, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ConfigError(where, f"expected {len(kinds)} values, got {list(value)!r}")
    items = enumerate(zip(kinds, value, strict=True))
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in items)


def _convert_dict(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(where, f"expected names and their values, got {value!r}")
    flat: dict[str, Any] = {}
    for name, item in value.items():
        inner = f"{where}.{name}"
        nested = isinstance(item, Mapping)
        found = _convert_dict(kind, item, inner) if nested else {"": _convert(kind, item, inner)}
        for rest, converted in found.items():
            key = f"{name}.{rest}" if rest else str(name)
            if key in flat:
                raise ConfigError(f"{where}.{key}", "is given twice")
            flat[key] = converted
    return flat


def _is_settable(kind: Any) -> bool:
    return (
        kind in _SCALARS or get_origin(kind) in (tuple, Literal) or dataclasses.is_dataclass(kind)
    )


def _bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(where, f"expected true or false, got {value!r}")


def _int(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(where, f"expected a whole number, got {value!r}")


def _float(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-6 as a text; here it is the number that was meant.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ConfigError(where, f"expected a finite number, got {value!r}")


def _str(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ConfigError(where, f"expected a text, got {value!r}")


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in fields.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
