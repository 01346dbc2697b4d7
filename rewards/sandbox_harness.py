"""The first process inside the sandbox: runs programs that nobody trusts and tells what they printed or returned.

In: JSON objects, one a line, on descriptor 0, from `rewards.sandbox`. Out: one JSON object a line on descriptor 1. Runs as process
1 of its own process namespace under `python -I -S`, so it uses the standard library only.

It holds no secrets: expected answers never come in here, so a program that breaks out of its own process into this one
gains nothing but the right to misreport its own output. Still, against damage to the next program: processes cannot signal
process 1, ptrace is filtered and the memory is marked undumpable; every case runs in a forked child; after it, all other processes
of the namespace are killed.

    {"op": "load", "source": "print(input())"}  ->  {"status": "ok"}
    {"op": "run", "stdin": "hi", "limit_s": 2}  ->  {"status": "ok", "stdout": "hi\\n", ...}
"""

from __future__ import annotations

import ctypes
import json
import marshal
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
POLL_MS = 50
STDERR_BYTES = 4096
MAX_TEMPORARY_FILES = 2000
CHUNK = 1 << 16
MAX_DEPTH, MAX_ITEMS = 100, 1_000_000

_LIBC = ctypes.CDLL(None, use_errno=True)


# Plain values as JSON. Used on both sides of the border; decoding makes nothing but plain data.


def encode(value: Any, depth: int = 0) -> Any:
    """`value` in terms of JSON, types kept. TypeError for what is not plain data, ValueError when nested too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if -(2**53) < value < 2**53 else {"int": format(value, "x")}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if hasattr(value, "__iter__"):  # deque, range, generators: what a test would look at is their items
        items = []
        for item in value:
            items.append(encode(item, depth + 1))
            if len(items) > MAX_ITEMS:
                raise ValueError(f"an iterator of more than {MAX_ITEMS} items")
        return {"iterator": items}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(coded: Any) -> Any:
    """The inverse of `encode`; an iterator comes back as a list iterator. ValueError for anything that `encode` does not make."""
    if coded is None or isinstance(coded, bool | str | int | float):
        return coded
    if not isinstance(coded, dict) or len(coded) != 1:
        raise ValueError("not an encoded value")
    ((kind, body),) = coded.items()
    if kind in _SEQUENCES and isinstance(body, list):
        try:
            return _SEQUENCES[kind](decode(item) for item in body)
        except TypeError as error:  # an unhashable member of a set
            raise ValueError(str(error)) from error
    if kind == "dict" and isinstance(body, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        try:
            return {decode(key): decode(item) for key, item in body}
        except TypeError as error:
            raise ValueError(str(error)) from error
    if kind == "int" and isinstance(body, str):
        return int(body, 16)
    if kind == "float" and isinstance(body, str):
        return float(body)
    if kind == "bytes" and isinstance(body, str):
        return bytes.fromhex(body)
    if kind == "complex" and isinstance(body, list) and len(body) == 2 and all(isinstance(part, str) for part in body):
        return complex(float(body[0]), float(body[1]))
    raise ValueError(f"not an encoded value: {kind!r}")


_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": lambda items: iter(list(items)),
}


class LineChannel:
    """JSON objects, one a line, over two descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        self.send_line(json.dumps(message).encode())

    def send_line(self, line: bytes) -> None:
        view = memoryview(line + b"\n")
        while view:
            view = view[os.write(self._write_fd, view) :]

    def receive(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            piece = os.read(self._read_fd, CHUNK)
            if not piece:
                raise EOFError
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)


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
        child = _Child(lambda: _compile(source), limit_s, self._settings, stdin=b"", output_bytes=64 << 20)
        result = child.finish()
        self._code = child.output if result["status"] == "ok" else b""
        return result

    def _run(self, *, stdin: str, limit_s: float) -> dict[str, Any]:
        """One case of a program that reads standard input and prints."""
        child = _Child(
            lambda: _run_main(self._code), limit_s, self._settings,
            stdin=stdin.encode("utf-8", "surrogatepass"), output_bytes=self._settings["output_bytes"],
        )  # fmt: skip
        result = child.finish()
        result["stdout"] = child.output.decode("utf-8", "replace")
        return result

    def _open(self, *, limit_s: float, test: dict[str, Any] | None) -> dict[str, Any]:
        """Start a conversation: with the loaded program, whose functions are called, or with a test that calls them."""
        body = (lambda: _serve_calls(self._code)) if test is None else (lambda: _run_test(**test))
        self._dialog = _Child(body, limit_s, self._settings, stdin=b"", output_bytes=self._settings["output_bytes"])
        return self._answer(self._dialog)

    def _send(self, *, line: str) -> dict[str, Any]:
        if self._dialog is None:
            return {"status": "error", "error": "no conversation is open"}
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

    def _clean(self) -> dict[str, Any]:
        """Whether nothing of the program is left, so that the next one may use this sandbox."""
        if self._dialog is not None:
            self._dialog.abandon()
            self._dialog = None
        self._code = b""
        return {"status": "ok", "clean": _kill_others() == 0 and _empty_folder("/tmp")}


