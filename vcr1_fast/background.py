"""A daemon thread that runs tasks in order, for work that may never end."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any


class Worker:
    """Runs tasks one after the other in one thread, started at the first task.

    The thread is a daemon. A ThreadPoolExecutor's thread is joined at exit, so a task that hangs
    would keep the process after Ctrl-C.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._lock, self._is_started = Lock(), False

    def submit(self, task: Callable[[], Any]) -> "Future[Any]":
        """The future result of `task`. One cancelled before its turn does not run."""
        result: Future[Any] = Future()
        with self._lock:
            if not self._is_started:
                Thread(target=self._run, name=self.name, daemon=True).start()
                self._is_started = True
        self._tasks.put((task, result))
        return result

    def _run(self) -> None:
        while True:
            task, result = self._tasks.get()
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(task())
            except BaseException as error:  # SystemExit too: it is raised where the result is read
                result.set_exception(error)
            del task, result  # or the last task's tensors stay until the next one
