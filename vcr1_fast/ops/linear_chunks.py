"""How many rows of an LM head's logits exist at a time."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# The most bytes of logits: enough rows for the matrix products to run at full rate and for the sum
# of dW, one pass over (V, H) a chunk, to be small beside them.
_MOST_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_FREE_SHARE = 8  # of the free memory, one part in this
_MOST_ROWS = 8192
_FALLBACK_FREE = 2 << 30


def check_chunk_rows(chunk_rows: int | None) -> int:
    """`chunk_rows` as the ops take it: 0 stands for None, to be chosen when the op runs."""
    if chunk_rows is None:
        return 0
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    return chunk_rows


def rows_per_chunk(hidden: Tensor, vocab: int, chunk_rows: int, *, doubled: bool = False) -> int:
    """`chunk_rows`, or for 0 as many as fit an eighth of the free memory, rounded down to a power
    of two of bytes, and at most 256 MiB on the CPU or 1 GiB on a GPU; at most 8192 rows.

    doubled: a second tensor of the logits' size exists beside them.
    """
    if chunk_rows:
        return chunk_rows
    share = max(free_bytes(hidden.device) // _FREE_SHARE, 1)
    # A power of two, so that the order of sums does not follow every change of the free memory.
    budget = min(1 << share.bit_length() - 1, most_bytes(hidden.device))
    row_bytes = max(vocab * hidden.element_size() * (2 if doubled else 1), 1)
    return min(max(budget // row_bytes, 1), _MOST_ROWS)


def most_bytes(device: torch.device) -> int:
    """The most bytes of logits that exist at a time where the number of rows is not given."""
    return _MOST_BYTES.get(device.type, 1 << 30)


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could have, what torch's allocator keeps for it included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:  # not Linux
        found = None
    return int(found[1]) << 10 if found else _FALLBACK_FREE