class _Child:
    """A forked process that runs `body` with standard input, output and errors on pipes to us."""

    def __init__(
        self, body: Any, limit_s: float, settings: dict[str, Any], *, stdin: bytes, output_bytes: int
    ) -> None:
        self._deadline = time.monotonic() + limit_s
        self._started = time.monotonic()
        self._memory_bytes = settings["memory_bytes"]
        self._output_bytes = output_bytes
        self.output = b""
        self._lines_taken = 0
        self._status = ""
        self._memory_checked = self._started
        self.leftover = 0
        child_in, self._in = os.pipe()
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become_program(body, (child_in, child_out, child_err), limit_s, settings)
        for fd in (child_in, child_out, child_err):
            os.close(fd)
        for fd in (self._in, out, err):
            os.set_blocking(fd, False)
        self._exited = os.pidfd_open(self._pid)
        self._pending = memoryview(stdin)
        self._collected = bytearray()
        self._errors = bytearray()
        self._readable = {out: self._collected, err: self._errors}

    def write(self, data: bytes) -> None:
        self._pending = memoryview(bytes(self._pending) + data)

    def read_line(self) -> bytes | None:
        """The next line of its output; None when it ended, or was ended, before one came."""
        while (end := self._collected.find(b"\n", self._lines_taken)) < 0:
            if self._status:
                return None
            self._exchange(close_input=False)
        line = bytes(self._collected[self._lines_taken : end])
        self._lines_taken = end + 1
        return line

    def abandon(self) -> None:
        """End it without waiting for its own end."""
        self._status = self._status or "abandoned"
        self.finish()

    def finish(self) -> dict[str, Any]:
        """Feed and read until it ends or breaks a limit; then end whatever it started."""
        while not self._status:
            self._exchange(close_input=True)
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

    def _exchange(self, *, close_input: bool) -> None:
        """Wait a moment, move what can be moved, and set the status once it is decided."""
        poller = select.poll()
        for fd in (*self._readable, self._exited):
            poller.register(fd, select.POLLIN)
        if self._in >= 0 and self._pending:
            poller.register(self._in, select.POLLOUT)
        elif self._in >= 0 and close_input:
            os.close(self._in)
            self._in = -1
        left_ms = (self._deadline - time.monotonic()) * 1000
        if left_ms <= 0:
            self._status = "timeout"
            return
        ready = {fd for fd, _ in poller.poll(min(POLL_MS, math.ceil(left_ms)))}
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
            if _resident_bytes() > 2 * self._memory_bytes:
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
    code = 1
    try:
        body()
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException as error:  # the program's own failure, told in one line
        _say_error(error)
    try:
        _finish_like_an_interpreter()
    except BaseException as error:
        _say_error(error)
        code = 1
    os._exit(code)


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    return leaving.code & 255 if isinstance(leaving.code, int) else 1


