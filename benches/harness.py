"""Timing for the benches: both sides in one process, medians, and the machine's own limit beside.

    with Bench("iou") as bench:
        bench.run("box_iou", "4096x4096", "float32", {"torchvision": f, "ours": g}, bytes=...)

prints one row for each entry other than "ours":

    op | shape | dtype | baseline | ours | speedup | GB/s | % of limit

Times are medians over rounds in which the entries take turns, so that a change of clock or load
hits all of them. GB/s is ours: `bytes` (what the work must move at least: say how it is counted)
over our time. The limit is the read or the copy bandwidth measured in the same run, on more memory
than the caches hold. A geometric mean closes the table, and everything goes to
benches/results/<stem>_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch

RESULTS = Path(__file__).parent / "results"
_LIMIT_BYTES = 1 << 28


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1).strip() if match else platform.machine()


def _commit() -> str:
    """HEAD's short hash, with "+" when tracked files differ from it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Timer:
    """Seconds of one call, on the CPU's clock or between two CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Written between two calls: on a GPU the second-level cache would keep the inputs.
        self._flush = (
            torch.empty(_LIMIT_BYTES, dtype=torch.uint8, device=device)
            if device.type == "cuda"
            else None
        )

    def once(self, fn: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, fns: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Rounds in turn until `seconds` have passed, at least 5 and at most 200."""
        for fn in fns.values():
            fn()
        times: dict[str, list[float]] = {name: [] for name in fns}
        start = time.perf_counter()
        for done in range(1, 201):
            for name, fn in fns.items():
                times[name].append(self.once(fn))
            if done >= 5 and time.perf_counter() - start > seconds:
                break
        return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """One table. `device` is "cpu" or "cuda"; `threads` are the CPU's (default: all)."""

    def __init__(
        self, stem: str, *, device: str = "cpu", threads: int | None = None, seconds: float = 2.0
    ) -> None:
        self.stem, self.seconds = stem, seconds
        self.device = torch.device(device)
        torch.set_num_threads(threads or os.cpu_count() or 1)
        self._timer = Timer(self.device)
        self._rows: list[dict[str, object]] = []
        name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
        self.header = {
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            **{f"{kind}_GBps": round(self._limit(kind) / 1e9, 1) for kind in ("read", "copy")},
        }

    def _limit(self, kind: str) -> float:
        source = torch.ones(_LIMIT_BYTES // 4, device=self.device)
        if kind == "read":
            best = min(self._timer.once(source.sum) for _ in range(7))
            return _LIMIT_BYTES / best
        target = torch.ones_like(source)
        best = min(self._timer.once(lambda: target.copy_(source)) for _ in range(7))
        return 2 * _LIMIT_BYTES / best

    def __enter__(self) -> Bench:
        print(" | ".join(f"{key} {value}" for key, value in self.header.items()))
        print("op | shape | dtype | baseline | ours | speedup | GB/s | % of limit")
        return self

    def run(
        self,
        op: str,
        shape: str,
        dtype: str,
        fns: dict[str, Callable[[], object]],
        bytes: float,
        *,
        limit: str = "copy",
    ) -> dict[str, float]:
        """Times `fns`, of which "ours" is compared with each other one; returns the medians (s).

        bytes: least traffic of the work, for GB/s; limit: "read" or "copy", which it is held to.
        """
        if "ours" not in fns or len(fns) < 2:
            raise ValueError(f"expected 'ours' and at least one baseline, got {list(fns)}")
        medians = self._timer.medians(fns, self.seconds)
        ours = medians["ours"]
        rate = bytes / ours / 1e9
        share = 100 * rate / float(self.header[f"{limit}_GBps"])  # type: ignore[arg-type]
        for name, seconds in medians.items():
            if name == "ours":
                continue
            print(
                f"{op} | {shape} | {dtype} | {name} {seconds * 1e3:.3f} ms | {ours * 1e3:.3f} ms"
                f" | {seconds / ours:.2f}x | {rate:.1f} | {share:.0f} % of {limit}",
                flush=True,
            )
            self._rows.append(
                {
                    "op": op,
                    "shape": shape,
                    "dtype": dtype,
                    "baseline": name,
                    "baseline_ms": round(seconds * 1e3, 4),
                    "ours_ms": round(ours * 1e3, 4),
                    "speedup": round(seconds / ours, 3),
                    "GBps": round(rate, 2),
                    "limit": limit,
                    "percent_of_limit": round(share, 1),
                }
            )
        return medians

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or not self._rows:
            return
        ratios = [float(row["speedup"]) for row in self._rows]  # type: ignore[arg-type]
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        print(f"geometric mean of {len(ratios)} speedups: {mean:.2f}x")
        slug = re.sub(r"\((r|tm)\)|\W+", "-", str(self.header["device"]).lower())
        slug = re.sub("-+", "-", slug).strip("-")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.stem}_{slug}.json"
        content = {"header": self.header, "rows": self._rows, "geometric_mean": round(mean, 3)}
        path.write_text(json.dumps(content, indent=1) + "\n")


def arguments(description: str) -> argparse.Namespace:
    """--device, --threads and --seconds, the arguments of `Bench`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    return parser.parse_args()
