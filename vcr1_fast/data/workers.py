"""A small pool of worker processes that can be killed: for work that may hang inside a C library.

Each worker is a fresh interpreter that imports one function and answers one item at a time over a
socket. Unlike the standard pools this needs no `if __name__ == "__main__"` in the caller's script,
forks nothing (decoders do not survive that) and times each item. Arrays that the function made by
`result_array` lie in memory that both processes share (`blocks.py`), within a budget; others come
over the socket.
"""

import itertools
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np

from vcr1_fast.data.blocks import BlockPool, PoolClosed

PREFETCH_BYTES = 1 << 30
START_TIMEOUT = 120.0  # seconds for a new interpreter to import the function
_COUNT = struct.Struct("<Q")
_PART = struct.Struct("<QQQ")  # bytes, number of the shared block (0: on the socket), offset in it


class WorkerError(RuntimeError):
    """The function, or its import, failed in the worker in a way that is no answer to an item."""


class WorkerTimeout(WorkerError):
    """An item took longer than the time-out; its worker was killed."""


class StartTimeout(WorkerTimeout):
    """A worker did not import its function within START_TIMEOUT."""


class WorkerDied(WorkerError):
    """A worker ended while it worked on an item, by a crash or from outside."""


class Stage(Protocol):
    """The last thing done to an answer in this process, ahead of the consumer.

    Called in a thread of the pool with what the function returned, never with an exception; what it
    raises is the item's answer. `pin`: whether shared memory is to be pinned for CUDA.
    """

    pin: bool

    def __call__(self, answer: Any, /) -> Any: ...

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of what it will make of an array of this shape, held ahead of the consumer too."""


class WorkerPool:
    """`workers` processes that apply `function`, importable by name, to items.

    `timeout` in seconds an item, None for no limit. `workers=0` calls the function in this process,
    without a time-out. At most `prefetch` items are held ahead of the consumer, and of arrays in
    shared memory, with what `stage` makes of them, `prefetch_bytes` and the oldest item's.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        workers: int,
        timeout: float | None = None,
        prefetch: int | None = None,
        prefetch_bytes: int = PREFETCH_BYTES,
        stage: Stage | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout}")
        if prefetch is not None and prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        if prefetch_bytes < 1:
            raise ValueError(f"prefetch_bytes must be at least 1, got {prefetch_bytes}")
        self.function = function
        self.timeout = timeout
        self.stage = stage
        self.prefetch = prefetch or max(2 * workers, 1)
        self._idle: deque[_Worker] = deque()
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.blocks = BlockPool(prefetch_bytes, pin=stage is not None and stage.pin)
        self._numbers = itertools.count()
        # One thread a worker waits on its socket; the bytes arrive without the interpreter's lock.
        # Daemons: one that waits for room must not keep a script from ending.
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name="vcr1-worker", daemon=True)
            for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(
            self, _end_all, self._alive, self.blocks, self._tasks, workers
        )

    def map(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) for each item, in order. A result may be an exception, not raised:

        what the function raised, WorkerTimeout, or WorkerDied. Items are taken as they are needed.
        """
        if self._closed:
            raise ValueError("the worker pool is closed")
        if not self._threads:
            for item in items:
                yield item, self._staged(_call(self.function, item))
            return
        pending: deque[_Task] = deque()
        try:
            for item in items:
                task = _Task(next(self._numbers), item, self._run)
                pending.append(task)
                self._tasks.put(task)
                if len(pending) >= self.prefetch:
                    yield self._answer(pending.popleft())
            while pending:
                yield self._answer(pending.popleft())
        except KeyboardInterrupt:
            self.close()  # else leaving would wait for items in work
            raise
        finally:
            for task in pending:
                task.future.cancel()
                # Those in work end by themselves, and count until then.
                task.future.add_done_callback(partial(self._forget, task.number))

    def _forget(self, number: int, _: Future) -> None:
        self.blocks.settle(number)

    def _answer(self, task: "_Task") -> tuple[Any, Any]:
        try:
            with self.blocks.awaited(task.number):
                return task.item, task.future.result()
        finally:
            self.blocks.settle(task.number)

    def close(self) -> None:
        """Kill the workers and wait for their end. Safe to call again."""
        with self._lock:
            self._closed = True
            alive = set(self._alive)
        self.blocks.close()  # wakes threads that wait for room
        _kill_all(alive)
        with suppress(queue.Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task.future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._finalizer.detach()

    def _staged(self, answer: Any) -> Any:
        if self.stage is None or isinstance(answer, BaseException):
            return answer
        return _call(self.stage, answer)

    def _run(self, number: int, item: Any) -> Any:
        """The answer to an item. Exceptions are returned: the consumer decides what they mean.

        A worker may be ended from outside (out of memory) or start too slowly on a busy machine:
        neither is the item's fault, so the item is given to one more worker.
        """
        answer = self._try(number, item)
        if isinstance(answer, WorkerDied | StartTimeout) and not self._closed:
            answer = self._try(number, item)
        return self._staged(answer)

    def _try(self, number: int, item: Any) -> Any:
        def lend(shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
            more = self.stage.bytes(shape) if self.stage is not None else 0
            return self.blocks.lend(number, prod(shape), more)

        worker = None
        try:
            worker = self._take()
            answer = worker.ask(item, self.timeout, lend)
        except WorkerError as error:
            if worker is not None:
                self._drop(worker)
            return error
        except BaseException:
            if worker is not None:
                self._drop(worker)  # half an answer may be left on its socket
            raise
        self._idle.append(worker)
        return answer

    def _take(self) -> "_Worker":
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._lock:
            if self._closed:
                raise WorkerDied("the worker pool was closed")
            worker = _Worker()
            self._alive.add(worker)
        try:
            worker.start(self.function, self.timeout)
        except BaseException:
            self._drop(worker)
            raise
        return worker

    def _drop(self, worker: "_Worker") -> None:
        worker.kill()
        with self._lock:
            self._alive.discard(worker)


class _Worker:
    """One process and the socket to it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        code = "import sys; from vcr1_fast.data.workers import serve; serve(int(sys.argv[1]))"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints must not mix with the parent's output
                # Workers run side by side: one that uses all cores takes them from the others.
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's affair
            )

    def start(self, function: Callable[[Any], Any], timeout: float | None) -> None:
        try:
            answer = self.ask((function, timeout), START_TIMEOUT)
        except WorkerTimeout as error:
            raise StartTimeout(f"its worker did not start within {START_TIMEOUT:g} s") from error
        if isinstance(answer, BaseException):
            raise answer

    def ask(self, item: Any, timeout: float | None, lend: "Lend | None" = None) -> Any:
        """The answer to an item; `lend` gives the memory that the function asks for."""
        deadline = None if timeout is None else time.monotonic() + timeout
        blocks: list[np.ndarray] = []
        try:
            _send(self.socket, item, deadline)
            while True:
                answer = _receive(self.socket, deadline, blocks)
                if not isinstance(answer, _Wanted):
                    return answer.unpack() if isinstance(answer, _Raised) else answer
                assert lend is not None  # only for items
                began = time.monotonic()
                blocks.append(self._lend(lend, answer.shape))
                if deadline is not None:
                    # The consumer's slowness is not the item's fault.
                    deadline += time.monotonic() - began
        except TimeoutError:
            self.kill()
            raise WorkerTimeout(f"not done within {timeout:g} s, its worker was killed") from None
        except (EOFError, OSError):
            self.kill()
            raise WorkerDied(f"its worker died ({_end(self.process.returncode)})") from None
        except PoolClosed as error:
            self.kill()
            raise WorkerDied(str(error)) from None
        except BaseException:
            # Before `blocks` goes: another worker may write to that memory as soon as it does.
            self.kill()
            raise

    def _lend(self, lend: "Lend", shape: tuple[int, ...]) -> np.ndarray:
        try:
            file, memory = lend(shape)
        except OSError as error:  # or it would count as the worker's death
            raise MemoryError(f"no memory for frames of shape {shape}: {error}") from error
        socket.send_fds(self.socket, [b"b"], [file])
        return memory

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


