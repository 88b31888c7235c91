"""How many rows of an LM head's logits exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops.memory import available_bytes

# The most bytes of logits: enough rows for the matrix products to run at full rate and for the sum
# of dW, one pass over (V, H) a chunk, to be small beside them.
_MOST_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_FREE_SHARE = 8  # of the free memory, one part in this
_MOST_ROWS = 8192


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
    share = max(available_bytes(hidden.device) // _FREE_SHARE, 1)
    # A power of two, so that the order of sums does not follow every change of the free memory.
    budget = min(1 << share.bit_length() - 1, most_bytes(hidden.device))
    row_bytes = max(vocab * hidden.element_size() * (2 if doubled else 1), 1)
    return min(max(budget // row_bytes, 1), _MOST_ROWS)


def most_bytes(device: torch.device) -> int:
    """The most bytes of logits that exist at a time where the number of rows is not given."""
    return _MOST_BYTES.get(device.type, 1 << 30)
