"""Runs programs that nobody trusts, isolated by bubblewrap or by namespaces of our own; refuses where neither works.

In: a program's source text, then standard inputs or function calls, each with a time limit. Out: `RunResult`. What a
program finds: a read-only system with Python's own library, a private /tmp, no network, no other processes, no
environment of the host, limits of memory, processes, file size and time. What must stay secret (expected outputs,
checkpoints) is never put in.

    with Sandbox() as sandbox:
        sandbox.load("print(int(input()) + 1)")
        sandbox.run("41").stdout       # "42\\n"

One sandbox stays warm for many programs, one after the other: `clean()` ends all that a program left behind, and
replaces the sandbox when that is not possible. Paper: none; the rules are those of bubblewrap(1), namespaces(7),
seccomp(2).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rewards.sandbox_filter import filter_program

Method = Literal["bubblewrap", "namespaces"]
RunStatus = Literal["ok", "error", "timeout", "output", "memory", "died"]

_HERE = Path(__file__).resolve().parent
# As a folder that Python can run; `rewards` inside is these two files only.
_HARNESS_FILES = (
    (str(_HERE / "sandbox_harness.py"), "/harness/__main__.py"),
    (str(_HERE / "sandbox_program.py"), "/harness/rewards/sandbox_program.py"),
    (str(_HERE / "sandbox_values.py"), "/harness/rewards/sandbox_values.py"),
)
_STATUSES: dict[str, RunStatus] = {
    "ok": "ok", "error": "error", "timeout": "timeout", "output": "output", "memory": "memory", "silent": "timeout",
}  # fmt: skip
_START_LIMIT_S = 20.0
_GRACE_S = 2.0
_CHUNK = 1 << 18
_FIRST_USER, _USERS = 20_000, 40_000


class SandboxUnavailable(RuntimeError):
    """This machine offers no isolation, so nothing is run."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """memory_bytes: address space of one process; all together may hold twice that. processes: with their threads, at
    one time. file_bytes: largest file. temporary_bytes: size of /tmp. output_bytes: printed by one case."""

    memory_bytes: int = 512 << 20
    processes: int = 48  # Python's own thread pools have up to 32 threads
    file_bytes: int = 16 << 20
    temporary_bytes: int = 32 << 20
    output_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class RunResult:
    """status: ok (ended with exit code 0), error (another code, a signal, an exception), timeout, output (printed more
    than allowed), memory, died (the sandbox itself ended). stdout: what it printed, or the line it answered. error:
    what it said."""

    status: RunStatus
    stdout: str = ""
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What is visible inside. binds: (source, target), read-only. links: (target, path)."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    temporary_bytes: int
    command: tuple[str, ...]
    environment: dict[str, str]


class Sandbox:
    """A process in isolation, started with the first request. Not for use by several threads at once.

    method: None picks what works here, bubblewrap first. Raises SandboxUnavailable when nothing does.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, method: Method | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self.method: Method = method or isolation_method()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._buffer = bytearray()

    @property
    def running(self) -> bool:
        """False before the first request, and after one that had to end the sandbox, and with it what was loaded."""
        return self._process is not None

    def load(self, source: str, *, limit_s: float = 5.0) -> RunResult:
        """Compile a program, to be run or called next. status error tells of a syntax error. A sandbox that was ended
        while it was idle (memory ran out) is started anew."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        return self._request({"op": "load", "source": source}, limit_s)

    def run(self, stdin: str, *, limit_s: float = 5.0) -> RunResult:
        """Run the loaded program from its start with this standard input."""
        return self._request({"op": "run", "stdin": stdin}, limit_s)

    def open_program(self, *, limit_s: float = 5.0, total_s: float = 10.0) -> RunResult:
        """Start the loaded program so that its functions can be called with `send`. It must be ready after limit_s, and
        may use total_s of processor time until the conversation ends, with the next `open_...`, `run`, `load` or
        `clean`."""
        return self._request({"op": "open", "test": None, "total_s": total_s}, limit_s)

    def open_test(self, code: str, names: list[str], *, limit_s: float = 5.0, total_s: float = 10.0) -> RunResult:
        """Start a test, in which `names` are stand-ins for the program's functions; stdout is its first message."""
        test = {"code": code, "names": names}
        return self._request({"op": "open", "test": test, "total_s": total_s}, limit_s)

    def send(self, line: str, *, limit_s: float = 5.0) -> RunResult:
        """Send a line to what `open_...` started; stdout is the line that it answers within the limit."""
        return self._request({"op": "send", "line": line}, limit_s)

    def clean(self) -> None:
        """End all that the program left; afterwards another one may be loaded."""
        if self._process is not None:
            reply = self._exchange({"op": "clean"}, 5.0)
            if not reply.get("clean"):
                self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()
            self._process = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: dict[str, Any], limit_s: float) -> RunResult:
        started = time.monotonic()
        if self._process is None:
            self._start()
        reply = self._exchange({**request, "limit_s": limit_s}, limit_s + _GRACE_S)
        said = str(reply.get("status"))
        status = _STATUSES.get(said, "died")
        if said not in _STATUSES or said == "silent":
            self.close()
        text = reply.get("stdout", reply.get("line", ""))
        return RunResult(
            status=status,
            stdout=text if isinstance(text, str) else "",
            error=str(reply.get("error", ""))[:2000],
            seconds=time.monotonic() - started,
        )

    def _start(self) -> None:
        self._buffer.clear()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the sandbox
        self._process = subprocess.Popen(
            _launch_command(self.method, _layout(self.limits.temporary_bytes)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={},
        )
        # Of its own, so that the limit of processes, which the kernel counts per user, is not shared with other
        # sandboxes: drawn, since those of other workers and of other containers on this host cannot be asked.
        settings = {
            **asdict(self.limits),
            "uid": _FIRST_USER + secrets.randbelow(_USERS) if os.geteuid() == 0 else None,
            "filter": filter_program(platform.machine()).hex(),
        }
        reply = self._exchange(settings, _START_LIMIT_S)
        if reply.get("status") != "ready":
            self._stderr.seek(0)
            said = self._stderr.read(2000).decode("utf-8", "replace").strip()
            self.close()
            raise SandboxUnavailable(f"the sandbox ({self.method}) did not start: {said or reply}")

    def _exchange(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """One request and its reply; {"status": "silent"} after the limit, {"status": "gone"} when the sandbox has
        ended."""
        assert self._process is not None and self._process.stdin is not None
        deadline = time.monotonic() + limit_s
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"status": "gone"}
        line = self._read_line(deadline)
        if line is None:
            return {"status": "silent" if time.monotonic() >= deadline else "gone"}
        try:
            reply = json.loads(line)
        except ValueError:
            return {"status": "gone"}
        return reply if isinstance(reply, dict) else {"status": "gone"}

    def _read_line(self, deadline: float) -> bytes | None:
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        largest = 6 * self.limits.output_bytes + (1 << 20)  # JSON writes one byte as up to six
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._buffer) > largest or not select.select([fd], [], [], left)[0]:
                return None
            piece = os.read(fd, _CHUNK)
            if not piece:
                return None
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def _layout(temporary_bytes: int) -> Layout:
    """The system's libraries, the Python that runs us, and the harness. No shell, no /etc, no home."""
    python = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    wanted = ["/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32"]
    wanted += [python] if prefix == "/usr" else [prefix, python]
    if os.path.exists("/etc/ld.so.cache"):
        wanted.append("/etc/ld.so.cache")
    links = tuple((os.readlink(path), path) for path in wanted if os.path.islink(path))
    paths = [path for path in dict.fromkeys(wanted) if os.path.exists(path) and not os.path.islink(path)]
    inner = [path for path in paths if not any(path != other and path.startswith(other + "/") for other in paths)]
    return Layout(
        binds=(*((path, path) for path in inner), *_HARNESS_FILES),
        links=links,
        temporary_bytes=temporary_bytes,
        command=(python, "-I", "-S", "-B", "-X", "utf8", "/harness"),
        # with an arena of the allocator for every thread, a dozen of them reserve all the address space that is allowed
        environment={"HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"},
    )


