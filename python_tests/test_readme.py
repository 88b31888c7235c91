"""The README tells the truth: its tables are the stored measurements, its tree is the source."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TREE = re.compile(r"<!-- tree -->\n(.*?)<!-- /tree -->", re.DOTALL)
FILE_NAME = re.compile(r"(?<![\w./*-])[\w-]+\.(?:py|pyi|cpp|cu|cuh|h|txt|toml|md)(?![\w*])")

spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benches/readme_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def tree_paths(text):
    """Paths in a drawn tree, relative to its root (the first line). A line's name ends at two
    spaces; file names in the rest of a folder's line are files in that folder."""
    parents = []  # (column, path) from the root down
    for line in text.splitlines():
        body = line.lstrip(" │├└─")
        if not body.strip() or line.startswith("```"):
            continue
        column = len(line) - len(body)
        name, _, note = body.partition("  ")
        name = name.strip()
        while parents and parents[-1][0] >= column:
            parents.pop()
        path = parents[-1][1] / name if parents else Path()
        yield path
        if name.endswith("/"):
            yield from (path / found for found in FILE_NAME.findall(note))
            parents.append((column, path))


def missing_from_tree(text, root):
    """Paths that the tree names and the source lacks."""
    return [str(path) for path in tree_paths(text) if not (root / path).exists()]


def unlisted_packages(text, root):
    """Folders of the package and top-level source folders that the tree does not name."""
    listed = {str(path) for path in tree_paths(text)}
    real = {str(path.parent.relative_to(root)) for path in root.glob("vcr1_fast/*/__init__.py")}
    real |= {name for name in ("csrc", "vcr1_fast", "python_tests", "benches")}
    return sorted(real - listed)


EXAMPLE = """```
thing/
├── README.md        what it is
├── csrc/            torch-free
│   ├── cpu/         one.cpp two.cpp
│   └── tensor.h     a view
└── pack/
    ├── ops/         __init__.py
    └── cli.py
```
"""


