"""The far side of `rewards.pool`: a clean, single-threaded template process and the workers it forks.

In: `python -m rewards.worker FD`, where FD is one end of a Unix socket pair to the process that owns the pool.
Out: nothing but messages on its sockets.

    owner --control--> template --fork--> worker <--data--> owner

The owner may hold CUDA, threads, gloo sockets or a running event loop, all of which a fork would break, so it never
forks: it starts this module as a new interpreter. The template imports what verifiers need once, has no threads, and
forks one worker for each socket that it is sent; a killed worker is thus replaced in milliseconds instead of the
seconds that importing sympy takes. The template is the parent of the workers, so it can kill and reap them without
racing for reused process ids, and PR_SET_PDEATHSIG (which follows the parent *thread*) is reliable here. When the owner
ends, the template reads end-of-file and takes the workers with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.registry import load_function
from rewards.shown import shown_error

_PR_SET_PDEATHSIG = 1
_OWNER_POLL_S = 1.0
_LARGEST_FRAME = 1 << 29
_CPU_GRACE_S = 2
_EXIT_POLLS = 50


def send_frame(sock: socket.socket, payload: bytes) -> None:
    """Send one message: four bytes of length (little-endian), then the payload."""
    sock.sendall(struct.pack("<I", len(payload)) + payload)


def receive_frame(sock: socket.socket) -> bytes:
    """The next message sent with `send_frame`. EOFError when the other side has gone, OSError for an absurd length."""
    (length,) = struct.unpack("<I", _receive_exactly(sock, 4))
    if length > _LARGEST_FRAME:
        raise OSError(f"a message of {length} bytes; at most {_LARGEST_FRAME} are allowed")
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < count:
        piece = sock.recv(min(count - len(pieces), 1 << 20))
        if not piece:
            raise EOFError("the other side closed the socket")
        pieces += piece
    return bytes(pieces)


def send_message(sock: socket.socket, message: dict[str, Any], *fds: int) -> None:
    """Send one JSON object as a line, with open files."""
    socket.send_fds(sock, [json.dumps(message).encode() + b"\n"], fds)


def receive_message(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next object sent with `send_message`, and its files. EOFError when the other side has gone."""
    line, fds = b"", []
    while not line.endswith(b"\n"):  # one request is under way at a time, so nothing stands behind its line
        piece, more, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        if not piece:
            raise EOFError("the other side closed the socket")
        line += piece
        fds += more
    return json.loads(line), fds


class Template:
    """Answers the owner's requests, one at a time, until the owner closes its end or dies."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._owner = os.getppid()
        self._children: set[int] = set()

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self._control], [], [], _OWNER_POLL_S)
            # A process that the owner forked may hold a copy of its socket, so end-of-file alone could come too late.
            if os.getppid() != self._owner:
                break
            if not ready:
                continue
            try:
                request, fds = receive_message(self._control)
                send_message(self._control, getattr(self, "_" + request.pop("op"))(fds=fds, **request))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                break
        for pid in tuple(self._children):
            self._kill(pid=pid, died=False, fds=[])

    def _preload(self, *, module: str, fds: list[int]) -> dict[str, Any]:
        """Import `module` here, so that every worker forked from now on has it."""
        try:
            importlib.import_module(module)
        except Exception as error:  # a worker that needs the module meets the same, and says so
            return {"error": shown_error(error)}
        return {}

    def _spawn(self, *, memory_bytes: int, fds: list[int]) -> dict[str, Any]:
        gc.collect()
        gc.freeze()  # keeps the children's collector off the shared pages
        pid = os.fork()
        if pid == 0:
            self._control.close()
            _work(socket.socket(fileno=fds[0]), memory_bytes)
        os.close(fds[0])
        self._children.add(pid)
        return {"pid": pid}

    def _kill(self, *, pid: int, died: bool, fds: list[int]) -> dict[str, Any]:
        """Kill a worker with all that it started; the reply holds the signal that had ended it before, or None. That of
        a template before this one died with it."""
        if pid not in self._children:
            return {"signal": None}
        ended, status = os.waitpid(pid, os.WNOHANG)
        for _ in range(_EXIT_POLLS if died else 0):  # its sockets close a moment before it can be waited for
            if ended:
                break
            time.sleep(0.002)
            ended, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # a child that outlived the worker is still in its group
        if not ended:
            os.waitpid(pid, 0)
        self._children.discard(pid)
        return {"signal": os.WTERMSIG(status) if ended and os.WIFSIGNALED(status) else None}


def _work(data: socket.socket, memory_bytes: int) -> None:
    """The life of a forked worker: set limits, then call functions until the owner closes the socket."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS has neither: there, end-of-file ends a worker, and only its time is limited
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # some sandboxes of containers have no such file
            Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, we go first, not the trainer
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    functions: dict[str, Callable[..., Any]] = {}
    try:
        while True:
            name, limit_s, arguments = pickle.loads(receive_frame(data))
            if name not in functions:
                send_frame(data, _attempt(_load_into, functions, name))
                if name not in functions:
                    continue
            _limit_cpu(limit_s)
            send_frame(data, _attempt(_call, functions[name], arguments))
    except (EOFError, ConnectionError):
        os._exit(0)


def _load_into(functions: dict[str, Callable[..., Any]], name: str) -> None:
    functions[name] = load_function(name)


def _call(function: Callable[..., Any], pickled_arguments: bytes) -> Any:
    return function(*pickle.loads(pickled_arguments))


def _attempt(call: Callable[..., Any], *arguments: Any) -> bytes:
    """What the call gave, as a pickled (status, value, error)."""
    try:
        return pickle.dumps(("ok", call(*arguments), ""))
    except MemoryError:
        return pickle.dumps(("memory", None, "MemoryError: the job needed more memory than its limit"))
    except (Exception, SystemExit) as error:
        # The border between a verifier and the run: whatever it raises is carried back by name, nothing is swallowed.
        return pickle.dumps(("error", None, shown_error(error)[:2000]))


def _limit_cpu(limit_s: float) -> None:
    """The owner enforces the limit by the clock; this second lock holds when the owner itself is stopped or swapped
    out. A job with threads may use all processors for that time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit_s * (os.cpu_count() or 1)) + _CPU_GRACE_S, hard))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Template(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
