"""`make gpu-check`: in order, within its time, everything written down as it goes."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benches"))
import gpu_check
import gpu_smoke
from gpu_check import Check, Outcome, Step

from vcr1_fast.ops import backend

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def stored(folder):
    return json.loads((folder / "results.json").read_text())["steps"]


def test_steps_share_the_time_and_are_on_disk_at_once(tmp_path, clock, capsys):
    check = Check(tmp_path, minutes=2, clock=clock)
    given = []

    def run(step, seconds, log):
        given.append((step.name, seconds))
        clock.now += seconds if step.name != "quick" else 1
        return Outcome(step.name, "passed" if step.name == "quick" else "stopped", seconds)

    for number, name in enumerate(("quick", "long", "longer", "late"), start=1):
        check.take(Step(name, (), 60), run)
        assert len(stored(tmp_path)) == number
    # 120 s less the reserve: 1 + 60 + 54, then nothing.
    assert given == [("quick", 60), ("long", 60), ("longer", 54)]
    assert [step["status"] for step in stored(tmp_path)] == [
        "passed", "stopped", "stopped", "skipped",
    ]  # fmt: skip
    assert stored(tmp_path)[3]["said"] == "no time left"
    *_, counts, place = check.summary()
    assert counts == "1 passed, 0 failed, 2 stopped, 1 skipped"
    assert place.endswith(str(tmp_path / "results.json"))


def is_running(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


SCRIPT = """
import subprocess, sys, time
print("FAILED test_a - wrong")
print("noise")
if sys.argv[1] == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
print("1 failed")
sys.exit(int(sys.argv[1]))
"""


def test_a_step_says_what_failed_and_ends_with_its_children(tmp_path):
    log = tmp_path / "log"
    for argument, status in (("0", "passed"), ("3", "failed")):
        command = (sys.executable, "-c", SCRIPT, argument)
        outcome = gpu_check.run_step(Step("x", command, 60), 60, log)
        assert (outcome.status, outcome.said) == (status, "FAILED test_a - wrong\n1 failed")
        assert "noise" in log.read_text()
    command = (sys.executable, "-c", SCRIPT, "hang")
    outcome = gpu_check.run_step(Step("x", command, 60), 3, log)
    assert outcome.status == "stopped" and 3 <= outcome.seconds < 30
    child = int(outcome.said.splitlines()[-1])
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)  # a process that was killed dies at its next turn
    assert not is_running(child)
    outcome = gpu_check.run_step(Step("x", ("/no/such/command",), 60), 60, log)
    assert outcome.status == "failed" and "No such file" in outcome.said


def test_what_is_planned_exists_and_fits(tmp_path):
    steps = gpu_check.plan(tmp_path, emulate=False)
    for step in steps:
        for part in step.command:
            if str(part).endswith(".py") and "=" not in part:
                assert (ROOT / part).exists(), part
    names = [step.name for step in steps]
    assert names[:3] == ["small shapes", "small shapes, memcheck", "small shapes, racecheck"]
    assert names.index("tests of iou") < names.index("bench of linear_grpo_loss")
    # Every step has its place even where each takes all it may; the build may take the rest.
    assert sum(step.seconds for step in steps[:12]) < 12 * 60
    emulated = gpu_check.plan(tmp_path, emulate=True)
    assert [step.name for step in emulated if not step.skip] == ["small shapes"]
    marked = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "python_tests").glob("test_*.py")
        if "needs_gpu" in path.read_text() or "with_cuda" in path.read_text()
    }
    assert marked <= set(gpu_check.TESTS) | {"gpu_check"}


def test_a_module_is_taken_as_built_for_these_sources_alone(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "vcr1_fast").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("x")
    (tmp_path / "csrc/a.cu").write_text("1")
    stamp = tmp_path / "vcr1_fast/_C.sources"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "STAMP", stamp)
    assert gpu_check.prebuilt() is None
    suffix = gpu_check.sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"vcr1_fast/_C{suffix}").touch()
    assert gpu_check.prebuilt() is None
    stamp.write_text(f"{gpu_check.sources_digest()} cuda\n")
    assert "is of these sources" in gpu_check.prebuilt()
    (tmp_path / "csrc/a.cu").write_text("2")
    assert gpu_check.prebuilt() is None


def test_a_failed_build_ends_it_and_a_failed_step_does_not(tmp_path, monkeypatch, capsys):
    ran = []

    def run(self, step):
        ran.append(step.name)
        self.outcomes.append(Outcome(step.name, "failed" if step.name in bad else "passed"))
        return self.outcomes[-1]

    monkeypatch.setattr(Check, "take", run)
    monkeypatch.setattr(gpu_check, "machine", dict)
    monkeypatch.setattr(gpu_check, "STAMP", tmp_path / "_C.sources")
    monkeypatch.setattr(gpu_check, "prebuilt", lambda: None)
    monkeypatch.setattr(gpu_check, "build_steps", lambda _: [Step("a", (), 1), Step("b", (), 1)])
    bad = {"a"}
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert ran == ["a"] and not (tmp_path / "_C.sources").exists()
    ran.clear()
    bad = {"small shapes"}
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert ran[:3] == ["a", "b", "small shapes"] and len(ran) == 2 + len(
        gpu_check.plan(tmp_path, emulate=False)
    )
    assert (tmp_path / "_C.sources").exists()
    ran.clear()
    bad = set()
    assert gpu_check.main(["--build-only", "--output", str(tmp_path)]) == 0
    assert ran == ["a", "b"]


def test_small_shapes_cover_every_op_that_has_a_cuda_form(monkeypatch):
    """The cases are right and reach all ops; the CUDA forms themselves run under emulation."""
    called = set()
    # Ops of other tests have no plain form.
    forms = {"cuda", "reference"}
    own = [op for op in backend.registered() if forms <= op._implementations.keys()]
    for op in own:
        # The plain form in its place says that it was asked for.
        plain = op._implementations["reference"]

        def stand_in(*args, op=op, plain=plain, **more):
            called.add(op.name)
            return plain(*args, **more)

        monkeypatch.setitem(op._implementations, "cuda", stand_in)
    monkeypatch.setattr(backend, "_serves", lambda name, device: True)
    monkeypatch.setattr(backend, "unavailable", lambda name: None)
    monkeypatch.setattr(backend, "_emulated", lambda fn: fn)
    try:
        for name, limit, case in gpu_smoke.cases("cpu"):
            if "900" not in name:
                assert case() <= limit, name
    finally:
        for op in backend.registered():
            op.forget_choice()
    missing = {op.name for op in own} - called
    # Of a gradient in the logits' memory: the same kernel on other pointers.
    assert missing <= {"logits_grpo_loss_"}
