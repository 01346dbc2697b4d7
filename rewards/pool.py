"""Calls verifiers in worker processes with hard limits of time and memory.

In: the name of a function (`package.module:name` or `path/to/file.py:name`) and jobs (tuples of arguments, picklable).
Out: one `Outcome` per job. A job that exceeds its limit is killed with its process; only that job and its slot pay.

Nothing here uses signals, fork or the caller's event loop, so it works from any thread, inside a running asyncio loop,
in an accelerate rank, and with CUDA or gloo initialised: see `rewards.worker` for how the processes are made.

    pool = VerifierPool(workers=2, time_limit_s=2.0)
    pool.map("operator:add", [(1, 2), (3, 4)])      # [Outcome(value=3, status="ok", ...), Outcome(value=7, ...)]
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rewards.worker import receive_frame, receive_message, send_frame, send_message

Status = Literal["ok", "timeout", "memory", "error", "broken"]

MEMORY_LIMIT_MB = 4096  # address space, of which a program reserves more than it uses
_LOAD_LIMIT_S = 120.0
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# What damaged or forged pickles raise, by the documentation of the module and by trying.
_UNREADABLE = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, TypeError,
    ValueError,
)  # fmt: skip
_PLAIN_CLASSES = {("rewards.base", "Score")}


@dataclass(frozen=True, slots=True)
class Outcome:
    """value: what the function returned (None unless ok). seconds: wall time of the call. error: what went wrong.

    status: timeout and memory are the limits of the job; error: the function raised or returned what no reply may hold;
    broken: it was not called or did not come to its end, since it could not be loaded, or its worker died or could not
    be started.
    """

    value: Any
    status: Status
    seconds: float
    error: str = ""


def default_workers() -> int:
    """The cores that this process may use, by its affinity and by the quota of its container, shared among the ranks of
    this host (LOCAL_WORLD_SIZE), at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, int(min(cores, _quota_cores())) // max(1, ranks))


def _quota_cores() -> float:
    """What control groups (version 2, then 1) leave to this container; infinity without a quota. More workers than that
    would take each other's time, and their jobs run into limits that they would meet."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            quota, period = (float(text) for name in names for text in (_CONTROL_GROUP / name).read_text().split())
            return math.ceil(quota / period) if quota > 0 else math.inf
    return math.inf


class VerifierPool:
    """A fixed number of slots, each a thread here and a worker process there, both started with the first job.

    workers: slots (default: `default_workers()`). time_limit_s: seconds of wall time one job may take, unless the call
    says otherwise; importing the function's module does not count, but may take 120 s at most. memory_limit_mb: address
    space of a worker.
    Safe to share between threads. A pool does not survive a fork of its owner: use `shared_pool()` there.
    """

    def __init__(
        self, workers: int | None = None, *, time_limit_s: float = 5.0, memory_limit_mb: float = MEMORY_LIMIT_MB
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers: {workers} is not allowed; at least 1")
        self.workers = workers or default_workers()
        self.time_limit_s = _checked_limit(time_limit_s)
        self._template = _TemplateHandle(int(memory_limit_mb * 2**20))
        self._unloadable: dict[str, str] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False

    def submit(
        self, function: str, arguments: tuple[Any, ...], *, time_limit_s: float | None = None
    ) -> Future[Outcome]:
        """Queue one call; the outcome tells what goes wrong with it. Waiting in the queue does not count as time."""
        limit = self.time_limit_s if time_limit_s is None else _checked_limit(time_limit_s)
        if os.getpid() != self._owner:
            raise RuntimeError(
                "this VerifierPool belongs to another process; after a fork, use rewards.pool.shared_pool()"
            )
        job = _Job(function, pickle.dumps((function, limit, pickle.dumps(arguments))), limit, Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("this VerifierPool has been closed")
            self._template.want(function)
            self._jobs.put(job)
            if len(self._threads) < self.workers:
                thread = threading.Thread(target=self._serve, name="verifier-slot", daemon=True)
                self._threads.append(thread)
                thread.start()
        return job.future

    def map(
        self, function: str, jobs: Sequence[tuple[Any, ...]], time_limit_s: float | None = None, *, tries: int = 1
    ) -> list[Outcome]:
        """Call `function` with every job; the outcomes are in the order of the jobs. tries: how often a job that comes
        back broken is run at most, for workers that the machine kills (out of memory)."""
        futures = [self.submit(function, job, time_limit_s=time_limit_s) for job in jobs]
        outcomes = [future.result() for future in futures]
        broken = [index for index, outcome in enumerate(outcomes) if outcome.status == "broken"]
        if broken and tries > 1:
            again = self.map(function, [jobs[index] for index in broken], time_limit_s, tries=tries - 1)
            for index, outcome in zip(broken, again, strict=True):
                outcomes[index] = outcome
        return outcomes

    def close(self) -> None:
        """End the workers. Jobs still queued give an error outcome; calling this twice is harmless."""
        with self._lock:
            if self._closed or os.getpid() != self._owner:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        self._template.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """The loop of a slot's thread: one job at a time, on a worker that is replaced after it had to be killed."""
        slot = _Slot(self._template, self._unloadable)
        while (job := self._jobs.get()) is not None:
            if self._closed:
                job.future.set_result(Outcome(None, "broken", 0.0, "the pool was closed before this job ran"))
            elif job.future.set_running_or_notify_cancel():
                try:
                    outcome = slot.run(job)
                except BaseException as bug:  # ours; without this the caller, or the next one, would wait for ever
                    job.future.set_exception(bug)
                    slot = _Slot(self._template, self._unloadable)
                else:
                    job.future.set_result(outcome)


