"""The first process inside the sandbox: runs programs that nobody trusts and tells what they printed or returned.

In: JSON objects, one a line, on descriptor 0, from `rewards.sandbox`. Out: one JSON object a line on descriptor 1. Runs
as process 1 of its own process namespace under `python -I -S`, so it uses the standard library only.

It holds no secrets: expected answers never come in here, so a program that breaks out of its own process into this one
gains nothing but the right to misreport its own output. Still, against damage to the next program: processes cannot
signal process 1, ptrace is filtered and the memory is marked undumpable; every case runs in a forked child; after it,
all other processes of the namespace are killed.

    {"op": "load", "source": "print(input())"}  ->  {"status": "ok"}
    {"op": "run", "stdin": "hi", "limit_s": 2}  ->  {"status": "ok", "stdout": "hi\\n", ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

from rewards.sandbox_program import compile_source, run_and_leave, run_main, run_test, serve_calls
from rewards.sandbox_values import LineChannel

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
OWNER = 0  # the descriptor of its requests
POLL_MS = 50
STDERR_BYTES = 4096
MAX_TEMPORARY_FILES = 20_000  # an empty one takes a kilobyte of the kernel's memory, which no other limit counts
MAX_REMOVED_FILES = 2000
TEMPORARY_FOLDERS = ("/tmp", "/dev/shm")
CHUNK = 1 << 16

_LIBC = ctypes.CDLL(None, use_errno=True)


class Harness:
    """Answers requests until its input ends. One program at a time."""

    def __init__(self, channel: LineChannel, settings: dict[str, Any]) -> None:
        self._channel = channel
        self._settings = settings
        self._code = b""
        self._dialog: _Child | None = None

    def serve(self) -> None:
        while True:
            try:
                request = self._channel.receive()
            except EOFError:
                return
            handler = getattr(self, "_" + request.pop("op"))
            self._channel.send(handler(**request))

    def _load(self, *, source: str, limit_s: float) -> dict[str, Any]:
        """Compile in a child, as a hostile source can crash or stall the compiler; keep the code object's bytes."""
        child = _Child(lambda: compile_source(source), limit_s, self._settings, stdin=b"", output_bytes=64 << 20)
        result = child.finish()
        self._code = child.output if result["status"] == "ok" else b""
        return result

    def _run(self, *, stdin: str, limit_s: float) -> dict[str, Any]:
        """One case of a program that reads standard input and prints."""
        self._abandon_dialog()
        child = _Child(
            lambda: run_main(self._code), limit_s, self._settings,
            stdin=stdin.encode("utf-8", "surrogatepass"), output_bytes=self._settings["output_bytes"],
        )  # fmt: skip
        result = child.finish()
        result["stdout"] = child.output.decode("utf-8", "replace")
        return result

    def _open(self, *, limit_s: float, total_s: float, test: dict[str, Any] | None) -> dict[str, Any]:
        """Start a conversation: with the loaded program, whose functions are called, or with a test that calls them.
        The first answer must come within limit_s; total_s bounds its processor time."""
        self._abandon_dialog()
        body = (lambda: serve_calls(self._code)) if test is None else (lambda: run_test(**test))
        self._dialog = _Child(body, total_s, self._settings, stdin=None, output_bytes=self._settings["output_bytes"])
        self._dialog.restart_clock(limit_s)
        return self._answer(self._dialog)

    def _send(self, *, line: str, limit_s: float) -> dict[str, Any]:
        """Send a line to the other side of the conversation, which has this long to answer."""
        if self._dialog is None:
            return {"status": "error", "error": "no conversation is open"}
        self._dialog.restart_clock(limit_s)
        self._dialog.write(line.encode() + b"\n")
        return self._answer(self._dialog)

    def _answer(self, dialog: _Child) -> dict[str, Any]:
        """The next line of the other side, or how it ended."""
        line = dialog.read_line()
        if line is not None:
            return {"status": "ok", "line": line.decode("utf-8", "replace")}
        self._dialog = None
        result = dialog.finish()
        if result["status"] == "ok":
            result = {**result, "status": "error", "error": "the program ended before it answered"}
        return result

    def _abandon_dialog(self) -> None:
        if self._dialog is not None:
            self._dialog.abandon()
            self._dialog = None

    def _clean(self) -> dict[str, Any]:
        """Whether nothing of the program is left, so that the next one may use this sandbox."""
        self._abandon_dialog()
        self._code = b""
        return {"status": "ok", "clean": _kill_others() == 0 and all(map(_empty_folder, TEMPORARY_FOLDERS))}