def serve(descriptor: int) -> None:
    """The worker's life: receive (function, timeout), then answer items until the socket closes."""
    global _lender
    with socket.socket(fileno=descriptor) as channel:
        _lender = lender = _Lender(channel)
        try:
            first = _receive(channel, None)
            if isinstance(first, WorkerError):
                _send(channel, first, None)
                return
            function, timeout = first
            _send(channel, None, None)
            # Should the parent be killed while an item hangs, nobody else would end this process.
            # The default action of SIGALRM does, even inside a C library that holds the lock.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            limit = 0.0 if timeout is None else 2 * timeout + 5
            while True:
                item = _receive(channel, None)
                signal.setitimer(signal.ITIMER_REAL, limit)
                answer = item if isinstance(item, WorkerError) else _call(function, item)
                signal.setitimer(signal.ITIMER_REAL, 0)
                _send(channel, _portable(answer), None, lender.blocks)
                del item, answer
                lender.blocks.clear()
        except (EOFError, OSError):
            return


def result_array(shape: Sequence[int]) -> np.ndarray:
    """Uninitialised uint8 memory for a result.

    In a worker it is shared with the process that gets the answer, so that the bytes are not copied
    between them, and it may have to wait until the consumer has taken earlier answers; that time
    counts for no time-out.
    """
    if _lender is None or not prod(shape):
        return np.empty(shape, np.uint8)
    return _lender.array(tuple(int(n) for n in shape))