def _launch_command(method: Method, layout: Layout) -> list[str]:
    if method == "namespaces":
        script = _HERE / "sandbox_namespaces.py"
        return [os.path.realpath(sys.executable), "-I", "-S", str(script), json.dumps(asdict(layout))]
    command = [
        "bwrap",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
    ]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        # Root keeps its own user namespace: then Python may stand where only root can look (/root), and the harness,
        # not bubblewrap, changes to an ordinary user, whose processes the kernel counts (those of root it does not).
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for folder in sorted({str(parent) for _, target in layout.binds for parent in Path(target).parents}):
        if folder != "/":  # else bubblewrap makes it for root alone
            command += ["--perms", "755", "--dir", folder]
    for source, target in layout.binds:
        command += ["--ro-bind", source, target]
    for target, path in layout.links:
        command += ["--symlink", target, path]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for path in ("/tmp", "/dev/shm"):
        command += ["--size", str(layout.temporary_bytes), "--perms", "1777", "--tmpfs", path]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"]
    for name, value in layout.environment.items():
        command += ["--setenv", name, value]
    return [shutil.which("bwrap") or "bwrap", *command[1:], "--", *layout.command]


_PROBE = """
import os, socket, sys
def fails(call):
    try:
        call()
    except OSError:
        return True
    return False
def many_processes():
    for _ in range(200):
        if os.fork() == 0:
            import time
            time.sleep(5)
print(os.getpid() < 1000, not os.path.exists(sys.stdin.readline().strip()), not os.path.exists("/home"),
      fails(lambda: socket.socket()), fails(lambda: open("/harness/__main__.py", "a")), fails(lambda: open("/x", "w")),
      fails(lambda: os.kill(1, 9) or os.kill(1, 0) or open("/proc/1/environ")), fails(many_processes))
"""


@functools.cache
def isolation_method() -> Method:
    """What isolates on this machine, found by trying. SandboxUnavailable (a RuntimeError) says why nothing does."""
    if sys.platform != "linux":
        raise SandboxUnavailable(
            f"code from a model is only run in isolation, which needs Linux; this is {sys.platform}"
        )
    problems: list[str] = []
    for method in ("bubblewrap", "namespaces"):
        if method == "bubblewrap" and shutil.which("bwrap") is None:
            problems.append("bubblewrap: not installed (apt-get install bubblewrap)")
            continue
        problem = isolation_problem(method)
        if problem is None:
            return method
        problems.append(f"{method}: {problem}")
    raise SandboxUnavailable(
        "code from a model is only run in isolation, and none works on this machine. Install bubblewrap "
        "(apt-get install bubblewrap) and allow user namespaces. Tried: " + "; ".join(problems)
    )


def isolation_problem(method: Method) -> str | None:
    """Why this method does not isolate here; None when a program that tried could not get out."""
    try:
        with Sandbox(method=method) as sandbox:
            sandbox.load(_PROBE)
            result = sandbox.run(str(_HERE) + "\n")
    except (SandboxUnavailable, OSError) as error:
        return str(error)
    answers = result.stdout.split()
    if result.status != "ok" or answers != ["True"] * 8:
        return f"a probe could get out ({result.status} {' '.join(answers)} {result.error})"
    return None
