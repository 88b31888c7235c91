"""All that a GPU machine should be asked, the most important first, within minutes.

    python benches/gpu_check.py                 build, small shapes, sanitizers, tests, benches
    python benches/gpu_check.py --minutes 9     the same in less time: what comes last is left out
    python benches/gpu_check.py --build-only    compile the module here, for a machine with a GPU
    python benches/gpu_check.py --emulate       small shapes on an emulated GPU, the rest listed

Each step has a limit and gets no more than what is left; one that fails or is stopped does not keep
the next from running. `results.json` in the folder of `--output` is written after each step, the
benches' rows as they come; each step's whole output lies beside them. A summary is printed last,
and the exit status is 1 where a step failed.

The build is left out where `vcr1_fast/_C*.so` was built by this script from these sources
(`--build-only` on any machine with nvcc and the same Python): carry it along.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAMP = ROOT / "vcr1_fast" / "_C.sources"
RESERVE = 5.0
"""Seconds kept for the summary."""
LEAST = 5.0
"""Seconds below which a step is not begun."""
PYTHON = sys.executable
SMOKE = (PYTHON, "benches/gpu_smoke.py")
# In order of importance: what trains, then what it needs, then the rest.
TESTS = (
    "logits_loss",
    "gather_logprobs",
    "grpo_loss",
    "video_patches",
    "staging",
    "resize_frames",
    "varlen_attention",
    "forward",
    "iou",
    "linear_logprobs",
    "rollout",
    "trl_patch",
)
# Name and seconds; the longest are those of which most depends.
BENCHES = (
    ("linear_grpo_loss", 75),
    ("grpo_loss", 60),
    ("gather_logprobs", 45),
    ("step", 90),
    ("video_patches", 30),
    ("iou", 20),
    ("group_attention", 30),
    ("integrations", 60),
)


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds; `skip` is the reason not to run it, if there is one."""

    name: str
    command: Sequence[str]
    seconds: float
    skip: str | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step: "passed", "failed", "stopped" at its limit, or "skipped"."""

    name: str
    status: str
    seconds: float = 0.0
    said: str = ""


def sources_digest() -> str:
    """Of everything that the native module is built from."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    for file in sorted(files):
        if "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def prebuilt() -> str | None:
    """Why the module that lies here serves, None where it must be built."""
    module = ROOT / "vcr1_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists() or not STAMP.exists():
        return None
    stamp = STAMP.read_text().split()
    return f"{module.name} is of these sources" if stamp == [sources_digest(), "cuda"] else None


