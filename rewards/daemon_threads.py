"""`DaemonThreads`: an executor whose threads do not keep the interpreter from exiting.

In: calls, as `concurrent.futures.ThreadPoolExecutor` takes them. Out: their futures. Departure: Python joins a
ThreadPoolExecutor's threads at exit, so one reward function that hangs would keep a rank alive that has already failed,
and with it all other ranks. These are daemons: what they still do when the process ends is abandoned.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(ThreadPoolExecutor):
    """Up to `max_workers` daemon threads, started when they are needed. A ThreadPoolExecutor for asyncio's sake, which
    takes nothing else as the default executor of a loop; its own threads are never started."""

    def __init__(self, max_workers: int, name: str) -> None:
        super().__init__(max_workers, name)
        self._most, self._name = max_workers, name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._daemons: list[threading.Thread] = []
        self._guard = threading.Lock()
        self._over = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        with self._guard:
            if self._over:
                raise RuntimeError(f"the threads {self._name!r} have been shut down")
            self._calls.put((future, functools.partial(fn, *args, **kwargs)))
            if len(self._daemons) < self._most:
                self._daemons.append(start_daemon(self._serve, self._name))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As ThreadPoolExecutor's; with wait=False, calls that are running are left to themselves."""
        with self._guard:
            self._over = True
        while cancel_futures and not self._calls.empty():
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._daemons:
            self._calls.put(None)
        for thread in self._daemons if wait else ():
            thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            settle(*call)


def start_daemon(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Call, and give what comes of it to the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # carried to whoever waits for the future
        future.set_exception(error)
    else:
        future.set_result(result)
