"""A small pool of worker processes that can be killed: for work that may hang inside a C library.

Each worker is a fresh interpreter that imports one function and answers one item at a time over a
socket. Unlike the standard pools this needs no `if __name__ == "__main__"` in the caller's script,
forks nothing (decoders do not survive that), times each item, and receives arrays straight into
their final memory.
"""

import os
import pickle
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

START_TIMEOUT = 120.0  # seconds for a new interpreter to import the function
_COUNT = struct.Struct("<Q")


class WorkerError(RuntimeError):
    """The function, or its import, failed in the worker in a way that is no answer to an item."""


class WorkerTimeout(WorkerError):
    """An item took longer than the time-out; its worker was killed."""


class StartTimeout(WorkerTimeout):
    """A worker did not import its function within START_TIMEOUT."""


class WorkerDied(WorkerError):
    """A worker ended while it worked on an item, by a crash or from outside."""


class WorkerPool:
    """`workers` processes that apply `function`, importable by name, to items.

    `timeout` in seconds an item, None for no limit. `workers=0` calls the function in this process,
    without a time-out. At most `prefetch` items are held ahead of the consumer.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        workers: int,
        timeout: float | None = None,
        prefetch: int | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout}")
        if prefetch is not None and prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        self.function = function
        self.timeout = timeout
        self.prefetch = prefetch or max(2 * workers, 1)
        self._idle: deque[_Worker] = deque()
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        # One thread a worker waits on its socket; the bytes arrive without the interpreter's lock.
        self._threads = ThreadPoolExecutor(workers, "vcr1-worker") if workers else None
        self._finalizer = weakref.finalize(self, _kill_all, self._alive)

    def map(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) for each item, in order. A result may be an exception, not raised:

        what the function raised, WorkerTimeout, or WorkerDied. Items are taken as they are needed.
        """
        if self._closed:
            raise ValueError("the worker pool is closed")
        if self._threads is None:
            for item in items:
                yield item, _call(self.function, item)
            return
        pending: deque[tuple[Any, Future]] = deque()
        try:
            for item in items:
                pending.append((item, self._threads.submit(self._run, item)))
                if len(pending) >= self.prefetch:
                    item, future = pending.popleft()
                    yield item, future.result()
            while pending:
                item, future = pending.popleft()
                yield item, future.result()
        except KeyboardInterrupt:
            self.close()  # else leaving would wait for items in work
            raise
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """Kill the workers and wait for their end. Safe to call again."""
        with self._lock:
            self._closed = True
            alive = set(self._alive)
        _kill_all(alive)
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def _run(self, item: Any) -> Any:
        """The answer to an item. Exceptions are returned: the consumer decides what they mean.

        A worker may be ended from outside (out of memory) or start too slowly on a busy machine:
        neither is the item's fault, so the item is given to one more worker.
        """
        answer = self._try(item)
        retry = isinstance(answer, WorkerDied | StartTimeout) and not self._closed
        return self._try(item) if retry else answer

    def _try(self, item: Any) -> Any:
        worker = None
        try:
            worker = self._take()
            answer = worker.ask(item, self.timeout)
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

    def ask(self, item: Any, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            _send(self.socket, item, deadline)
            answer = _receive(self.socket, deadline)
            return answer.unpack() if isinstance(answer, _Raised) else answer
        except TimeoutError:
            raise WorkerTimeout(f"not done within {timeout:g} s, its worker was killed") from None
        except (EOFError, OSError):
            self.kill()
            raise WorkerDied(f"its worker died ({_end(self.process.returncode)})") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


def serve(descriptor: int) -> None:
    """The worker's life: receive (function, timeout), then answer items until the socket closes."""
    with socket.socket(fileno=descriptor) as channel:
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
                _send(channel, _portable(answer), None)
                del item, answer
        except (EOFError, OSError):
            return


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


def _send(channel: socket.socket, value: Any, deadline: float | None) -> None:
    """Lengths of all parts, the pickle, then its array buffers, each as it lies in memory."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    header = struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts))
    for part in (memoryview(header), *parts):
        _arm(channel, deadline)
        channel.sendall(part)


def _receive(channel: socket.socket, deadline: float | None) -> Any:
    (count,) = _COUNT.unpack(_read(channel, _COUNT.size, deadline))
    sizes = struct.unpack(f"<{count}Q", _read(channel, count * _COUNT.size, deadline))
    body, *buffers = [_read(channel, size, deadline) for size in sizes]
    try:
        return pickle.loads(body, buffers=buffers)
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


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"
