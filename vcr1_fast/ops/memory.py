"""Free memory of a device."""

from __future__ import annotations

import re

import torch

_UNKNOWN = 2 << 30
"""Bytes taken for free main memory where the system does not say: a modest machine's."""


def available_bytes(device: torch.device) -> int:
    """Bytes that a new tensor can have on `device`: what the system reports as available, and on a
    GPU also what torch's allocator holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:  # not Linux
        found = None
    if found:
        return int(found[1]) << 10
    try:
        import psutil  # comes with accelerate; the ops alone do without
    except ImportError:
        return _UNKNOWN
    return int(psutil.virtual_memory().available)