def _say_error(error: BaseException) -> None:
    os.write(2, f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace"))


def _finish_like_an_interpreter() -> None:
    """Wait for threads, run exit handlers, flush: what leaving by os._exit would skip."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # type: ignore[attr-defined]
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    sys.stdout.flush()


# What a child does. Running text from a model is what this process is for; it is the one place that does so.


def _compile(source: str) -> None:
    payload = memoryview(marshal.dumps(compile(source, "program.py", "exec", dont_inherit=True)))
    while payload:
        payload = payload[os.write(1, payload) :]


def _namespace() -> dict[str, Any]:
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    return vars(main)


def _run_main(code: bytes) -> None:
    exec(marshal.loads(code), _namespace())


def _serve_calls(code: bytes) -> None:
    """Run the program with its prints discarded, then answer calls of its functions."""
    channel = _private_channel()
    namespace = _namespace()
    namespace["__name__"] = "program"  # an `if __name__ == "__main__"` part is for the other style
    exec(marshal.loads(code), namespace)
    channel.send({"loaded": True})
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(_answer_call(namespace, request))


def _answer_call(namespace: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    function = namespace.get(request["call"])
    if function is None and "Solution" in namespace:
        function = getattr(namespace["Solution"](), request["call"], None)
    if not callable(function):
        return {"raised": "NameError", "message": f"the program has no function {request['call']!r}"}
    arguments = [decode(item) for item in request["args"]]
    keywords = {key: decode(item) for key, item in request["kwargs"].items()}
    try:
        value = function(*arguments, **keywords)
        return {"value": encode(value), "args": [encode(item) for item in arguments]}
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)[:500]}


def _private_channel() -> LineChannel:
    """Move the pipes out of the way of print and input."""
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return LineChannel(read_fd, write_fd)


def _run_test(*, code: str, names: list[str]) -> None:
    """Run test code in which every function of the program is a stand-in that calls it in its own sandbox. Tells
    whether the test passed."""
    channel = _private_channel()
    namespace = _namespace()
    stand_ins = {name: _stand_in(name, channel) for name in names}
    try:
        namespace.update(stand_ins, candidate=stand_ins[names[0]])
        exec(compile(code, "test.py", "exec", dont_inherit=True), namespace)
        if callable(namespace.get("check")) and "check" not in names:
            namespace["check"](stand_ins[names[0]])
    except Exception as error:
        channel.send({"passed": False, "error": f"{type(error).__name__}: {error}"[:500]})
    else:
        channel.send({"passed": True, "error": ""})


def _stand_in(name: str, channel: LineChannel) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        coded = {key: encode(item) for key, item in kwargs.items()}
        channel.send({"call": name, "args": [encode(item) for item in args], "kwargs": coded})
        reply = channel.receive()
        if "raised" in reply:
            raise _builtin_exception(str(reply["raised"]))(str(reply.get("message", "")))
        for ours, theirs in zip(args, reply.get("args", ()), strict=True):
            _copy_changes(ours, decode(theirs))
        return decode(reply["value"])

    return call


def _builtin_exception(name: str) -> type[Exception]:
    found = vars(sys.modules["builtins"]).get(name)
    return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError


def _copy_changes(ours: Any, theirs: Any) -> None:
    """What the program did to a list, dict or set that it was given, done to the test's own."""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours[:] = theirs
    elif isinstance(ours, dict | set) and isinstance(theirs, type(ours)):
        ours.clear()
        ours.update(theirs)


# Keeping the house.


def _kill_others() -> int:
    """End every other process in the namespace; how many there were. Being process 1, we inherit all of them."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
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
                if count > MAX_TEMPORARY_FILES:
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
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user id resets it
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
    channel = LineChannel(0, 1)
    settings = channel.receive()
    _drop_rights(settings)
    channel.send({"status": "ready"})
    Harness(channel, settings).serve()


if __name__ == "__main__":
    main()