@dataclass(slots=True)
class _Job:
    function: str
    message: bytes
    limit_s: float
    future: Future[Outcome]


class _Slot:
    """One worker process as its thread sees it. unloadable: the functions of the pool whose module took too long to
    import, and why they are not tried again."""

    def __init__(self, template: _TemplateHandle, unloadable: dict[str, str]) -> None:
        self._template = template
        self._unloadable = unloadable
        self._sock: socket.socket | None = None
        self._pid = 0
        self._served = 0  # jobs of this worker
        self._loaded: set[str] = set()

    def run(self, job: _Job) -> Outcome:
        started = time.monotonic()
        if job.function in self._unloadable:
            return Outcome(None, "broken", 0.0, self._unloadable[job.function])
        if self._sock is not None and _readable(self._sock):  # an idle worker has nothing to say, so it has ended
            self._replace(died=True)
        try:
            if self._sock is None:
                self._sock, self._pid = self._template.spawn()
                self._loaded, self._served = set(), 0
            problem = self._begin(self._sock, job)
            if problem:
                return Outcome(None, "broken", time.monotonic() - started, problem)
            started = time.monotonic()
            status, value, error = _read_reply(self._sock)
        except TimeoutError:
            self._replace()
            return Outcome(None, "timeout", time.monotonic() - started, f"killed after {job.limit_s:g} s")
        except (EOFError, OSError) as gone:
            return self._died(gone, time.monotonic() - started)
        seconds = time.monotonic() - started
        self._served += 1
        if status == "memory":  # what the failed job left allocated would starve the next one
            self._replace()
            if self._served > 1:  # and earlier ones may have starved this one
                return self.run(replace(job, limit_s=max(job.limit_s - seconds, 0.01)))
        return Outcome(value, status, seconds, error)

    def _begin(self, sock: socket.socket, job: _Job) -> str:
        """Hand the job over, its clock starting; why it was not begun, if its function could not be loaded."""
        if job.function not in self._loaded:
            sock.settimeout(_LOAD_LIMIT_S)
            send_frame(sock, job.message)
            try:
                status, _, error = _read_reply(sock)
            except TimeoutError:
                self._replace()
                problem = f"cannot load {job.function}: importing its module took more than {_LOAD_LIMIT_S:g} s"
                self._unloadable[job.function] = problem
                return problem
            if status != "ok":
                return f"cannot load {job.function} in {self._template.memory_bytes >> 20} MiB of memory: {error}"
            self._loaded.add(job.function)
            sock.settimeout(job.limit_s)
        else:
            sock.settimeout(job.limit_s)
            send_frame(sock, job.message)
        return ""

    def _died(self, error: Exception, seconds: float) -> Outcome:
        """The worker ended by itself, or could not be started."""
        number = self._replace(died=True)
        if number == signal.SIGXCPU:
            return Outcome(None, "timeout", seconds, "used up its processor time")
        how = f"the worker died of {signal.Signals(number).name}" if number else f"the worker died: {error}"
        return Outcome(None, "broken", seconds, how)

    def _replace(self, *, died: bool = False) -> int | None:
        """Kill the worker; the next job gets a fresh one. Returns the signal that had ended it before, if one had."""
        if self._sock is None:
            return None
        self._sock.close()
        self._sock = None
        return self._template.kill(self._pid, died=died)


