"""`InProcess`: calls a reward function in this process, for at most its time limit.

In: an entry without `isolate`, and the keyword arguments of a call. Out: one `Verdict` per row, always: a call that
does not return in time gives "timeout" for each of its rows, which the scorer reports by name.

An async function gets an event loop in a thread of its own, where it is cancelled at its limit, so one that blocks its
loop holds up no other. A synchronous function with a limit runs in a thread of its own, which nothing can end: it goes
on in the background, and until it has returned the function is not called again (its rows time out at once), so that a
run left on `mask` does not gather hanging threads. One that never lets go of the interpreter's lock (`9**9**9`) stops
even the clock that is read here; only `isolate: true` ends such a call.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

from rewards.base import Score
from rewards.daemon_threads import DaemonThreads, settle, start_daemon
from rewards.reward_call import Verdict, failed, read_verdicts
from rewards.reward_entry import RewardEntry
from rewards.shown import shown_error

_CANCEL_GRACE_S = 5.0  # for what an async function does on its way out
# The border to a user's function: what it raises is carried on by name to the scorer, which stops or masks. Nobody but
# the function itself cancels it without its limit having passed.
_ITS_OWN_FAULTS = (Exception, SystemExit, asyncio.CancelledError)


class InProcess:
    """The calls of one function. Thread-safe.

    start() begins a call (an async function then waits for others while we do something else), verdicts() waits for it.
    A synchronous function without a limit, which is what the built-in ones are, runs inside start().
    """

    def __init__(self, entry: RewardEntry) -> None:
        self.entry = entry
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hanging: list[Future[list[Verdict]]] = []

    def start(self, arguments: dict[str, Any], count: int) -> Future[list[Verdict]]:
        """Begin a call for `count` rows."""
        with self._lock:
            self._hanging = [call for call in self._hanging if not call.done()]
            hanging = len(self._hanging)
        if hanging:
            return _settled([self._late("was not called: an earlier call has not returned yet", 0.0)] * count)
        if self.entry.is_async:
            return asyncio.run_coroutine_threadsafe(self._await(arguments, count), self._running_loop())
        future: Future[list[Verdict]] = Future()
        call = functools.partial(settle, future, functools.partial(self._call, arguments, count))
        if self.entry.time_limit_s is None:
            call()
        else:
            start_daemon(call, f"reward {self.entry.name}")
        return future

    def verdicts(self, call: Future[list[Verdict]], count: int) -> list[Verdict]:
        """Wait for a call that `start` began."""
        limit = self.entry.time_limit_s
        grace = _CANCEL_GRACE_S if self.entry.is_async else 0.0
        try:
            return call.result(None if limit is None else limit + grace)
        except TimeoutError:
            with self._lock:
                self._hanging.append(call)
            why = (
                "it blocks its loop or ignores its cancellation" if self.entry.is_async else "only `isolate` can end it"
            )
            return [self._late(f"did not return within {limit:g} s; {why}", limit or 0.0)] * count

    def close(self) -> None:
        """Let the loop's thread end."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    def _call(self, arguments: dict[str, Any], count: int) -> list[Verdict]:
        started = time.monotonic()
        try:
            returned = self.entry.function(**arguments)
        except _ITS_OWN_FAULTS as error:
            return [failed(shown_error(error), time.monotonic() - started)] * count
        return read_verdicts(returned, count, time.monotonic() - started)

    async def _await(self, arguments: dict[str, Any], count: int) -> list[Verdict]:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.entry.time_limit_s) as limit:
                returned = await self.entry.function(**arguments)
        except _ITS_OWN_FAULTS as error:
            seconds = time.monotonic() - started
            if isinstance(error, TimeoutError) and limit.expired():
                return [self._late(f"was cancelled after {self.entry.time_limit_s:g} s", seconds)] * count
            return [failed(shown_error(error), seconds)] * count
        return read_verdicts(returned, count, time.monotonic() - started)

    def _late(self, how: str, seconds: float) -> Verdict:
        return Verdict(Score(None, f"{how} (time_limit_s)", rule="timeout"), "timeout", seconds)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # asyncio.to_thread would use threads that Python joins at exit
                self._loop.set_default_executor(DaemonThreads(min(32, (os.cpu_count() or 1) + 4), "reward-async"))
                start_daemon(functools.partial(_run, self._loop), f"reward-loop {self.entry.name}")
            return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _settled(verdicts: list[Verdict]) -> Future[list[Verdict]]:
    future: Future[list[Verdict]] = Future()
    future.set_result(verdicts)
    return future
