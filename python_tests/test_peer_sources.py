"""Other trainers' own functions beside ours, where their sources are at hand.

VCR1_VERL_SOURCE, VCR1_OPENRLHF_SOURCE, VCR1_EASYR1_SOURCE and VCR1_MS_SWIFT_SOURCE name the folder
that holds the package; further folders after it, separated as in PATH, hold what it imports.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def folders(trainer):
    name = f"VCR1_{trainer.upper()}_SOURCE"
    if not os.environ.get(name):
        pytest.skip(f"{name} does not name the sources")
    return os.environ[name].split(os.pathsep)


@pytest.mark.parametrize("trainer", ("verl", "openrlhf", "easyr1"))
def test_their_numbers_are_ours(trainer):
    path = os.pathsep.join([str(HERE.parent), *folders(trainer)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "peer_numbers.py", trainer],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    word, _, count = done.stdout.splitlines()[-1].partition(": ")
    assert word == "equal" and int(count) >= 20


def test_ms_swift_takes_the_functions_where_the_patch_puts_them():
    """Its trainers import much that is not at hand: their source is read instead."""
    root = Path(folders("ms_swift")[0]) / "swift/rlhf_trainers"
    for module in ("grpo_trainer", "rlhf_mixin"):
        tree = ast.parse((root / f"{module}.py").read_text())
        imported = {
            (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert ("trl.trainer.utils", "selective_log_softmax") in imported
    tree = ast.parse((root / "grpo_trainer.py").read_text())
    calls = [
        (node.func.id, len(node.args), [k.arg for k in node.keywords])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert {c[1:] == (2, []) for c in calls if c[0] == "selective_log_softmax"} == {True}
    assert {c[1:] == (1, []) for c in calls if c[0] == "entropy_from_logits"} == {True}
    assert ("LigerFusedLinearGRPOLoss", 0) in {c[:2] for c in calls}
