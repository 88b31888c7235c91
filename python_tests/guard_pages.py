"""Tensors between two inaccessible pages: a read or write beside them ends the process."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PAGE = mmap.PAGESIZE
_SLACK = b"\xa5"


@dataclass
class _Block:
    base: int
    total: int
    start: int  # of the tensor's bytes
    size: int

    def slack(self) -> bytes:
        """The accessible bytes around the tensor's."""
        end = self.base + self.total - _PAGE
        before = ctypes.string_at(self.base + _PAGE, self.start - self.base - _PAGE)
        return before + ctypes.string_at(self.start + self.size, end - self.start - self.size)


class Guarded:
    """Copies of tensors on guarded memory, freed together when the `with` block ends."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def copy(self, x: torch.Tensor, *, at_end: bool) -> torch.Tensor:
        """`x` with its strides and values, its last byte before a guard page (`at_end`), or its
        first byte behind one."""
        x = x.detach()
        if x.numel() == 0 or x.device.type != "cpu" or x.layout != torch.strided:
            return x
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)
        )
        memory = self._new(span * x.element_size(), at_end)
        flat = torch.frombuffer(memory, dtype=torch.uint8).view(x.dtype)
        flat.copy_(x.as_strided((span,), (1,)))
        return flat.as_strided(x.shape, x.stride())

    def written_outside(self) -> bool:
        """Whether bytes beside the tensors, but before the guard pages, have changed."""
        return any(block.slack().strip(_SLACK) for block in self._blocks)

    def _new(self, size: int, at_end: bool) -> ctypes.Array[ctypes.c_char]:
        pages = -(-size // _PAGE)
        total = (pages + 2) * _PAGE
        private, anonymous = 0x02, 0x20
        base = _LIBC.mmap(None, total, 1 | 2, private | anonymous, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"mmap of {total} bytes")
        for guard in (base, base + total - _PAGE):
            if _LIBC.mprotect(guard, _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memset(base + _PAGE, _SLACK[0], pages * _PAGE)
        start = base + _PAGE + (pages * _PAGE - size if at_end else 0)
        self._blocks.append(_Block(base, total, start, size))
        return (ctypes.c_char * size).from_address(start)

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *exception: object) -> None:
        for block in self._blocks:
            _LIBC.munmap(block.base, block.total)
        self._blocks.clear()
