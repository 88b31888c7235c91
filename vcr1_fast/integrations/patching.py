"""Replaces functions of an installed package, reversibly, and only where their contract is known.

A package is described by a `Patch`: the releases it was checked on, and named parts, each a list of
`Swap`s. Nothing is imported or changed until the patch is called.

    patch_trl = Patch("trl", ("1.15", "1.16"), {"logprobs": [Swap(...), ...], "loss": [...]})

    patch_trl()              # all parts, until patch_trl.undo()
    patch_trl("logprobs")    # this part; a part that is already in place stays
    with patch_trl():        # undoes at the end what this call put in place, and nothing else
        ...

Python modules copy a function's name when they say `from module import function`, so replacing it
in its own module is not enough: a swap finds every module of the package that holds the original
object, by identity, and the undo finds every one that holds the replacement, those that were
imported in between included.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()


class UnknownContract(RuntimeError):
    """The installed package is not one that a patch was checked on; nothing was changed."""


class UncheckedRelease(UserWarning):
    """A patch is in place in a release that it was not checked on."""


@dataclass(frozen=True)
class Swap:
    """`name` of `owner` becomes `build(original)`.

    Attributes:
        owner: "package.module", or "package.module:Name" for a class or a mapping in it.
        name: attribute of a module or class, or key of a mapping.
        build: takes the original and returns the replacement.
        parameters: names that the original (of a class with `forward`, that method) must take, in
            their order; None asks for nothing.
        digests: `source_digest`s that the original may have; empty asks for nothing. For originals
            whose body, not only whose signature, is what the replacement relies on.
        relies_on: other attributes of the owner whose sources the digests cover, in this order.
        new: the name must not exist before (an entry to register); `build` then gets `ABSENT`.
        copies: also replace it in other modules of the package that hold it.
        releases: those of the patch's releases that have it; empty: all.
    """

    owner: str
    name: str
    build: Callable[[Any], Any]
    parameters: tuple[str, ...] | None = None
    digests: tuple[str, ...] = ()
    relies_on: tuple[str, ...] = ()
    new: bool = False
    copies: bool = True
    releases: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """Dotted name of the replaced object: "trl.trainer.utils.selective_log_softmax"."""
        return f"{self.owner.replace(':', '.')}.{self.name}"


@dataclass(frozen=True)
class _Done:
    """A swap, found and built. `held` is what the owner itself holds, ABSENT if it inherits."""

    swap: Swap
    owner: Any
    original: Any
    held: Any
    replacement: Any


class Patch:
    """The replacements in one package, and which of them are in place.

    Args:
        distribution: name the package was installed under, as pip knows it.
        releases: those it was checked on: "1.16" admits 1.16.0, 1.16.1, …; a name that is not plain
            numbers ("0.10.0.dev0") admits itself alone.
        parts: name -> swaps.
        package: name it is imported under, if another.
    """

    def __init__(
        self,
        distribution: str,
        releases: Sequence[str],
        parts: Mapping[str, Sequence[Swap]],
        *,
        package: str | None = None,
    ) -> None:
        self.distribution = distribution
        self.releases = tuple(releases)
        self.parts = {name: tuple(swaps) for name, swaps in parts.items()}
        self.package = package or distribution
        self._done: dict[str, list[_Done]] = {}

    def __call__(self, *parts: str, allow_unchecked: bool = False) -> Applied:
        """Put `parts` (all, if none is named) in place; those already in place stay.

        Returns a handle that a `with` block undoes. ValueError for a part that does not exist,
        UnknownContract if the installed package is not one this patch was checked on; after either
        error nothing has changed. `allow_unchecked` takes another release as if it were the newest
        checked one, with a warning: signatures and bodies must still be the known ones, but what
        else that release changed is yours to test.
        """
        wanted = [part for part in self._named(parts) if part not in self._done]
        if wanted:
            self.check_version(allow_unchecked=allow_unchecked)
        found = {part: [_find(swap) for swap in self._swaps(part)] for part in wanted}
        for part, swaps in found.items():
            for done in swaps:
                _set(done.owner, done.swap.name, done.replacement)
                self._rebind(done, done.original, done.replacement)
            self._done[part] = swaps
        return Applied(self, tuple(wanted))

    def undo(self, *parts: str) -> None:
        """Restore the original objects of `parts` (all, if none is named); skip parts that are not
        in place. RuntimeError, and no change, if another object has replaced a replacement since:
        undo that one first."""
        undone = [part for part in self._named(parts) if part in self._done]
        for part in undone:
            for done in self._done[part]:
                current = _own(done.owner, done.swap.name)
                if current is not done.replacement:
                    raise RuntimeError(
                        f"{done.swap.target} is {current!r}, no longer what this patch put there: "
                        "undo the later change first"
                    )
        for part in reversed(undone):
            for done in reversed(self._done.pop(part)):
                _set(done.owner, done.swap.name, done.held)
                self._rebind(done, done.replacement, done.original)

    @property
    def applied(self) -> tuple[str, ...]:
        """Parts in place now."""
        return tuple(part for part in self.parts if part in self._done)

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        """Part -> dotted names of the objects it replaces."""
        return {part: tuple(s.target for s in swaps) for part, swaps in self.parts.items()}

    @property
    def version(self) -> str | None:
        """The installed version, None without one. Imports nothing."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def check_version(self, *, allow_unchecked: bool = False) -> None:
        """UnknownContract unless a checked release is installed, or with `allow_unchecked` any
        release. Imports nothing."""
        version, known = self.version, ", ".join(self.releases)
        if version is None:
            raise UnknownContract(f"{self.distribution} is not installed (checked: {known})")
        if any(_of(version, release) for release in self.releases):
            return
        installed = f"{self.distribution} {version} is installed; this patch was checked on {known}"
        if not allow_unchecked:
            raise UnknownContract(
                f"{installed} and does not guess what another release does "
                "(allow_unchecked=True takes it at your risk)"
            )
        warnings.warn(f"{installed} alone", UncheckedRelease, stacklevel=3)

    def check(self, *parts: str, allow_unchecked: bool = False) -> None:
        """UnknownContract if a call of the patch would refuse. Imports the package, changes
        nothing."""
        self.check_version(allow_unchecked=allow_unchecked)
        for part in self._named(parts):
            if part not in self._done:
                for swap in self._swaps(part):
                    _find(swap)

    def _swaps(self, part: str) -> list[Swap]:
        """The part's swaps that apply to the installed release; to one that was not checked, those
        of the newest checked one."""
        version = self.version or ""
        if not any(_of(version, release) for release in self.releases):
            version = self.releases[-1]
        return [
            swap
            for swap in self.parts[part]
            if not swap.releases or any(_of(version, release) for release in swap.releases)
        ]

    def _named(self, parts: Sequence[str]) -> Sequence[str]:
        unknown = sorted(set(parts) - set(self.parts))
        if unknown:
            raise ValueError(
                f"unknown parts {unknown} of the {self.distribution} patch: expected some of "
                f"{sorted(self.parts)}"
            )
        return parts or tuple(self.parts)

    def _rebind(self, done: _Done, old: Any, new: Any) -> None:
        """Put `new` wherever a module of the package holds `old`, under any name."""
        if done.swap.new or not done.swap.copies or not isinstance(done.owner, ModuleType):
            return
        for name, module in list(sys.modules.items()):
            if module is None or name.partition(".")[0] != self.package:
                continue
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


