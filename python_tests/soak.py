"""A soak test: the demo's training, killed every minute and resumed, beside a run left alone.

    python python_tests/soak.py --minutes 60 --kill-every 60 --output runs/soak

`vcr1 train` runs on the demo's clips from the shipped checkpoint. Every `--kill-every` seconds the
process gets SIGKILL and the same command starts again. After `--minutes` the run is stopped by
SIGTERM, at whichever step it has reached, and a second run takes as many steps without a break.
Both must agree in metrics (without times), rollouts and exported weights, to the byte, and no
process of the uninterrupted run may grow: once warm, its memory stays within `GROWTH`.

Prints one line a life of the process, and a summary as JSON; exit status 1 when something differs.
pytest does not collect this file: it takes twice `--minutes`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from vcr1_fast.config.loader import dump_config
from vcr1_fast.data.synth import write_dataset
from vcr1_fast.demo.run import grpo_config
from vcr1_fast.demo.settings import QUICK, WARM_START
from vcr1_fast.files import write_atomic

GROWTH = 1.05
"""Largest ratio of a process's median memory in the last and in the second quarter of a run. The
first quarter fills caches (decoded clips, the allocator's pools)."""
SAMPLE_SECONDS = 1.0
_TIMES = ("seconds/", "tokens_per_second", "time", "memory_gib")


@dataclass
class Life:
    """One process of a run, from start to end. memory: MiB of each process, by its role."""

    memory: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    status: int | None = None
    tail: str = ""

    def peaks(self) -> dict[str, int]:
        return {role: round(max(values)) for role, values in sorted(self.memory.items())}

    def growth(self) -> dict[str, float]:
        """Median memory of the last quarter over that of the second one, by role."""
        result = {}
        for role, values in sorted(self.memory.items()):
            quarter = len(values) // 4
            if quarter:
                second, last = values[quarter : 2 * quarter], values[-quarter:]
                result[role] = round(median(last) / median(second), 3)
        return result


def prepare(output: Path) -> Path:
    """Clips and the configuration file of the run; its path."""
    # Short steps: more of them, and more file operations, between two kills.
    demo = replace(QUICK, output=str(output), grpo_prompts=2, group_size=4)
    splits = write_dataset(output / "data", demo.clips)
    config = grpo_config(demo, WARM_START, splits["train"])
    # A constant rate: the number of steps is known only when the time is up.
    optim = replace(config.optim, schedule="constant", warmup_steps=0)
    run = replace(config.run, save_every=5, trackers=(), device="cpu")
    path = output / "config.yaml"
    write_atomic(path, dump_config(replace(config, optim=optim, run=run)))
    return path


def run_for(command: list[str], seconds: float | None, number: signal.Signals) -> Life:
    """Run a command, send it the signal after `seconds` (None: never), and watch its memory."""
    life, began = Life(), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    sent = False
    try:
        while process.poll() is None:
            if not sent and seconds is not None and time.monotonic() - began > seconds:
                process.send_signal(number)
                sent = True
            for role, size in _memory(process.pid).items():
                life.memory.setdefault(role, []).append(size)
            time.sleep(SAMPLE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.stderr is not None
    life.tail = process.stderr.read().strip()[-500:]
    life.seconds, life.status = time.monotonic() - began, process.returncode
    return life


def _memory(parent: int) -> dict[str, float]:
    """Resident MiB of a process ("main") and of its children ("worker 0", ...)."""
    found = {}
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                size = int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue  # it ended between the two reads
            if int(entry.name) == parent:
                found["main"] = size / 2**20
            elif int(fields[1]) == parent:
                children.append((int(entry.name), size / 2**20))
    for index, (_, size) in enumerate(sorted(children)):
        found[f"worker {index}"] = size
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions, as checksums; the number of steps."""
    rows = _rows(folder / "metrics.jsonl")
    metrics = [{k: v for k, v in row.items() if not k.startswith(_TIMES)} for row in rows]
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {
        "steps": [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows),
        "metrics": _sha(json.dumps(metrics).encode()),
        "rollouts": _sha((folder / "rollouts.jsonl").read_bytes()),
        "weights": _sha(weights),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    config = prepare(options.output)

    def command(folder: Path, steps: int) -> list[str]:
        settings = (f"run.output={folder}", f"optim.steps={steps}")
        return [sys.executable, "-m", "vcr1_fast.cli", "train", "--config", str(config), *settings]

    killed, whole = options.output / "killed", options.output / "whole"
    endless = 1000 + int(1200 * options.minutes)  # steps; none takes less than 1/20 s
    lives: list[Life] = []
    until = time.monotonic() + 60 * options.minutes
    while (left := until - time.monotonic()) > 0:
        # Within a tenth of the interval: each kill finds another part of a step.
        pause = options.kill_every * rng.uniform(0.9, 1.1)
        last = left < 1.5 * pause  # a life as short as the rest would end before its first step
        number = signal.SIGTERM if last else signal.SIGKILL
        lives.append(run_for(command(killed, endless), left if last else pause, number))
        print(
            f"life {len(lives)}: {lives[-1].seconds:.0f} s, status {lives[-1].status}, "
            f"peak MiB {lives[-1].peaks()}",
            flush=True,
        )
        if lives[-1].status not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            print(f"the run ended by itself: {lives[-1].tail}")
            return 1
    steps = _rows(killed / "metrics.jsonl")[-1]["step"]
    finish = run_for(command(killed, steps), None, signal.SIGTERM)
    alone = run_for(command(whole, steps), None, signal.SIGTERM)
    for life in (finish, alone):
        if life.status != 0:
            print(f"the run ended with {life.status}: {life.tail}")
            return 1
    got, expected = outcome(killed), outcome(whole)
    growth = alone.growth()
    steady = all(ratio <= GROWTH for ratio in growth.values())
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "minutes": options.minutes,
        "kills": sum(life.status == -signal.SIGKILL for life in lives),
        "steps": steps,
        "identical": got == expected,
        "killed": got,
        "whole": expected,
        "whole_seconds": round(alone.seconds),
        "whole_peak_mib": alone.peaks(),
        "whole_growth": growth,
        "lives_peak_mib": [life.peaks().get("main") for life in lives],
    }
    print(json.dumps(summary, indent=2))
    return 0 if got == expected and steady else 1


if __name__ == "__main__":
    sys.exit(main())
