"""Swapping functions of a package: every copy of a name, exactly undone, or a refusal."""

import sys
from types import ModuleType

import pytest

from vcr1_fast.integrations import patching
from vcr1_fast.integrations.patching import ABSENT, Patch, Swap, UnknownContract, source_digest


def double(x):
    return 2 * x


class Base:
    def inherited(self):
        return "base"


@pytest.fixture
def package(monkeypatch):
    """An installed package `fakepkg` 1.16.2: a function, a second module that copied it under
    another name, a class and a registry."""
    root, copy = ModuleType("fakepkg.core"), ModuleType("fakepkg.user")
    root.double = copy.twice = double
    root.Thing = type("Thing", (Base,), {"static": staticmethod(lambda: "old")})
    root.REGISTRY = {"a": 1}
    stranger = ModuleType("fakepkgother")
    stranger.double = double
    for module in (ModuleType("fakepkg"), root, copy, stranger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(patching.metadata, "version", lambda name: "1.16.2")
    return root


def triple_of(original):
    return lambda x: original(x) + x


def make(releases=("1.15", "1.16"), **parts):
    parts = parts or {"double": [Swap("fakepkg.core", "double", triple_of, parameters=("x",))]}
    return Patch("fakepkg", releases, parts)


def test_every_copy_is_replaced_and_comes_back(package):
    patch, user = make(), sys.modules["fakepkg.user"]
    patch()
    assert package.double(5) == user.twice(5) == 15
    assert sys.modules["fakepkgother"].double is double
    later = ModuleType("fakepkg.later")  # as if it had said `from fakepkg.core import double` now
    later.double = package.double
    sys.modules["fakepkg.later"] = later
    try:
        patch.undo()
    finally:
        del sys.modules["fakepkg.later"]
    assert package.double is double and user.twice is double and later.double is double


def test_a_second_call_changes_nothing(package):
    patch = make()
    patch()
    first = package.double
    with patch() as handle:  # put nothing in place, so takes nothing away
        assert handle.parts == ()
    assert package.double is first and patch.applied == ("double",)
    patch.undo()
    patch.undo()
    assert package.double is double and patch.applied == ()


def test_a_block_undoes_its_own_parts_even_when_it_raises(package):
    other = [Swap("fakepkg.core:REGISTRY", "a", lambda one: one + 1)]
    patch = make(double=[Swap("fakepkg.core", "double", triple_of)], registry=other)
    patch("double")
    with pytest.raises(KeyError), patch():
        assert package.REGISTRY["a"] == 2
        raise KeyError
    assert package.REGISTRY["a"] == 1 and patch.applied == ("double",)
    patch.undo()


def test_classes_and_registries_come_back_as_they_were(package):
    raw = vars(package.Thing)["static"]
    patch = make(
        thing=[
            Swap("fakepkg.core:Thing", "static", lambda old: staticmethod(lambda: f"new {old()}")),
            Swap("fakepkg.core:Thing", "inherited", lambda old: lambda self: old(self) + "!"),
            Swap("fakepkg.core:REGISTRY", "b", lambda old: [old], new=True),
        ]
    )
    with patch():
        assert package.Thing.static() == "new old" and package.Thing().inherited() == "base!"
        assert package.REGISTRY["b"] == [ABSENT]
    assert vars(package.Thing)["static"] is raw and "inherited" not in vars(package.Thing)
    assert package.REGISTRY == {"a": 1}


def test_undo_does_not_take_away_what_came_later(package):
    patch = make()
    patch()
    package.double = later = triple_of(package.double)
    with pytest.raises(RuntimeError, match="undo the later change first"):
        patch.undo()
    assert package.double is later and patch.applied == ("double",)


@pytest.mark.parametrize(
    ("releases", "version", "fits"),
    [
        (("1.15", "1.16"), "1.16.0", True),
        (("1.16",), "1.16", True),
        (("1.16",), "1.16.1+cu130", True),
        (("1.1",), "1.16.0", False),
        (("1.16",), "1.17.0", False),
        (("1.16",), "1.16.0.dev0", False),
        (("1.16", "1.17.0.dev0"), "1.17.0.dev0", True),
    ],
)
def test_only_checked_releases(package, monkeypatch, releases, version, fits):
    monkeypatch.setattr(patching.metadata, "version", lambda name: version)
    patch = make(releases)
    if fits:
        with patch():
            assert package.double(1) == 3
        return
    with pytest.raises(UnknownContract, match=f"{version} is installed; this patch was checked on"):
        patch()
    assert package.double is double


def swap(**changes):
    return Swap(**{"owner": "fakepkg.core", "name": "double", "build": triple_of, **changes})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (swap(parameters=("x", "scale")), r"takes \('x',\), expected \('x', 'scale'\)"),
        (swap(digests=("0" * 16,)), "has another body"),
        (swap(name="treble"), "fakepkg.core.treble does not exist"),
        (swap(owner="fakepkg.core:Nothing"), "fakepkg.core.Nothing.double does not exist"),
        (swap(owner="fakepkg.gone"), "does not import"),
        (swap(new=True), "already exists"),
    ],
)
def test_an_unknown_contract_changes_nothing(package, bad, message):
    """Also not the good swap that stands before it."""
    patch = make(good=[Swap("fakepkg.core:REGISTRY", "a", lambda one: 9)], bad=[bad])
    with pytest.raises(UnknownContract, match=message):
        patch.check()
    with pytest.raises(UnknownContract, match=message):
        patch()
    assert package.REGISTRY == {"a": 1} and package.double is double and patch.applied == ()


def test_the_known_body_passes(package):
    with make(double=[swap(digests=("0" * 16, source_digest(double)))])():
        assert package.double(2) == 6


def test_unknown_parts_and_absent_packages():
    with pytest.raises(ValueError, match=r"unknown parts \['los'\]"):
        make()("los")
    absent = Patch("no-such-package-here", ("1",), {"a": []})
    assert absent.version is None
    with pytest.raises(UnknownContract, match="no-such-package-here is not installed"):
        absent()
    assert make().targets == {"double": ("fakepkg.core.double",)}


def test_an_unchecked_release_is_taken_only_when_asked_for_and_still_by_its_contract(
    package, monkeypatch
):
    monkeypatch.setattr(patching.metadata, "version", lambda name: "1.17.0")
    swaps = [
        Swap("fakepkg.core", "double", triple_of, parameters=("x",), releases=("1.16",)),
        Swap("fakepkg.core", "gone", triple_of, releases=("1.15",)),
    ]
    patch = make(double=swaps, other=[Swap("fakepkg.core", "double", triple_of, parameters=("y",))])
    with pytest.raises(UnknownContract, match="allow_unchecked=True"):
        patch("double")
    assert package.double is double
    with (
        pytest.warns(patching.UncheckedRelease, match=r"1\.17\.0 .* checked on 1\.15, 1\.16"),
        patch("double", allow_unchecked=True),  # as 1.16: the swap of 1.15 is left out
    ):
        assert package.double(5) == 15
    assert package.double is double
    with (
        pytest.warns(patching.UncheckedRelease),
        pytest.raises(UnknownContract, match=r"takes \('x',\), expected \('y',\)"),
    ):
        patch("other", allow_unchecked=True)
    assert package.double is double