class _Child:
    """A forked process that runs `body` with output and errors on pipes to us. stdin: all of its standard input, or
    None for one that is written to."""

    def __init__(
        self, body: Any, limit_s: float, settings: dict[str, Any], *, stdin: bytes | None, output_bytes: int
    ) -> None:
        self._deadline = time.monotonic() + limit_s
        self._started = time.monotonic()
        self._memory_bytes = settings["memory_bytes"]
        self._output_bytes = output_bytes
        self.output = b""
        self._status = ""
        self._memory_checked = self._started
        self.leftover = 0
        child_in, self._in = os.pipe() if stdin is None else (_file_of(stdin, settings["input_fd"]), -1)
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become_program(body, (child_in, child_out, child_err), limit_s, settings)
        for fd in (child_in, child_out, child_err):
            os.close(fd)
        for fd in (self._in, out, err):
            if fd >= 0:
                os.set_blocking(fd, False)
        self._exited = os.pidfd_open(self._pid)
        self._pending = memoryview(b"")
        self._collected = bytearray()
        self._errors = bytearray()
        self._readable = {out: self._collected, err: self._errors}

    def restart_clock(self, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s

    def write(self, data: bytes) -> None:
        self._pending = memoryview(bytes(self._pending) + data)

    def read_line(self) -> bytes | None:
        """The next line of its output; None when it ended, or was ended, before one came."""
        while (end := self._collected.find(b"\n")) < 0:
            if self._status:
                return None
            self._exchange()
        line = bytes(self._collected[:end])
        del self._collected[: end + 1]  # output_bytes bounds what was not read yet, not the whole conversation
        return line

    def abandon(self) -> None:
        """End it without waiting for its own end."""
        self._status = self._status or "abandoned"
        self.finish()

    def finish(self) -> dict[str, Any]:
        """Read until it ends or breaks a limit; then end whatever it started."""
        while not self._status:
            self._exchange()
        seconds = time.monotonic() - self._started
        code = None
        if self._status == "exited":
            _, status = os.waitpid(self._pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._status = "ok" if code == 0 else "error"
        self.leftover = _kill_others() - (code is None)
        for fd in (*self._readable, self._exited, self._in):
            if fd >= 0:
                os.close(fd)
        self.output = bytes(self._collected)
        error = bytes(self._errors).decode("utf-8", "replace").strip()
        if code is not None and code < 0:
            error = f"ended by {signal.Signals(-code).name} {error}".strip()
            if -code == signal.SIGXCPU:
                self._status = "timeout"
        return {"status": self._status, "error": error, "code": code, "seconds": seconds}

    def _exchange(self) -> None:
        """Wait a moment, move what can be moved, and set the status once it is decided."""
        poller = select.poll()
        poller.register(OWNER, 0)  # tells of nothing but its end
        for fd in (*self._readable, self._exited):
            poller.register(fd, select.POLLIN)
        if self._pending:
            poller.register(self._in, select.POLLOUT)
        left_ms = (self._deadline - time.monotonic()) * 1000
        if left_ms <= 0:
            self._status = "timeout"
            return
        ready = {fd for fd, _ in poller.poll(min(POLL_MS, math.ceil(left_ms)))}
        if OWNER in ready:
            os._exit(1)  # and with process 1, the kernel ends all others
        if self._in in ready:
            self._feed()
        self._drain()
        if len(self._collected) > self._output_bytes:
            self._status = "output"
        elif self._exited in ready:
            self._drain()
            self._status = "exited"
        elif time.monotonic() - self._memory_checked > POLL_MS / 1000:
            self._memory_checked = time.monotonic()
            if _resident_bytes() > 2 * self._memory_bytes or _temporary_files() > MAX_TEMPORARY_FILES:
                self._status = "memory"

    def _feed(self) -> None:
        try:
            self._pending = self._pending[os.write(self._in, self._pending[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it does not want to read any more
            self._pending = memoryview(b"")

    def _drain(self) -> None:
        for fd in tuple(self._readable):
            sink = self._readable[fd]
            try:
                while len(self._collected) <= self._output_bytes:
                    piece = os.read(fd, CHUNK)
                    if not piece:
                        os.close(fd)
                        del self._readable[fd]
                        break
                    sink += piece
                    if sink is self._errors:
                        del sink[:-STDERR_BYTES]
            except BlockingIOError:
                continue


def _file_of(content: bytes, fd: int) -> int:
    """Put it into the file of the descriptor, to be read from the start. Not a pipe: some programs read as much as the
    file's size says."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return os.dup(fd)


def _become_program(body: Any, fds: tuple[int, int, int], limit_s: float, settings: dict[str, Any]) -> NoReturn:
    """In the forked child: take the pipes as standard descriptors, set the limits, run, and never return."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.closerange(3, 256)
    os.chdir("/tmp")
    cpu = math.ceil(limit_s) + 1
    for kind, limit in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (limit, limit))
    _LIBC.prctl(PR_SET_DUMPABLE, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    run_and_leave(body)


def _kill_others() -> int:
    """End every other process in the namespace; how many there were. Being process 1, we inherit all of them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    count = 0
    while True:
        try:
            os.waitpid(-1, 0)
            count += 1
        except ChildProcessError:
            return count


def _resident_bytes() -> int:
    pages = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit() and entry != "1":
            try:
                with open(f"/proc/{entry}/statm", "rb") as file:
                    pages += int(file.read().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return pages * resource.getpagesize()


def _temporary_files() -> int:
    return sum(found.f_files - found.f_ffree for found in map(os.statvfs, TEMPORARY_FOLDERS))


def _empty_folder(folder: str) -> bool:
    """Remove everything in it; False when that is not possible or too much."""
    count = 0
    pending = [folder]
    folders: list[str] = []
    try:
        while pending:
            current = pending.pop()
            os.chmod(current, 0o700) if current != folder else None
            for entry in os.scandir(current):
                count += 1
                if count > MAX_REMOVED_FILES:
                    return False
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    folders.append(entry.path)
                else:
                    os.unlink(entry.path)
        for path in reversed(folders):
            os.rmdir(path)
    except OSError:
        return False
    return True


def _drop_rights(settings: dict[str, Any]) -> None:
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    # A change of user id resets it. Under root's bubblewrap it does not come: the parent has no right to signal another
    # user's process. So the end of the requests counts as well, also while a program runs.
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _LIBC.prctl(PR_SET_DUMPABLE, 0)
    unlimited = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (unlimited, unlimited))  # ours adds up over many programs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (settings["processes"], settings["processes"]))
    _install_filter(bytes.fromhex(settings["filter"]))


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install_filter(code: bytes) -> None:
    program = _FilterProgram(len(code) // 8, code)
    if _LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _LIBC.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the system call filter was not accepted")


def main() -> None:
    if os.getpid() != 1:
        sys.exit("this program kills all other processes it can reach: it must be process 1 of its own namespace")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that Python handles, and so lets through to process 1
    channel = LineChannel(OWNER, 1)
    settings = {**channel.receive(), "input_fd": os.memfd_create("input")}  # before the filter, which refuses that
    _drop_rights(settings)
    gc.disable()  # a collection in a forked child would copy every page that it marks
    gc.freeze()
    channel.send({"status": "ready"})
    Harness(channel, settings).serve()


if __name__ == "__main__":
    main()