def test_a_tree_is_read_and_its_lies_are_found(tmp_path):
    for name in ("README.md", "csrc/cpu/one.cpp", "csrc/tensor.h", "pack/ops/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert missing_from_tree(EXAMPLE, tmp_path) == ["csrc/cpu/two.cpp", "pack/cli.py"]
    (tmp_path / "csrc/cpu/two.cpp").touch()
    (tmp_path / "pack/cli.py").touch()
    assert missing_from_tree(EXAMPLE, tmp_path) == []


def evaluation(score, floor=0.4):
    task = {"primary": "mIoU", "n": 50, "metrics": {"mIoU": score}, "floor": {"mIoU": floor}}
    return {"tasks": {"temporal_grounding": task}}


def write_demo(folder, seed, before, after):
    stages = {"after SFT": evaluation(before), "after GRPO": evaluation(after)}
    summary = {"seed": seed, "stages": stages, "seconds": {"sft": 60.0, "grpo": 120.0 + seed}}
    (folder / f"demo_{seed}.json").write_text(json.dumps(summary))


def test_the_demo_table_is_mean_and_range_over_seeds(tmp_path):
    write_demo(tmp_path, 0, 0.5, 0.7)
    write_demo(tmp_path, 1, 0.4, 0.8)
    text = tables.build("demo", tmp_path)
    row = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert row == [
        "temporal_grounding",
        "mIoU",
        "50",
        "0.400 (0.400 to 0.400)",
        "0.450 (0.400 to 0.500)",
        "0.750 (0.700 to 0.800)",
        "+0.300 (0.200 to 0.400)",
    ]
    assert "seeds 0, 1; 3.0 minutes" in text


def bench_file(folder):
    def row(op, shape, baseline, speedup, share, ours=2.0):
        return {
            "op": op,
            "shape": shape,
            "dtype": "float32",
            "baseline": baseline,
            "baseline_ms": ours * speedup,
            "ours_ms": ours,
            "speedup": speedup,
            "GBps": 10.0,
            "limit": "read",
            "percent_of_limit": share,
        }

    header = {
        "stem": "iou",
        "device": "Chip",
        "threads": 2,
        "torch": "2.13",
        "python": "3.11",
        "commit": "abc",
        "date": "2026-11-22 10:00 UTC",
        "peers": {"pillow": "12"},
        "other_load": 0.3,
    }
    rows = [row("iou", "8", "eager", 9.0, 50.0), row("iou", "8", "compiled", 4.0, 50.0)]
    rows += [row("iou", "64", "eager", 1.0, 80.0, ours=5.0), row("giou", "8", "eager", 3.0, 20.0)]
    rows[-1] |= {"baseline_error": 2e-7, "ours_error": 1e-7}
    rows[-1] |= {"baseline_extra_MiB": 90.0, "ours_extra_MiB": 3.4}
    for op in ("iou", "giou"):
        skipped = {"op": op, "shape": "8", "dtype": "float32", "baseline": "torchvision"}
        rows.append({**skipped, "skipped": "not installed"})
    content = {"header": header, "rows": rows, "geometric_mean": 3.2}
    (folder / "iou_chip.json").write_text(json.dumps(content))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_ops_table_compares_with_the_fastest_other_of_each_case(tmp_path):
    bench_file(tmp_path)
    write_demo(tmp_path, 0, 0.5, 0.7)
    lines = tables.build("ops", tmp_path).splitlines()
    ratio = "1.0x (mean 2.0, 1.0 to 4.0)"
    first = ["iou", "Chip", "64 float32", "eager", "5.00", "5.00", ratio, "80 % read"]
    assert cells(lines[2]) == [*first, ""]
    second = ["iou: giou", "Chip", "8 float32", "eager", "6.00", "2.00", "3.0x", "20 % read"]
    assert cells(lines[3]) == [*second, "90 / 3"]
    assert lines[-2:] == [
        "- Chip, 2 threads; torch 2.13, Python 3.11, pillow 12; commit abc; 2026-11-22. Not clean: "
        "others kept up to 0.3 processors busy.",
        "- Not timed on Chip, not installed: torchvision.",
    ]


def test_steps_of_other_trainers_have_a_table_of_their_own(tmp_path):
    bench_file(tmp_path)
    content = json.loads((tmp_path / "iou_chip.json").read_text())
    ops = tables.build("ops", tmp_path)
    content["header"]["stem"] = "integrations"
    (tmp_path / "integrations_chip.json").write_text(json.dumps(content))
    assert tables.build("ops", tmp_path) == ops
    lines = tables.build("integrations", tmp_path).splitlines()
    assert cells(lines[2]) == ["iou", "8 float32", "eager", "18", "2", "9.0x", ""]
    assert cells(lines[5]) == ["giou", "8 float32", "eager", "6", "2", "3.0x", "90 / 3"]
    assert len(lines) == 2 + 4 + 2 and lines[-1].startswith("Chip, 2 threads; torch 2.13")


def test_a_bench_table_has_every_row(tmp_path):
    bench_file(tmp_path)
    lines = tables.build("iou_chip", tmp_path).splitlines()
    numbers = ["18.000", "2.000", "9.0x", "10.0", "50 % read"]
    assert cells(lines[2]) == ["iou", "8", "float32", "eager", *numbers, *[""] * 4]
    assert cells(lines[5])[-4:] == ["2.0e-07", "1.0e-07", "90", "3"]
    assert cells(lines[6])[3:] == ["torchvision", "not installed", *[""] * 8]
    assert len(lines) == 2 + 6 + 2


def test_check_finds_drift_and_writing_removes_it(tmp_path, capsys):
    write_demo(tmp_path, 0, 0.5, 0.7)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- table:demo -->\nold\n<!-- /table -->\nrest\n")
    other = tmp_path / "ops.md"
    other.write_text("no table\n")
    options = ["--pages", str(readme), str(other), "--results", str(tmp_path)]
    assert tables.main([*options, "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert tables.main(options) == 0
    assert tables.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "0.700" in text
    write_demo(tmp_path, 0, 0.5, 0.69)  # a new measurement makes the README stale
    assert tables.main([*options, "--check"]) == 1
    assert other.read_text() == "no table\n"


def test_unknown_tables_and_open_markers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json"):
        tables.fill("<!-- table:nothing -->\n<!-- /table -->", tmp_path)
    with pytest.raises(ValueError, match="1 table markers open, 0"):
        tables.fill("<!-- table:demo -->\n", tmp_path)


needs_readme = pytest.mark.skipif(not README.exists(), reason="this tree has no README.md")


@needs_readme
def test_the_pages_show_the_stored_measurements():
    assert tables.main(["--check"]) == 0
    for page, table in zip(tables.PAGES, ("demo", "integrations", "ops"), strict=True):
        assert f"<!-- table:{table} -->" in page.read_text(encoding="utf-8")


@needs_readme
def test_the_page_of_ops_names_every_public_op():
    from vcr1_fast import ops

    text = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    public = [n for n in ops.__all__ if n.islower() and n != "use"]
    assert [name for name in public if f"`{name}`" not in text] == []


@needs_readme
def test_the_tree_in_the_readme_is_true():
    drawn = TREE.search(README.read_text(encoding="utf-8"))
    assert drawn, "README.md has no <!-- tree --> ... <!-- /tree -->"
    assert missing_from_tree(drawn[1], ROOT) == []
    assert unlisted_packages(drawn[1], ROOT) == []
