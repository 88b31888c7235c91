"""`vcr1 bench` finds, lists and runs the benches of a source tree, and says where there is none."""

import pytest

from vcr1_fast import bench, cli

ECHO = """'''Times nothing.'''
import sys, vcr1_fast
open({out!r}, "a").write(" ".join(sys.argv[1:]) + ";")
sys.exit({status})
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory with two benches, the package being elsewhere."""
    folder, out = tmp_path / "benches", tmp_path / "out"
    folder.mkdir()
    (folder / "harness.py").touch()
    for name, status in (("iou", 0), ("loss", 3), ("zoom", 0)):
        (folder / f"bench_{name}.py").write_text(ECHO.format(out=str(out), status=status))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(bench.Path(bench.__file__).parents[1]))
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "elsewhere" / "vcr1_fast" / "bench.py"))
    return out


def test_benches_are_listed_and_run_with_their_options(clone, capsys):
    assert cli.main(["bench"]) == 0
    reported = capsys.readouterr().out.splitlines()
    assert reported == [f"{name}  Times nothing." for name in ("iou ", "loss", "zoom")]
    assert cli.main(["bench", "iou", "--threads", "2", "--seconds", "0.5"]) == 0
    assert clone.read_text() == "--threads 2 --seconds 0.5;"


def test_the_first_failure_ends_it(clone):
    assert cli.main(["bench", "all"]) == 3
    assert clone.read_text() == ";;"  # iou and loss, not zoom


def test_an_unknown_bench_and_a_tree_without_benches_are_told(clone, capsys, monkeypatch):
    assert cli.main(["bench", "speed"]) == 2
    assert "no bench 'speed'; there are iou, loss, zoom" in capsys.readouterr().err
    monkeypatch.chdir("/")
    assert cli.main(["bench", "iou"]) == 2
    assert "not the package" in capsys.readouterr().err


def test_the_source_tree_has_benches_with_a_first_line(capsys):
    if not (bench.Path(bench.__file__).parents[1] / "benches").exists():
        pytest.skip("an installed package has no benches")
    assert bench.main_bench([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("iou") for line in lines)
    assert all(len(line.split(None, 1)) == 2 for line in lines)