class Applied:
    """The parts that one call of a `Patch` put in place; a `with` block undoes them at its end."""

    def __init__(self, patch: Patch, parts: tuple[str, ...]) -> None:
        self.patch = patch
        self.parts = parts

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.parts:
            self.patch.undo(*self.parts)


def source_digest(*functions: Any) -> str:
    """16 hexadecimal digits that change when a line of the functions' sources does, indentation
    and blank lines aside."""
    lines = (line.strip() for f in functions for line in inspect.getsource(f).splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:16]


def _of(version: str, release: str) -> bool:
    """Whether `version` is `release`, or a final one that belongs to it."""
    numbers = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\+\S*)?", version)
    return version == release or (
        numbers is not None and f"{numbers[1]}.".startswith(f"{release}.")
    )


def _find(swap: Swap) -> _Done:
    """The swap with its replacement built; UnknownContract if the package differs from it."""
    module, _, attribute = swap.owner.partition(":")
    try:
        owner = importlib.import_module(module)
    except ImportError as error:
        raise UnknownContract(f"{swap.target}: {module} does not import: {error}") from error
    if attribute:
        owner = getattr(owner, attribute, ABSENT)
    original = ABSENT if owner is ABSENT else _get(owner, swap.name)
    if swap.new and original is not ABSENT:
        raise UnknownContract(f"{swap.target} already exists: {original!r}")
    if owner is ABSENT or (original is ABSENT and not swap.new):
        raise UnknownContract(f"{swap.target} does not exist")
    if swap.parameters is not None:
        called: Any = getattr(original, "forward", original)
        taken = tuple(inspect.signature(called).parameters)
        if taken != swap.parameters:
            raise UnknownContract(f"{swap.target} takes {taken}, expected {swap.parameters}")
    if swap.digests:
        found = source_digest(original, *(getattr(owner, name) for name in swap.relies_on))
        if found not in swap.digests:
            raise UnknownContract(
                f"{swap.target} has another body ({found}) than the checked ones "
                f"({', '.join(swap.digests)})"
            )
    return _Done(swap, owner, original, _own(owner, swap.name), swap.build(original))


def _get(owner: Any, name: str) -> Any:
    if isinstance(owner, MutableMapping):
        return owner.get(name, ABSENT)
    return getattr(owner, name, ABSENT)


def _own(owner: Any, name: str) -> Any:
    """The raw value that `owner` itself holds under `name` (a staticmethod stays one)."""
    return (owner if isinstance(owner, MutableMapping) else vars(owner)).get(name, ABSENT)


def _set(owner: Any, name: str, value: Any) -> None:
    """Set `name` to `value`; ABSENT deletes the name."""
    if isinstance(owner, MutableMapping):
        if value is ABSENT:
            del owner[name]
        else:
            owner[name] = value
    elif value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
