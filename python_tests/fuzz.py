"""Fuzzing: hostile inputs for parsers and rewards, records, decoders and the native module.

    python python_tests/fuzz.py --seconds 60                       # all targets, shared out
    python python_tests/fuzz.py --target parsers --seconds 3600 --seed 7
    python python_tests/fuzz.py --target native --seed 7 --first 812 --cases 1   # one case again

Each target runs in a separate process. A crash or a hang is a finding, and the target starts again
behind the case that ended it. A case depends on the seed and its number alone. An execution is one
call of a function of the package on one input. Each finding is one line that names target, seed,
case and fault; a summary follows as JSON. Exit status 1 for any finding.

The corpus is the few seeds written here. pytest does not collect this file; test_fuzz.py runs a few
hundred cases of each target.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARES = {"parsers": 0.4, "records": 0.15, "decoders": 0.2, "native": 0.25}
"""Targets, and their shares of the time of a run of all."""
HANG = 120.0
"""Seconds after which a case counts as hung."""
MAX_FINDINGS = 20
"""A target ends after this many; more of them tell nothing new."""

Target = Callable[[random.Random], int]
"""Runs one case, returns its executions; AssertionError for a broken promise."""


def load(name: str) -> Target:
    """The target; imports only what it needs."""
    if name == "parsers":
        from fuzz_texts import parsers

        return parsers
    if name == "records":
        from fuzz_records import Records

        return Records(Path(tempfile.mkdtemp(prefix="fuzz-records-")))
    if name == "decoders":
        from fuzz_media import Decoders

        return Decoders(Path(tempfile.mkdtemp(prefix="fuzz-media-")))
    from fuzz_native import native_ops

    return native_ops


def run_cases(
    target: Target, seed: int, first: int, *, seconds: float, cases: int | None, state: int | None
) -> dict[str, Any]:
    """Run cases first, first + 1, ...; `state`: descriptor that gets each case's number before it
    runs, for the process that outlives this one."""
    rng, began = random.Random(), time.monotonic()
    result: dict[str, Any] = {"cases": 0, "executions": 0, "findings": []}
    case = first
    while time.monotonic() - began < seconds and (cases is None or case - first < cases):
        if case % 64 == 0 or case == first:  # arming starts a thread: not for every case
            faulthandler.dump_traceback_later(HANG, exit=True)
        if state is not None:
            os.pwrite(state, case.to_bytes(8, "little"), 0)
        rng.seed((seed << 40) + case)
        try:
            result["executions"] += target(rng)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
            result["findings"].append({"case": case, "fault": fault})
            if len(result["findings"]) == MAX_FINDINGS:
                break
        case += 1
        result["cases"] += 1
    faulthandler.cancel_dump_traceback_later()
    return result


def run_target(
    name: str, seed: int, first: int, seconds: float, cases: int | None
) -> dict[str, Any]:
    """Run a target in separate processes until the time is up."""
    total: dict[str, Any] = {"cases": 0, "executions": 0, "findings": []}
    began = time.monotonic()
    with tempfile.TemporaryFile() as state:
        while len(total["findings"]) < MAX_FINDINGS:
            left = seconds - (time.monotonic() - began)
            if left <= 0 or (cases is not None and total["cases"] >= cases):
                break
            command = [sys.executable, __file__, "--child", str(state.fileno()), "--target", name]
            command += ["--seed", str(seed), "--first", str(first), "--seconds", str(left)]
            if cases is not None:
                command += ["--cases", str(cases - total["cases"])]
            done = subprocess.run(
                command, pass_fds=[state.fileno()], capture_output=True, text=True
            )
            if done.returncode == 0:
                part = json.loads(done.stdout.splitlines()[-1])
            else:
                last = int.from_bytes(os.pread(state.fileno(), 8, 0), "little")
                fault = f"the process ended with {done.returncode}: {done.stderr.strip()[-400:]}"
                part = {"cases": last + 1 - first, "executions": 0}
                part["findings"] = [{"case": last, "fault": fault}]
            for count in ("cases", "executions"):
                total[count] += part[count]
            for item in part["findings"]:
                print(f"{name} seed {seed} case {item['case']}: {item['fault']}", flush=True)
            total["findings"] += part["findings"]
            first += part["cases"]
            if not part["cases"]:
                break
    total["seconds"] = round(time.monotonic() - began)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=tuple(SHARES), help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="of each target at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        result = run_cases(
            load(options.target),
            options.seed,
            options.first,
            seconds=options.seconds,
            cases=options.cases,
            state=options.child,
        )
        print(json.dumps(result))
        return 0
    shares = {options.target: 1.0} if options.target else SHARES
    summary: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "seed": options.seed,
    }
    for name, share in shares.items():
        seconds = share * options.seconds
        result = run_target(name, options.seed, options.first, seconds, options.cases)
        summary[name] = result | {"findings": len(result["findings"])}
    summary["executions"] = sum(summary[name]["executions"] for name in shares)
    summary["findings"] = sum(summary[name]["findings"] for name in shares)
    print(json.dumps(summary, indent=2))
    return 1 if summary["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
