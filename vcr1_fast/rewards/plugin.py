"""Rewards of a user's own: one function, named by the module or the file that it is in.

    def brevity(completion, record, duration):              # once for each completion
        return 1.0 if len(completion) < 200 else 0.0

    def agreement(completions, records, durations):         # once for all of a batch
        return ask_my_server(completions)

Which of the two it is, is told by the name of its first parameter: `completions` takes lists. A
function returns a finite number for each completion, or None where it has nothing to say about it:
the completion then goes without this reward. NaN and infinity are errors.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class UserReward:
    """A loaded function; `spec` is how it was asked for, `name` the name of its column."""

    spec: str
    name: str
    function: Callable[..., Any]
    takes_lists: bool

    def __call__(
        self,
        completions: Sequence[str],
        records: Sequence[Any],
        durations: Sequence[float | None],
    ) -> list[float | None]:
        """The rewards of a batch, in order. ValueError, naming the function and the record, where
        it raises or returns something else."""
        if self.takes_lists:
            values = self._call(
                f"{len(completions)} completions",
                list(completions),
                list(records),
                list(durations),
            )
            if not isinstance(values, list | tuple) or len(values) != len(completions):
                raise ValueError(
                    f"reward {self.spec}: expected a list of {len(completions)} numbers, got "
                    f"{repr(values)[:80]}"
                )
        else:
            values = [
                self._call(_of(record), completion, record, duration)
                for completion, record, duration in zip(
                    completions, records, durations, strict=True
                )
            ]
        return [self._number(v, record) for v, record in zip(values, records, strict=True)]

    def _call(self, what: str, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:  # it is the user's: whatever it raises is told with its name
            raise ValueError(
                f"reward {self.spec} failed on {what}: {type(error).__name__}: {error}"
            ) from error

    def _number(self, value: Any, record: Any) -> float | None:
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward {self.spec}: expected a finite number or None for {_of(record)}, got "
                f"{repr(value)[:80]}"
            )
        return number


def _of(record: Any) -> str:
    return f"record {getattr(record, 'id', None)!r}"


def split_spec(spec: str) -> tuple[str, str]:
    """("module" or "file.py", "function") of "module:function". ValueError for another form."""
    where, _, name = spec.rpartition(":")
    if not where or not _NAME.fullmatch(name):
        raise ValueError(f"expected module:function or file.py:function, got {spec!r}")
    return where, name


def load_reward(spec: str) -> UserReward:
    """Import "module:function" or "file.py:function". ValueError naming what is not there."""
    where, name = split_spec(spec)
    try:
        module = (
            _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
    except Exception as error:  # importing runs the user's code
        raise ValueError(f"reward {spec}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec}: {where} has no function {name!r}")
    parameters = list(inspect.signature(function).parameters)
    return UserReward(spec, name, function, parameters[:1] == ["completions"])


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"vcr1_fast_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
