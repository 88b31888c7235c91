"""`section`: a frozen dataclass that pydantic validates, with errors of one line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")

# Strict: a text is no number and 1 is no true, since a guessed conversion would hide a mistake.
PYDANTIC = pydantic.ConfigDict(
    strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, extra="forbid"
)

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "names and their values",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


class ConfigError(ValueError):
    """A setting that is unknown or impossible; the message starts with the field's dotted name."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class UnknownField(ConfigError):
    """A setting that does not exist; `hint` follows in the message."""

    def __init__(self, field: str, hint: str = "") -> None:
        super().__init__(field, f"unknown field{hint}")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass with keyword arguments, each validated strictly by its
    type (`pydantic.PositiveInt`, `Annotated[float, Field(le=1)]`, ...).

    A wrong argument is a ConfigError. A `__post_init__` raises ConfigError for what a field's type
    cannot say. The docstring below a field is its documentation.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=PYDANTIC)(cls)
    validate = made.__init__

    # Pydantic wraps every ValueError of a __post_init__ in its own, of many lines; the one-line
    # error is made around its __init__, so that code and files get the same one.
    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:
        for name in values:
            if name not in made.__dataclass_fields__:
                raise unknown_field(made, name)
        try:
            validate(self, **values)
        except pydantic.ValidationError as error:
            raise config_error(error, "", values) from None

    made.__init__ = __init__
    return made


def unknown_field(cls: type, name: str, prefix: str = "") -> ConfigError:
    """The error of a name that is no field of the dataclass `cls`: what replaced it (the class's
    `REPLACED`), or the field that it resembles."""
    replaced: Mapping[str, str] = getattr(cls, "REPLACED", {})
    if name in replaced:
        return ConfigError(f"{prefix}{name}", replaced[name])
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {prefix}{close[0]}?" if close else ""
    return UnknownField(f"{prefix}{name}", hint)


def config_error(error: pydantic.ValidationError, where: str, value: Any) -> ConfigError:
    """The first fault of `error` as a ConfigError; `where` is the dotted name of the validated
    `value`, "" for a section's arguments."""
    # A missing field is reported last: the values that are there can be wrong on their own.
    first = min(error.errors(include_url=False), key=lambda fault: fault["type"] == "missing")
    kind, location = str(first["type"]), list(first["loc"])
    if kind == "missing" and location and isinstance(location[-1], int):
        # A tuple of fixed length reports the item that is not there; the list itself is meant.
        kind = "too_short"
        location.pop()
    for part in location:
        if isinstance(part, int):
            where += f"[{part}]"
            value = value[part] if isinstance(value, tuple | list) else None
        elif isinstance(value, Mapping):
            where = f"{where}.{part}" if where else part
            value = value.get(part)
        # Else it is the member of a union, which is no part of the setting's name.
    context = first.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(f"{where}.{cause.field}" if where else cause.field, cause.reason)
    # A plain ValueError of a __post_init__ names no field: the section stands for it.
    return ConfigError(where or error.title, _reason(kind, first["input"], context, first["msg"]))


def _reason(kind: str, value: Any, context: Mapping[str, Any], message: str) -> str:
    shown = repr(list(value) if isinstance(value, tuple) else value)
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {shown}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}, got {shown}"
    if kind == "literal_error":
        return f"expected {context['expected']}, got {shown}"
    if kind in ("too_short", "too_long"):
        return f"expected another number of values, got {shown}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    return f"{message}, got {shown}"
