"""Timing for the benches: both sides in one process, medians, and the machine's own limit beside.

    with Bench("iou") as bench:
        bench.run("box_iou", "4096x4096", "float32", {"torchvision": f, "ours": g}, bytes=...)

prints one row for each entry other than "ours":

    op | shape | dtype | baseline | ours | speedup | GB/s | % of limit | error | extra MiB

Times are medians over rounds in which the entries take turns, so that a change of clock or load
hits all of them. Before each call the caches are filled with something else, as in a training step,
where the rest of the model has just run: on a GPU by writing 256 MiB, on a CPU by reading twice
what the cores' second-level caches hold. The CPU's last level is left as it is (on a shared host it
is not ours, and emptying it would time the interpreter's own misses), so small inputs may come from
there, faster than memory; `cold=False` leaves all alone. GB/s is ours: `bytes` (what the work must
move at least: say how it is counted) over our time. The limit is the read or the copy bandwidth
measured in the same run on more memory than the caches hold, or the time of an entry that does
nothing but the unavoidable part (`limit="bare products"`).

An entry may be a string in place of a callable: the reason why a peer cannot run here (see
peers.py), which is printed and stored in place of numbers. A geometric mean closes the table, and
everything goes to benches/results/<stem>_<device>.json, or to the folder VCR1_RESULTS. Until the
end it stands there as <stem>_<device>.partial.json, row by row: what was measured outlives a kill.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch
from machine import OtherLoad, cache_bytes, commit, cpu_name, peak_extra
from peers import versions

RESULTS = Path(os.environ.get("VCR1_RESULTS") or Path(__file__).parent / "results")
_MIB = 1 << 20
Entry = Callable[[], object]


class Timer:
    """Seconds of one call, on the CPU's clock or between two CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 256 * _MIB
        if device.type == "cpu":
            size = 2 * cache_bytes(2) * torch.get_num_threads()
        self._flush = torch.zeros(size // 4, device=device)

    def once(self, fn: Entry, *, cold: bool = True) -> float:
        if self.device.type == "cpu":
            if cold:
                self._flush.sum()
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        if cold:
            self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(
        self, fns: Mapping[str, Entry], seconds: float, *, cold: bool = True, rounds: int = 5
    ) -> dict[str, float]:
        """Rounds in turn until `seconds` have passed, at least `rounds` and at most 200."""
        times: dict[str, list[float]] = {name: [] for name in fns}
        start = time.perf_counter()
        for done in range(1, 201):
            for name, fn in fns.items():
                times[name].append(self.once(fn, cold=cold))
            if done >= rounds and time.perf_counter() - start > seconds:
                break
        return {name: statistics.median(values) for name, values in times.items()}


def scaled_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `exact` (float64)."""
    exact = exact.double()
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((got.double() - exact).abs().max() / scale)


def _mean(ratios: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


class Bench:
    """One table. `device` is "cpu" or "cuda"; `threads` are the CPU's (default: all)."""

    def __init__(
        self, stem: str, *, device: str = "cpu", threads: int | None = None, seconds: float = 2.0
    ) -> None:
        self.stem, self.seconds = stem, seconds
        self.device = torch.device(device)
        torch.set_num_threads(threads or os.cpu_count() or 1)
        self._timer = Timer(self.device)
        self._load = OtherLoad()
        self._rows: list[dict[str, object]] = []
        name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        self.header = {
            "stem": stem,
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            **{f"{kind}_GBps": round(self._limit(kind) / 1e9, 1) for kind in ("read", "copy")},
        }

    def _limit(self, kind: str) -> float:
        size = 256 * _MIB
        if self.device.type == "cpu":
            size = max(size, min(2 * cache_bytes(3), 1024 * _MIB))
        source = torch.ones(size // 4, device=self.device)
        if kind == "read":
            return size / min(self._timer.once(source.sum, cold=False) for _ in range(7))
        target = torch.ones_like(source)
        copy = (self._timer.once(lambda: target.copy_(source), cold=False) for _ in range(7))
        return 2 * size / min(copy)

    def __enter__(self) -> Bench:
        print(" | ".join(f"{key} {value}" for key, value in self.header.items()))
        print("op | shape | dtype | baseline | ours | speedup | GB/s | % of limit", end="")
        print(" | error (theirs, ours) | extra MiB (theirs, ours)")
        return self

    def run(
        self,
        op: str,
        shape: str,
        dtype: str,
        fns: Mapping[str, Entry | str],
        bytes: float,
        *,
        limit: str = "copy",
        errors: Mapping[str, float] | None = None,
        memory: bool | Callable[[], None] = False,
        cold: bool = True,
        rounds: int = 5,
        notes: Mapping[str, object] | None = None,
        amounts: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Times `fns`, of which "ours" is compared with each other one; returns the medians (s).

        An entry named "ours, ..." is another form of ours: its time is a column, not a row.

        bytes: least traffic of the work, for GB/s; limit: "read" or "copy", which it is held to,
        or the entry of `fns` whose time is the limit (it then gets no separate row).
        errors: for "ours" and the entries that have one, against float64 (see scaled_error).
        memory: measure the peak that each entry adds while it runs (see machine.py); a callable is
        called before each measurement, to free what an earlier call has left (gradients).
        rounds: the least number of them, below 5 for work of many seconds; notes: more columns;
        amounts: what a call gets done by name ("tokens"), for both sides' rates a second.
        """
        reasons = {name: fn for name, fn in fns.items() if isinstance(fn, str)}
        runnable = {name: fn for name, fn in fns.items() if not isinstance(fn, str)}
        for name, fn in list(runnable.items()):
            try:
                fn()
            except torch.OutOfMemoryError:
                reasons[name] = "out of memory"
                del runnable[name]
        forms = [name for name in runnable if name.startswith("ours, ")]
        baselines = [name for name in runnable if name not in ("ours", limit, *forms)]
        if "ours" not in runnable or not baselines or not {*(errors or ())} <= fns.keys():
            raise ValueError(
                f"expected 'ours' and at least one baseline that run, and errors of these only; "
                f"got {list(runnable)}, {reasons} and errors of {list(errors or ())}"
            )
        medians = self._timer.medians(runnable, self.seconds, cold=cold, rounds=rounds)
        release = memory if callable(memory) else None
        extra = {n: peak_extra(fn, self.device, release) for n, fn in runnable.items() if memory}
        ours = medians["ours"]
        rate = bytes / ours / 1e9
        if limit in medians:
            share = 100 * medians[limit] / ours
        else:
            share = 100 * rate / float(self.header[f"{limit}_GBps"])  # type: ignore[arg-type]
        for name in baselines:
            row: dict[str, object] = {
                "op": op,
                "shape": shape,
                "dtype": dtype,
                "baseline": name,
                "baseline_ms": round(medians[name] * 1e3, 4),
                "ours_ms": round(ours * 1e3, 4),
                "speedup": round(medians[name] / ours, 3),
                "GBps": round(rate, 2),
                "limit": limit,
                "percent_of_limit": round(share, 1),
                "cold": cold,
                **{f"{form}, ms": round(medians[form] * 1e3, 4) for form in forms},
                **(notes or {}),
            }
            for side, key in (("baseline", name), ("ours", "ours")):
                if key in (errors or {}):
                    row[f"{side}_error"] = float(f"{errors[key]:.2e}")  # type: ignore[index]
                for what, amount in (amounts or {}).items():
                    row[f"{side}_{what}_per_s"] = float(f"{amount / medians[key]:.4g}")
                if extra.get(key) is not None:
                    row[f"{side}_extra_MiB"] = round(extra[key] / _MIB, 1)  # type: ignore[operator]
            self._add(row)
        for name, reason in reasons.items():
            self.skip(op, shape, dtype, name, reason)
        return medians

    def skip(self, op: str, shape: str, dtype: str, name: str, reason: str) -> None:
        """A row without numbers: why the peer `name` was not timed."""
        self._add({"op": op, "shape": shape, "dtype": dtype, "baseline": name, "skipped": reason})

    def _add(self, row: dict[str, object]) -> None:
        self._rows.append(row)
        self._store(".partial")
        start = f"{row['op']} | {row['shape']} | {row['dtype']} | {row['baseline']}"
        if "skipped" in row:
            print(f"{start}: {row['skipped']}", flush=True)
            return
        pairs = [
            " ".join(str(row.get(f"{side}_{what}", "-")) for side in ("baseline", "ours"))
            for what in ("error", "extra_MiB")
        ]
        print(
            f"{start} {row['baseline_ms']:.3f} ms | {row['ours_ms']:.3f} ms"
            f" | {row['speedup']:.2f}x | {row['GBps']:.1f}"
            f" | {row['percent_of_limit']:.0f} % of {row['limit']} | {' | '.join(pairs)}",
            flush=True,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ratios = self._speedups()
        if kind is not None or not ratios:
            return
        print(f"geometric mean of {len(ratios)} speedups: {_mean(ratios):.2f}x")
        self.header["peers"] = versions()
        load = self._load.mean()
        self.header["other_load"] = None if load is None else round(load, 2)
        if load is not None and load > 0.1:
            print(f"Others kept {load:.2f} processors busy meanwhile: these times are not clean.")
        partial = self._store(".partial")
        partial.replace(partial.with_name(partial.name.replace(".partial", "")))

    def _speedups(self) -> list[float]:
        return [float(row["speedup"]) for row in self._rows if "speedup" in row]  # type: ignore[arg-type]

    def _store(self, kind: str) -> Path:
        slug = re.sub(r"\((r|tm)\)|\W+", "-", str(self.header["device"]).lower())
        slug = re.sub("-+", "-", slug).strip("-")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.stem}_{slug}{kind}.json"
        content: dict[str, object] = {"header": self.header, "rows": self._rows}
        if ratios := self._speedups():
            content["geometric_mean"] = round(_mean(ratios), 3)
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def arguments(description: str) -> argparse.Namespace:
    """--device, --threads and --seconds, the arguments of `Bench`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    return parser.parse_args()