class _Lender:
    """The worker's side of shared memory: `blocks` lent for the item in work."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.blocks: list[np.ndarray] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # waiting is not working
        _send(self.channel, _Wanted(shape), None)
        _, files, _, _ = socket.recv_fds(self.channel, 1, 1)
        if not files:
            raise SystemExit  # the parent is gone: there is nobody to answer
        try:
            memory = mmap.mmap(files[0], prod(shape))
        finally:
            os.close(files[0])
        signal.setitimer(signal.ITIMER_REAL, left)
        self.blocks.append(np.frombuffer(memory, np.uint8))
        return self.blocks[-1].reshape(shape)


_lender: _Lender | None = None
Lend = Callable[[tuple[int, ...]], tuple[int, np.ndarray]]


@dataclass(frozen=True)
class _Wanted:
    """A worker's question for memory, in place of an answer."""

    shape: tuple[int, ...]


class _Task:
    """An item on its way to a thread."""

    def __init__(self, number: int, item: Any, run: Callable[[int, Any], Any]) -> None:
        self.number, self.item, self.run = number, item, run
        self.future: Future = Future()


def _work(tasks: "queue.SimpleQueue[_Task | None]") -> None:
    """A thread's life: tasks until None."""
    while (task := tasks.get()) is not None:
        if task.future.set_running_or_notify_cancel():
            try:
                task.future.set_result(task.run(task.number, task.item))
            except BaseException as error:
                task.future.set_exception(error)
        del task  # it holds the answer, and its pool


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error


def _portable(answer: Any) -> Any:
    """Exceptions as (exception, text of its traceback), since pickling loses the traceback."""
    if not isinstance(answer, Exception):
        return answer
    text = "".join(traceback.format_exception(answer))
    try:
        pickle.loads(pickle.dumps(answer))
    except Exception:  # whatever a foreign class does here, its text still arrives
        answer = WorkerError(text)
    return _Raised(answer, text)


@dataclass(frozen=True)
class _Raised:
    error: Exception
    text: str

    def unpack(self) -> Exception:
        self.error.__cause__ = WorkerError(self.text)
        return self.error


def _send(
    channel: socket.socket, value: Any, deadline: float | None, shared: Sequence[np.ndarray] = ()
) -> None:
    """Place and length of all parts, the pickle, then its array buffers, each as it lies in memory.

    Buffers inside one of the blocks `shared` are named by their place there, and not sent.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    places = [_place(part, shared) for part in parts]
    header = _COUNT.pack(len(parts)) + b"".join(
        _PART.pack(part.nbytes, *place) for part, place in zip(parts, places, strict=True)
    )
    inline = [part for part, (block, _) in zip(parts, places, strict=True) if not block]
    for part in (memoryview(header), *inline):
        _arm(channel, deadline)
        channel.sendall(part)


def _place(part: memoryview, shared: Sequence[np.ndarray]) -> tuple[int, int]:
    """(number from 1, offset) of the block that holds a buffer; (0, 0) where none does."""
    if part.nbytes and shared:
        address = _address(np.frombuffer(part, np.uint8))
        for number, block in enumerate(shared, start=1):
            offset = address - _address(block)
            if offset >= 0 and offset + part.nbytes <= block.nbytes:
                return number, offset
    return 0, 0


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _receive(
    channel: socket.socket, deadline: float | None, shared: Sequence[np.ndarray] = ()
) -> Any:
    (count,) = _COUNT.unpack(_read(channel, _COUNT.size, deadline))
    header = _read(channel, count * _PART.size, deadline)
    parts: list[Any] = [
        shared[block - 1][offset : offset + size] if block else _read(channel, size, deadline)
        for size, block, offset in _PART.iter_unpack(header)
    ]
    try:
        return pickle.loads(parts[0], buffers=parts[1:])
    except (ImportError, AttributeError) as error:
        return WorkerError(f"a process cannot import what another one sent: {error}")


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        _arm(channel, deadline)
        received = channel.recv_into(view[done:])
        if received == 0:
            raise EOFError
        done += received
    return data


def _arm(channel: socket.socket, deadline: float | None) -> None:
    # An expired deadline still takes what has already arrived: the consumer may have been slow.
    left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
    channel.settimeout(left)


def _kill_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()


def _end_all(
    workers: set[_Worker], blocks: BlockPool, tasks: "queue.SimpleQueue[_Task | None]", threads: int
) -> None:
    """What `close` does for a pool that was dropped, or not closed when the program ends."""
    blocks.close()
    _kill_all(workers)
    for _ in range(threads):
        tasks.put(None)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"
