"""Shared memory for what worker processes hand over, within a budget of bytes.

A block is anonymous memory behind a file descriptor: a worker maps it, writes its result there, and
the bytes are never copied between the processes. It has no name that a killed process could leave
behind and does not count against the size of /dev/shm. Blocks are used again, since the system
zeroes fresh pages and CUDA takes long to pin them.
"""

import math
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


class PoolClosed(RuntimeError):
    """A block was asked for after the pool's end."""


class BlockPool:
    """Blocks for the results of numbered items, at most `budget` bytes ahead of the consumer.

    An item counts from its first `lend` until `settle`, when the consumer has its result. Items
    that the consumer waits for (`awaited`), and those queued before them, get their memory at once:
    one may be larger than the budget, and the consumer frees none while it waits. So at most
    `budget` bytes and the result that is waited for are held. Released blocks are kept for the next
    item as far as the budget leaves room.

    `pin`: register the memory with CUDA, which then copies it to a GPU without the CPU, and while
    both go on. RuntimeError where CUDA refuses.
    """

    def __init__(self, budget: int, *, pin: bool = False) -> None:
        self.budget, self.pin = budget, pin
        self._open: dict[int, int] = {}  # number -> bytes
        self._awaited: list[int] = []  # of each thread that waits for a result
        # Appended to when an array is released, which may be in the middle of any other line.
        self._returned: deque[_Block] = deque()
        self._kept: list[_Block] = []
        self._changed = threading.Condition()
        self._closed = False

    @property
    def held(self) -> int:
        """Bytes that count at present."""
        with self._changed:
            return sum(self._open.values())

    @property
    def kept(self) -> int:
        """Bytes of released blocks that wait for another item."""
        with self._changed:
            self._trim()
            return sum(block.size for block in self._kept)

    @contextmanager
    def awaited(self, number: int) -> Iterator[None]:
        """While the consumer waits for an item. Numbers ascend in the order of the queue."""
        with self._changed:
            self._awaited.append(number)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._awaited.remove(number)

    def settle(self, number: int) -> None:
        """Count an item's bytes no longer. Its arrays stay as they are, with whoever has them."""
        with self._changed:
            self._open.pop(number, None)
            self._trim()
            self._changed.notify_all()

    def lend(self, number: int, size: int, more: int = 0) -> tuple[int, np.ndarray]:
        """(file descriptor, the same memory as (size,) uint8) for an item, when there is room.

        The block is released with the array's last view. `more`: bytes to count beside the block's,
        for what the consumer's side will make of it. PoolClosed after `close`; OSError where the
        system has no memory left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(number, size + more))
            if self._closed:
                raise PoolClosed("the worker pool was closed")
            self._open[number] = self._open.get(number, 0) + size + more
            self._trim()
            block = self._kept_block(size)
        # Outside the lock: a system call for each page, and longer where it is pinned.
        if block is None:
            block = _Block(_rounded(size), pin=self.pin)
        memory = np.frombuffer(block.memory, np.uint8)
        released = weakref.finalize(memory, self._take_back, block)
        released.atexit = False
        return block.file, memory[:size]

    def close(self) -> None:
        """Refuse further items, waiting ones included. Blocks in use go with their last array."""
        with self._changed:
            self._closed = True
            self._open.clear()
            self._trim()
            self._changed.notify_all()

    def _has_room(self, number: int, size: int) -> bool:
        # Those queued before it may hold the threads that it needs.
        if number <= max(self._awaited, default=-1):
            return True
        return sum(self._open.values()) + size <= self.budget

    def _trim(self) -> None:
        """Give back kept memory beyond what the items in use leave of the budget, oldest first."""
        while self._returned:
            self._kept.append(self._returned.popleft())
        room = 0 if self._closed else self.budget - sum(self._open.values())
        while self._kept and sum(block.size for block in self._kept) > room:
            self._kept.pop(0).close()

    def _kept_block(self, size: int) -> "_Block | None":
        # Twice the size at most: a small clip must not hold a large one's memory.
        fitting = [block for block in self._kept if size <= block.size <= 2 * _rounded(size)]
        if not fitting:
            return None
        best = min(fitting, key=lambda block: block.size)
        self._kept.remove(best)
        return best

    def _take_back(self, block: "_Block") -> None:
        # Runs where the last reference goes, perhaps under our own lock: it must not take it.
        if self._closed:
            block.close()
        else:
            self._returned.append(block)


class _Block:
    """Anonymous shared memory: `file` its descriptor, `memory` the mapping, `size` in bytes."""

    def __init__(self, size: int, *, pin: bool) -> None:
        self.size = size
        self.file = _anonymous_file()
        self._pinned = 0
        try:
            if hasattr(os, "posix_fallocate"):
                # Now, as an error: a page that cannot be made later kills whoever writes to it.
                os.posix_fallocate(self.file, 0, size)
            else:
                os.ftruncate(self.file, size)
            self.memory = mmap.mmap(self.file, size)
            if pin:
                self._pin()
        except BaseException:
            os.close(self.file)
            raise

    def close(self) -> None:
        """Forget the memory; it is unmapped with its last array."""
        if self._pinned:
            import torch

            # Nobody copies from it any more: `Staging` waits for its copies.
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
        os.close(self.file)
        del self.memory

    def _pin(self) -> None:
        import torch  # workers and readers without a GPU do not need it

        address = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]
        portable = 1  # pinned for every device, whatever the current one is
        status = torch.cuda.cudart().cudaHostRegister(address, self.size, portable)
        if int(status) != 0:
            raise RuntimeError(
                f"CUDA cannot pin {self.size >> 20} MiB of memory for frames (error {int(status)}):"
                " lower data.prefetch_mb, or set data.resize=worker"
            )
        self._pinned = address


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vcr1-frames", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _rounded(size: int) -> int:
    """Up to the next of eight steps between powers of two, so that clips of like sizes share."""
    step = max(1 << max(math.ceil(math.log2(max(size, 1))) - 4, 0), mmap.PAGESIZE)
    return -(-max(size, 1) // step) * step
