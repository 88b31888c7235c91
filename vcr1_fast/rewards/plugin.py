"""User rewards: one function each, named by its module or file.

    def brevity(completion, record, duration):              # once for each completion
        return 1.0 if len(completion) < 200 else 0.0

    def agreement(completions, records, durations):         # once for all of a batch
        return ask_my_server(completions)

The first parameter's name decides which of the two it is: `completions` takes lists. A function
returns a number of at most `LARGEST` in magnitude for each completion, or None: the completion then
has no such reward. Other values, exceptions and time-outs are errors that name the function.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vcr1_fast.background import Worker

LARGEST = 1e6
"""Largest magnitude of a user's reward. Far larger ones overflow the variance of a group, and the
advantages, the loss and the gradient would silently be 0."""

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class UserReward:
    """A loaded function; `spec` is the text that named it, `name` the name of its column.

    timeout: seconds that the function may take for one batch; None: no bound. With a bound it runs
    in one daemon thread, the same for all batches, so a function that hangs does not block exit.
    """

    spec: str
    name: str
    function: Callable[..., Any]
    takes_lists: bool
    timeout: float | None = None
    _worker: Worker = field(
        default_factory=lambda: Worker("user_reward"), repr=False, compare=False
    )

    def __call__(
        self,
        completions: Sequence[str],
        records: Sequence[Any],
        durations: Sequence[float | None],
    ) -> list[float | None]:
        """The rewards of a batch, in order. ValueError, naming the function and the record, when
        it raises, returns something else or exceeds `timeout`."""
        position = [0]  # of the completion that the function is at
        if self.timeout is None:
            return self._batch(completions, records, durations, position)
        result = self._worker.submit(lambda: self._batch(completions, records, durations, position))
        wait([result], self.timeout)
        if not result.done():
            what = f"{len(completions)} completions"
            if not self.takes_lists:
                what = f"{_of(records[position[0]])}, number {position[0] + 1} of {what}"
            raise ValueError(
                f"reward {self.spec}: not done after rewards.timeout = {self.timeout:g} s, "
                f"at {what}"
            )
        return result.result()

    def _batch(
        self,
        completions: Sequence[str],
        records: Sequence[Any],
        durations: Sequence[float | None],
        position: list[int],
    ) -> list[float | None]:
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
            values = []
            for i, completion in enumerate(completions):
                position[0] = i
                values.append(self._call(_of(records[i]), completion, records[i], durations[i]))
        return [self._number(v, record) for v, record in zip(values, records, strict=True)]

    def _call(self, what: str, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:  # user code may raise anything; the message names the function
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
        if abs(number) > LARGEST:
            raise ValueError(
                f"reward {self.spec}: expected at most {LARGEST:.0e} in magnitude for "
                f"{_of(record)}, got {number:g}"
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


def load_reward(spec: str, timeout: float | None = None) -> UserReward:
    """Import "module:function" or "file.py:function". ValueError naming what does not exist."""
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
    return UserReward(spec, name, function, parameters[:1] == ["completions"], timeout)


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"vcr1_fast_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