def _readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


class _TemplateHandle:
    """Starts the template process when it is first needed, and again should it die; one request at a time."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._wanted: set[str] = set()
        self._preloaded: set[str] = set()
        self._closed = False

    def want(self, function: str) -> None:
        """Import the module of a built-in verifier in the template, so that workers are born with it. A user's module
        is imported in the workers only: it may start threads, and a process with threads must not be forked."""
        module = function.partition(":")[0]
        if module.startswith("rewards."):
            self._wanted.add(module)

    def spawn(self) -> tuple[socket.socket, int]:
        """A fresh worker: the socket to talk to it, and its process id. OSError when it cannot be made."""
        with self._lock:
            control = self._started()
            for module in sorted(self._wanted - self._preloaded):
                self._request(control, {"op": "preload", "module": module})
                self._preloaded.add(module)  # if that failed, the worker's own import will say why
            ours, theirs = socket.socketpair()
            with theirs:
                order = {"op": "spawn", "memory_bytes": self.memory_bytes}
                pid = self._request(control, order, theirs.fileno())["pid"]
        return ours, pid

    def kill(self, pid: int, *, died: bool) -> int | None:
        """Make sure that a worker has ended; `died`: it seems to have done so already, and the signal is returned."""
        with self._lock:
            if self._control is None or self._process is None or self._process.poll() is not None:
                return None
            try:
                return self._request(self._control, {"op": "kill", "pid": pid, "died": died})["signal"]
            except OSError:  # the template has gone and took its workers with it
                return None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _started(self) -> socket.socket:
        if self._closed:
            raise OSError("the pool has been closed")
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self._stop()
        ours, theirs = socket.socketpair()
        ours.settimeout(_LOAD_LIMIT_S)
        package_root = str(Path(__file__).resolve().parent.parent)
        # The worker sees the modules that we see; "" (a console's working directory) does not travel by itself.
        paths = dict.fromkeys([package_root, *(os.path.abspath(entry) for entry in sys.path)])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,  # Ctrl-C at the terminal reaches the owner, which then ends its workers
            )
        self._control = ours
        self._preloaded = set()
        return ours

    def _request(self, control: socket.socket, message: dict[str, Any], *fds: int) -> dict[str, Any]:
        try:
            send_message(control, message, *fds)
            return receive_message(control)[0]
        except EOFError as error:
            self._stop()
            raise OSError("the verifiers' template process has died") from error
        except TimeoutError as error:  # no job's own
            self._stop()
            raise OSError(f"the verifiers' template process was silent for {_LOAD_LIMIT_S:g} s") from error
        except OSError:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class _PlainUnpickler(pickle.Unpickler):
    """Reads replies. A worker handles text that tries to break it, so a reply may hold plain data and `Score` only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a pool function must return plain data or Score, not {module}.{name}")


def _read_reply(sock: socket.socket) -> tuple[Status, Any, str]:
    frame = receive_frame(sock)
    try:
        status, value, error = _PlainUnpickler(io.BytesIO(frame)).load()
    except _UNREADABLE as refused:
        return "error", None, f"the reply could not be read: {refused}"
    return status, value, error


def _checked_limit(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"time_limit_s: {seconds} is not allowed; a positive number of seconds")
    return float(seconds)


_shared: dict[tuple[int, float], VerifierPool] = {}
_shared_lock = threading.Lock()


def shared_pool(memory_limit_mb: float = MEMORY_LIMIT_MB) -> VerifierPool:
    """The pool of this process for this limit of memory, made at the first call and closed at exit. A forked child gets
    its own."""
    key = (os.getpid(), memory_limit_mb)
    with _shared_lock:
        if key not in _shared:
            for other in [other for other in _shared if other[0] != os.getpid()]:
                del _shared[other]  # a pool copied by fork is the parent's to close
            _shared[key] = VerifierPool(memory_limit_mb=memory_limit_mb)
            atexit.register(_shared[key].close)
        return _shared[key]
