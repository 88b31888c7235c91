"""vcr1_fast/_C.pyi describes the built module."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vcr1_fast.ops.backend import native

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("stubs", ROOT / "csrc/stubs.py")
stubs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stubs)
needs_native = pytest.mark.skipif(native is None, reason="vcr1_fast._C is not built")


@needs_native
def test_the_stub_describes_the_built_module():
    assert stubs.STUB.read_text(encoding="utf-8") == stubs.render(native), (
        "vcr1_fast/_C.pyi is out of date: run python csrc/stubs.py"
    )


@needs_native
def test_check_finds_a_stale_stub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stubs, "STUB", tmp_path / "_C.pyi")
    assert stubs.main([]) == 0
    assert stubs.main(["--check"]) == 0
    text = stubs.STUB.read_text(encoding="utf-8")
    assert "def cpu_isa() -> str: ..." in text
    stubs.STUB.write_text(text.replace("num_threads: int", "threads: int"), encoding="utf-8")
    assert stubs.main(["--check"]) == 1
    assert "run python csrc/stubs.py" in capsys.readouterr().out


def with_doc(doc):
    def function():
        pass

    function.__doc__ = doc
    return function


def test_signatures_become_definitions():
    module = ModuleType("thing")
    module.flag = True
    number = "typing.SupportsInt | typing.SupportsIndex"
    channels = f'typing.Annotated[collections.abc.Sequence[{number}], "FixedSize(3)"]'
    module.one = with_doc(
        f"one(x: torch.Tensor | None, n: {number} = 3) -> tuple[str, tuple]\n\nDoc."
    )
    module.two = with_doc(
        f"two(*args, **kwargs)\nOverloaded function.\n\n1. two(a: {channels}) -> None\n\nDoc.\n\n"
        "2. two(plan: vcr1_fast._C.Plan) -> int\n\nDoc."
    )
    assert stubs.render(module).removeprefix(stubs.HEADER) == (
        "flag: bool\n\n"
        "def one(x: Tensor | None, n: int = 3) -> tuple[str, tuple[Any, ...]]: ...\n"
        "@overload\ndef two(a: Sequence[int]) -> None: ...\n"
        "@overload\ndef two(plan: Plan) -> int: ...\n"
    )


def test_what_no_stub_can_show_is_refused():
    module = ModuleType("thing")
    module.odd = [1]
    with pytest.raises(ValueError, match=r"odd is <class 'list'>"):
        stubs.render(module)
    module.odd = with_doc("Does a thing.")
    with pytest.raises(ValueError, match="odd has no signature"):
        stubs.render(module)
