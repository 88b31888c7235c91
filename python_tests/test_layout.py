"""Imports go down only, and the light packages stay light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vcr1_fast"
LAYERS = (
    {"_C", "background", "files", "progress"},
    {"ops"},
    {"rewards"},
    {"tasks"},
    {"data"},
    {"config", "model"},  # a section may hold a FrameConfig; the model's own settings are plain
    {"engines"},
    {"evaluate", "report", "train"},
    {"bench", "cli", "demo", "doctor", "integrations"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def parts():
    """Packages and modules right below vcr1_fast."""
    return sorted(
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    )


def imported(source, part):
    """Parts of vcr1_fast that a file imports anywhere, functions included; `part` is its own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the root"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "vcr1_fast" and rest:
                found.add(rest.split(".")[0])
    return {name for name in found if not name.startswith("__version")} - {part}


def graph():
    """part -> parts it imports."""
    edges = {}
    for part in parts():
        files = [PACKAGE / f"{part}.py"]
        if not files[0].exists():
            files = sorted((PACKAGE / part).rglob("*.py"))
        edges[part] = set().union(*(imported(file.read_text(), part) for file in files))
    return edges


def test_import_of_the_ops_creates_no_cuda_context():
    code = "import torch, vcr1_fast.ops; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_every_part_has_a_layer():
    assert set(parts()) - {"__init__"} <= set(LEVEL)


def test_imports_go_down_only():
    upward = [
        (part, other)
        for part, others in graph().items()
        if part != "__init__"
        for other in others
        if LEVEL[other] > LEVEL[part]
    ]
    assert not upward, f"imports that go up: {upward}"
    assert graph()["rewards"] <= {"background", "files", "ops"}
    assert graph()["ops"] <= {"_C"}


def test_no_import_cycles_within_a_layer():
    TopologicalSorter(graph()).prepare()


def test_the_reader_of_imports_sees_them_all():
    source = "import vcr1_fast.ops.iou\ndef f():\n    from vcr1_fast import train\nimport os"
    assert imported(source, "cli") == {"ops", "train"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "vcr1_fast.ops",
            ["transformers", "decord", "av", "accelerate", "peft", "triton", "vcr1_fast.data"],
        ),
        ("vcr1_fast.ops", ["pydantic", "yaml", "vcr1_fast.config"]),
        ("vcr1_fast.rewards", ["torch", "numpy", "vcr1_fast.tasks"]),
        ("vcr1_fast.config.sections", ["torch", "transformers", "decord"]),
        ("vcr1_fast.tasks", ["torch", "transformers", "decord"]),
        ("vcr1_fast.data.records", ["torch", "transformers", "decord"]),
        ("vcr1_fast.cli", ["torch", "transformers", "numpy"]),
    ],
)
def test_what_an_import_pulls_in(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