def build_steps(architectures: str) -> list[Step]:
    """Configure and compile with CUDA, by ccache where it is installed."""
    folder = "build/gpu"
    pybind = subprocess.run(
        [PYTHON, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False
    ).stdout.strip()
    configure = [
        "cmake", "-S", ".", "-B", folder, "-DVCR1_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", f"-DPython_EXECUTABLE={PYTHON}",
        f"-Dpybind11_DIR={pybind}",
    ]  # fmt: skip
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    if shutil.which("ccache"):
        configure += [f"-DCMAKE_{kind}_COMPILER_LAUNCHER=ccache" for kind in ("CXX", "CUDA")]
    return [
        Step("configure", configure, 30),
        Step("compile", ["cmake", "--build", folder, "--parallel"], 300),
        Step("install", ["cmake", "--install", folder, "--prefix", "."], 10),
    ]


def sanitizer() -> str | None:
    """compute-sanitizer, from PATH or the toolkit's folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin:{home}/compute-sanitizer"
    )


def plan(output: Path, emulate: bool) -> list[Step]:
    """All steps after the build, in order."""
    no_gpu = "on an emulated GPU nothing is measured" if emulate else None
    tool = sanitizer()
    no_tool = no_gpu or (None if tool else "compute-sanitizer is not installed")
    steps = [Step("small shapes", [*SMOKE, *(["--every", "9"] if emulate else [])], 60)]
    steps += [
        # A third of the cases: a sanitizer takes up to a hundred times as long.
        Step(
            f"small shapes, {name}",
            [str(tool), "--tool", name, "--error-exitcode", "9", *SMOKE, "--every", "3"],
            60,
            skip=no_tool,
        )
        for name in ("memcheck", "racecheck")
    ]
    steps += [
        Step(
            f"tests of {name}",
            [PYTHON, "-m", "pytest", "-q", "-rf", "-m", "gpu", f"python_tests/test_{name}.py"],
            30,
            skip=no_gpu,
        )
        for name in TESTS
    ]
    steps += [
        Step(
            f"bench of {name}",
            [PYTHON, f"benches/bench_{name}.py", "--device", "cuda", "--seconds", "0.3"],
            seconds,
            skip=no_gpu,
            env={"VCR1_RESULTS": str(output / "benches")},
        )
        for name, seconds in BENCHES
    ]
    rest = [PYTHON, "-m", "pytest", "-q", "-rf", "-m", "gpu", "python_tests"]
    rest += [f"--ignore=python_tests/test_{name}.py" for name in TESTS]
    return [*steps, Step("all other gpu tests", rest, 60, skip=no_gpu)]


def run_step(step: Step, seconds: float, log: Path) -> Outcome:
    """Run a step for at most `seconds`; its output goes to the terminal and to `log`."""
    began = time.monotonic()
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.env},
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, "failed", said=f"{step.command[0]}: {error.strerror}")
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # A test's or sanitizer's children too; gone already where the command has ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        lines = [line.rstrip() for line in file if line.strip()]
    took = round(time.monotonic() - began, 1)
    nothing = "pytest" in step.command and code == 5  # no test was selected
    status = "stopped" if code is None else "passed" if code == 0 or nothing else "failed"
    return Outcome(step.name, status, took, told(lines))


def told(lines: Sequence[str]) -> str:
    """The lines of an output that matter in a summary: failures, then the last one."""
    marks = re.compile(r"^(FAILED|ERROR|WRONG)\b|^=+ (ERROR|RACECHECK) SUMMARY|geometric mean")
    found = [line for line in lines[:-1] if marks.search(line)]
    return "\n".join([*found[:20], *lines[-1:]])


def machine() -> dict[str, Any]:
    """What can be said about this machine without running a kernel."""

    def first(*command: str) -> str:
        try:
            found = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]}: {error}"
        return found.stdout.strip()

    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,compute_cap"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": first("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": first("nvcc", "--version")[-80:],
        "torch": first(PYTHON, "-c", "import torch; print(torch.__version__, torch.version.cuda)"),
        "commit": first("git", "rev-parse", "HEAD"),
    }


class Check:
    """The steps of one run: a deadline, outcomes, and the file that has them."""

    def __init__(self, output: Path, minutes: float, clock: Callable[[], float]) -> None:
        self.output, self.clock = output, clock
        self.deadline = clock() + 60 * minutes - RESERVE
        self.outcomes: list[Outcome] = []
        self.header: dict[str, Any] = {}
        output.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - self.clock()

    def take(self, step: Step, run: Callable[[Step, float, Path], Outcome] = run_step) -> Outcome:
        """Run a step, or say why not; either way it is on disk when this returns."""
        number = len(self.outcomes) + 1
        if step.skip:
            outcome = Outcome(step.name, "skipped", said=step.skip)
        elif self.left() < LEAST:
            outcome = Outcome(step.name, "skipped", said="no time left")
        else:
            print(f"[{number}] {step.name}, {min(step.seconds, self.left()):.0f} s", flush=True)
            log = self.output / f"{number:02d}_{re.sub(r'[^a-z0-9]+', '_', step.name)}.log"
            outcome = run(step, min(step.seconds, self.left()), log)
        self.outcomes.append(outcome)
        self.write()
        return outcome

    def write(self) -> None:
        content = {"machine": self.header, "steps": [vars(one) for one in self.outcomes]}
        partial = self.output / "results.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.output / "results.json")

    def summary(self) -> Iterator[str]:
        """A line a step, failures with what they said, and how many there are of each kind."""
        for one in self.outcomes:
            *failures, last = one.said.splitlines() or [""]
            yield f"{one.status:8} {one.seconds:6.1f} s  {one.name}: {last}"
            yield from (f"                   {line}" for line in failures)
        kinds = ("passed", "failed", "stopped", "skipped")
        counts = [sum(one.status == kind for one in self.outcomes) for kind in kinds]
        yield ", ".join(f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True))
        yield f"all of it: {self.output / 'results.json'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--emulate", action="store_true", help="a dry run without a GPU")
    parser.add_argument("--build-only", action="store_true", help="compile, run nothing")
    options = parser.parse_args(arguments)
    check = Check(options.output.resolve(), options.minutes, time.monotonic)
    check.header = machine()
    check.write()
    works = True
    if not options.emulate and not (options.build_only or (reason := prebuilt()) is None):
        check.take(Step("build", (), 0, skip=reason))
    elif not options.emulate:
        STAMP.unlink(missing_ok=True)
        # "native": one architecture instead of three, in a third of the time.
        for step in build_steps("80-real;90-real;90-virtual" if options.build_only else "native"):
            works = works and check.take(step).status == "passed"
        if works:
            STAMP.write_text(f"{sources_digest()} cuda\n")
    if works and not options.build_only:
        for step in plan(check.output, options.emulate):
            check.take(step)
    print("\n".join(check.summary()))
    return int(any(one.status == "failed" for one in check.outcomes))


if __name__ == "__main__":
    sys.exit(main())
