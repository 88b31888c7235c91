"""Large CPU results in memory that earlier ones have released.

The system zeroes each page of fresh memory at its first use and unmaps it at its release, which
costs more than all that the kernels do to it; the C library keeps no piece above 32 MiB. So results
of 1 MiB and more are made in blocks of our own (csrc/cpu/pages.h), of which up to 256 MiB are kept
when the tensors are gone; `release()` gives them back.
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
    """`torch.empty` on the CPU, contiguous; for a large result of float32, bfloat16 or float16 in
    reused memory, of which `resize_` cannot change the size."""
    if torch.compiler.is_compiling() or native is None:  # a size that is traced is not compared
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype not in _SERVED or prod(shape) * dtype.itemsize < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_dlpack(native.take_block(shape, _SERVED[dtype]))


def release() -> int:
    """Gives what is kept back to the system now; returns the number of bytes."""
    return 0 if native is None else native.drop_kept_blocks()
