"""The peak of memory that one call adds to what is held before it.

On a GPU: torch's own count (`torch.cuda.max_memory_allocated`), bytes of live tensors; a library's
workspace outside its allocator is not seen. On a CPU: the kernel's count of resident memory (VmHWM
after a reset, less VmRSS before), so scratch memory of any library is in it, and memory that was
reserved but never touched is not. Freed heap memory is given back to the system first, or the call
would reuse it unseen. Small allocations are noise: trust differences above 1 MiB.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_extra(
    fn: Callable[[], object], device: torch.device, release: Callable[[], None] | None = None
) -> int | None:
    """Bytes at the peak of fn(), its result included; None where the system does not tell.

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
        result = fn()
        peak = _resident("VmHWM")
    except (OSError, AttributeError, TypeError):
        return None
    del result
    return max(peak - before, 0)


def _resident(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    if match is None:
        raise OSError(f"{_PROCESS / 'status'} has no {key}")
    return int(match[1]) << 10
