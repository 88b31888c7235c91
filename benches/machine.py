"""What the machine says of itself: name, caches, commit, load, and the peak of memory of a call."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1).strip() if match else platform.machine()


def cache_bytes(level: int) -> int:
    """Size of one cache of that level as the kernel reports it; 32 MiB where it does not."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (folder / "level").read_text().strip() == str(level):
            return int((folder / "size").read_text().strip().removesuffix("K")) << 10
    return 32 << 20


def commit() -> str:
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


class OtherLoad:
    """Processors that the rest of the system (on a shared host, its neighbours too) kept busy."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds on the wall, and of processor time that was not ours."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, soft_irq, steal = ticks
        busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - sum(os.times()[:4])

    def mean(self) -> float | None:
        """Since the beginning; None where the system does not report it."""
        now = self._now()
        if self._start is None or now is None:
            return None
        return max(0.0, (now[1] - self._start[1]) / (now[0] - self._start[0]))


def peak_extra(
    fn: Callable[[], object], device: torch.device, release: Callable[[], None] | None = None
) -> int | None:
    """Bytes at the peak of fn(), its result included, above what is held before it; None where the
    system does not report it.

    On a GPU: torch's own count (`torch.cuda.max_memory_allocated`), bytes of live tensors; a
    library's workspace outside its allocator is not seen. On a CPU: the kernel's count of resident
    memory (VmHWM after a reset, less VmRSS before), so scratch memory of any library is in it, and
    memory that was reserved but never touched is not. Freed heap memory is given back to the system
    first, or the call would reuse it unseen. Small allocations are noise: trust differences above
    1 MiB.

    release: called first, to free what an earlier call has left. Call fn() once before, for what
    it allocates once and for all.
    """
    if release is not None:
        release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fn()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # no glibc, no /proc
        return None
    result = fn()
    peak = _resident("VmHWM")
    del result
    return max(peak - before, 0)


def _resident(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    if match is None:
        raise OSError(f"{_PROCESS / 'status'} has no {key}")
    return int(match[1]) << 10
