"""Reuse of host memory: large CPU results take the memory that earlier ones have released.

The system zeroes each page of fresh memory at its first use and unmaps it at its release, which
costs more than the kernels' work on it; the C library keeps no block above 32 MiB. So results of
1 MiB and more live in blocks of our allocator (csrc/cpu/pages.h), which keeps up to 256 MiB of
released blocks; `release()` returns them to the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vcr1_fast.ops.backend import native

LEAST_BYTES = 1 << 20
_SERVED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, contiguous.

    Large tensors of float32, bfloat16 and float16 take reused memory; `resize_` cannot grow them.
    """
    # A comparison with a traced size would add a guard to the compiled graph.
    if torch.compiler.is_compiling() or native is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype not in _SERVED or prod(shape) * dtype.itemsize < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_dlpack(native.take_block(shape, _SERVED[dtype]))


def release() -> int:
    """Return all kept memory to the system now; returns the number of bytes."""
    return 0 if native is None else native.drop_kept_blocks()
