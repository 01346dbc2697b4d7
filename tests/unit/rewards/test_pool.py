"""The pool of killable workers: limits hold, only the guilty job pays, and it works from wherever it is called."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.pool import VerifierPool, _read_reply, default_workers, shared_pool
from rewards.worker import send_frame

REPOSITORY = Path(__file__).parents[3]
POWER_TOWER = (9, 9**9)  # pow holds the interpreter's lock for hours; no signal handler would ever run


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(workers=2, time_limit_s=1.0, memory_limit_mb=1024) as pool:
        yield pool


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "functions.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "class Odd: pass\n"
        "def odd(): return Odd()\n"
        "def fail(text): raise KeyError(text)\n"
        "def leave(code): sys.exit(code)\n"
        "def child_that_stays():\n"
        "    pid = os.fork()\n"
        "    if pid == 0: time.sleep(60)\n"
        "    time.sleep(60)\n"
        "def echo(value): return value\n"
        "def noisy(): print('x' * 100000); sys.stdin.read(); return 1\n"
        "def recurse(n=0): return recurse(n + 1)\n"
        "def pid(): return os.getpid()\n"
        "hoard = []\n"
        "def leak(number): hoard.append(bytearray(100 << 20)); return number\n"
        "def deaf():\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    while True: pass\n"
    )
    return str(path)


def test_map_keeps_the_order(pool: VerifierPool) -> None:
    outcomes = pool.map("operator:add", [(i, i) for i in range(50)])
    assert [outcome.value for outcome in outcomes] == [2 * i for i in range(50)]
    assert {outcome.status for outcome in outcomes} == {"ok"}


def test_a_pathological_job_costs_its_limit_and_its_slot_only(pool: VerifierPool) -> None:
    pool.map("operator:pow", [(2, 3)] * 4)
    started = time.monotonic()
    outcomes = pool.map("operator:pow", [POWER_TOWER, *[(2, 3)] * 20], time_limit_s=0.5)
    assert time.monotonic() - started < 8  # 21 limits are 10 s
    assert outcomes[0].status == "timeout" and 0.45 < outcomes[0].seconds < 5.0
    assert [outcome.value for outcome in outcomes[1:]] == [8] * 20
    assert pool.map("operator:pow", [(2, 3)] * 4)[3].value == 8  # the replaced worker works


def test_memory_errors_and_deaths_are_told_apart(pool: VerifierPool, functions: str) -> None:
    assert pool.map("operator:mul", [(b"x", 1 << 32)])[0].status == "memory"
    (failed,) = pool.map(f"{functions}:fail", [("k",)])
    assert (failed.status, failed.error) == ("error", "KeyError: 'k'")
    assert pool.map(f"{functions}:leave", [(0,)])[0].error == "SystemExit: 0"
    assert pool.map(f"{functions}:recurse", [()])[0].error.startswith("RecursionError")
    assert "SIGABRT" in pool.map("os:abort", [()])[0].error
    assert pool.map("os:_exit", [(0,)])[0].status == pool.map("os:abort", [()])[0].status == "broken"
    assert pool.map(f"{functions}:deaf", [()], time_limit_s=0.3)[0].status == "timeout"


def test_workers_are_the_first_to_go_when_memory_runs_out(pool: VerifierPool) -> None:
    """And with them what they start; the trainer, the largest process, would be the kernel's own choice."""
    (outcome,) = pool.map("subprocess:getoutput", [("cat /proc/self/oom_score_adj",)])
    assert outcome.value == "1000" != Path("/proc/self/oom_score_adj").read_text().strip()


def test_the_processor_time_of_a_job_is_that_of_all_its_threads(pool: VerifierPool) -> None:
    (outcome,) = pool.map("resource:getrlimit", [(resource.RLIMIT_CPU,)], time_limit_s=50.0)
    assert 50 * (os.cpu_count() or 1) < outcome.value[0] < 50 * (os.cpu_count() or 1) + 20


def test_a_job_does_not_pay_for_the_memory_of_earlier_ones(functions: str) -> None:
    with VerifierPool(workers=1, memory_limit_mb=512) as fresh:
        outcomes = fresh.map(f"{functions}:leak", [(number,) for number in range(8)])
        assert [outcome.value for outcome in outcomes] == list(range(8)), outcomes
        assert fresh.map("operator:mul", [(b"x", 1 << 30)])[0].status == "memory"


def test_a_template_that_does_not_answer_is_no_timeout_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(workers=1) as fresh:
        with monkeypatch.context() as patch:
            patch.setattr("rewards.pool._LOAD_LIMIT_S", 0.001)
            (outcome,) = fresh.map("operator:add", [(1, 2)])
            assert outcome.status == "broken" and "silent for 0.001 s" in outcome.error, outcome
        assert fresh.map("operator:add", [(1, 2)])[0].value == 3


def test_a_template_that_is_killed_costs_the_jobs_that_ran_and_nothing_more() -> None:
    """As by a kernel that is out of memory. The slots go on, and ask no template for workers of the one before."""
    with VerifierPool(workers=4, time_limit_s=20.0) as fresh:
        fresh.map("operator:add", [(1, 2)] * 4)
        for _ in range(5):
            running = [fresh.submit("time:sleep", (10,)) for _ in range(4)]
            waiting = [fresh.submit("operator:add", (number, 1)) for number in range(8)]
            while not all(future.running() for future in running):
                time.sleep(0.01)
            time.sleep(0.05)
            template = fresh._template._process
            assert template is not None
            template.kill()
            assert [future.result(timeout=60).status for future in running] == ["broken"] * 4
            assert [future.result(timeout=60).value for future in waiting] == list(range(1, 9))


def test_an_idle_worker_that_is_killed_costs_nothing() -> None:
    with VerifierPool(workers=2) as fresh:
        workers = {outcome.value for outcome in fresh.map("os:getpid", [()] * 8)}
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        while any(map(_alive, workers)):
            time.sleep(0.01)
        outcomes = fresh.map("operator:add", [(number, 1) for number in range(8)])
        assert [outcome.value for outcome in outcomes] == list(range(1, 9)), outcomes


def test_replies_hold_plain_data_only(pool: VerifierPool, functions: str) -> None:
    (outcome,) = pool.map(f"{functions}:odd", [()])
    assert outcome.status == "error" and "Odd" in outcome.error
    nested = {"a": [1, 2.5, None, True, ("x", b"y")], "b": {1, 2}}
    assert pool.map(f"{functions}:echo", [(nested,)])[0].value == nested
    assert pool.map(f"{functions}:noisy", [()])[0].value == 1  # neither print nor stdin touch the channel


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"x",
        b"\x80\x04",
        b"cos\nsystem\n(S'true'\ntR.",
        b"]",
        b"I1\n.",
        b"\x80\x04N.",
        b"(lp0\n0.",
        b"\x94\x92\x86.",
    ],
)
def test_forged_replies_are_errors_of_the_job(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(theirs, frame)
        status, value, error = _read_reply(ours)
    assert (status, value) == ("error", None) and "could not be read" in error


def test_names_that_do_not_exist_are_errors_of_the_job(pool: VerifierPool) -> None:
    assert "did you mean 'add'" in pool.map("operator:addd", [(1, 2)])[0].error
    assert "no module 'no_such_module'" in pool.map("no_such_module:f", [()])[0].error


def test_a_module_that_hangs_while_it_is_imported_costs_its_limit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.pool._LOAD_LIMIT_S", 1.0)
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(60)\ndef f(): return 1\n")
    with VerifierPool(workers=1) as fresh:
        started = time.monotonic()
        outcomes = fresh.map(f"{path}:f", [()] * 20, time_limit_s=0.1)
        assert time.monotonic() - started < 15  # not 20
        assert {outcome.status for outcome in outcomes} == {"broken"}
        assert all("importing its module took more than 1 s" in outcome.error for outcome in outcomes)
        assert fresh.map("operator:add", [(1, 2)])[0].value == 3


def test_loading_has_the_memory_of_the_pool(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text("table = bytearray(600 << 20)\ndef size(): return len(table)\n")
    with VerifierPool(workers=1, memory_limit_mb=512) as small, VerifierPool(workers=1, memory_limit_mb=2048) as large:
        (outcome,) = small.map(f"{path}:size", [()])
        assert outcome.status == "broken" and "in 512 MiB of memory: MemoryError" in outcome.error
        assert large.map(f"{path}:size", [()])[0].value == 600 << 20


def test_children_of_a_killed_job_die_with_it(pool: VerifierPool, functions: str) -> None:
    assert pool.map(f"{functions}:child_that_stays", [()], time_limit_s=0.3)[0].status == "timeout"
    time.sleep(0.1)
    assert _workers_below(os.getpid()) <= 2


def test_many_threads_share_it(pool: VerifierPool) -> None:
    results: list[list[int]] = [[] for _ in range(4)]

    def work(slot: int) -> None:
        results[slot] = [outcome.value for outcome in pool.map("operator:mul", [(slot, i) for i in range(25)])]

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[slot * i for i in range(25)] for slot in range(4)]


def test_works_inside_a_running_loop_and_its_executor(pool: VerifierPool) -> None:
    async def both() -> tuple[str, str]:
        here = pool.map("operator:pow", [POWER_TOWER], 0.3)[0].status
        there = await asyncio.get_running_loop().run_in_executor(
            None, lambda: pool.map("operator:pow", [POWER_TOWER], 0.3)[0].status
        )
        return here, there

    assert asyncio.run(both()) == ("timeout", "timeout")


def test_wrong_settings_and_use_after_close() -> None:
    with pytest.raises(ValueError, match="workers: 0"):
        VerifierPool(workers=0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="time_limit_s"):
            VerifierPool(workers=1, time_limit_s=seconds)
    pool = VerifierPool(workers=1)
    pool.map("operator:add", [(1, 2)])
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.map("operator:add", [(1, 2)])


def test_close_ends_jobs_that_run_or_wait() -> None:
    pool = VerifierPool(workers=1, time_limit_s=30)
    futures = [pool.submit("time:sleep", (30,)) for _ in range(3)]
    time.sleep(0.3)
    started = time.monotonic()
    pool.close()
    assert [future.result(timeout=20).status for future in futures] == ["broken"] * 3
    assert time.monotonic() - started < 20  # not 30


def test_workers_are_shared_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr("rewards.pool._CONTROL_GROUP", Path("/nowhere"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == max(1, cores // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert default_workers() == 1

    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == 3


@pytest.mark.parametrize(
    ("files", "workers"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_workers_keep_to_the_quota_of_a_container(
    files: dict[str, str], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("rewards.pool._CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == workers


LACKS_WHAT_MACOS_LACKS = """
import ctypes, os, resource, socket, sys
del os.sched_getaffinity, socket.SOCK_SEQPACKET
sys.platform = "darwin"
def refuse(*arguments): raise ValueError("not on macOS")
ctypes.CDLL = refuse
limit = resource.setrlimit
resource.setrlimit = lambda kind, values: refuse() if kind == resource.RLIMIT_AS else limit(kind, values)
"""


def test_what_is_linux_only_is_not_needed(tmp_path: Path) -> None:
    """Scoring works, symbolic verifier and time limits included; programs are refused."""
    (tmp_path / "sitecustomize.py").write_text(LACKS_WHAT_MACOS_LACKS)
    script = (
        "import os, sys; assert sys.platform == 'darwin' and not hasattr(os, 'sched_getaffinity')\n"
        "from rewards.scorer import RewardError, RewardScorer\n"
        "from rewards.pool import shared_pool\n"
        "text = r'<think>t</think><answer>\\int_0^x t\\, dt</answer>'\n"
        "def score(name, **columns):\n"
        "    return RewardScorer([name]).score(['p'], [text], [[0]], columns, [0]).rewards\n"
        "print(score('format'), score('accuracy', answer=[r'\\frac{x^2}{2}']))\n"
        "print(shared_pool().map('time:sleep', [(9,), (0,)], 0.3)[0].status)\n"
        "try: score('code', tests=[[{'input': '', 'output': ''}]])\n"
        "except RewardError as error: print(str(error).splitlines()[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path
    )
    first, second, third = done.stdout.splitlines() or [done.stderr, "", ""]
    assert first == "[1.0] [1.0]" and second == "timeout", done.stderr
    assert "needs Linux; this is darwin" in third


def test_a_forked_child_gets_a_pool_of_its_own() -> None:
    pool = shared_pool()
    assert pool is shared_pool() is not shared_pool(8192) is shared_pool(8192)
    assert pool.map("operator:add", [(1, 1)])[0].value == 2
    script = (
        "import os, sys; from rewards.pool import shared_pool\n"
        "shared_pool().map('operator:add', [(1, 2)])\n"
        "old = shared_pool()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: old.map('operator:add', [(1, 2)])\n"
        "    except RuntimeError: os._exit(shared_pool().map('operator:add', [(1, 2)])[0].value)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == 3


@pytest.mark.parametrize("how", ["killed", "exits", "raises"])
def test_nothing_outlives_the_owner(how: str) -> None:
    ending = {"killed": "time.sleep(60)", "exits": "os._exit(0)", "raises": "raise SystemExit(1)"}[how]
    script = (
        "import os, time; from rewards.pool import VerifierPool\n"
        "pool = VerifierPool(workers=2, time_limit_s=50); pool.map('operator:add', [(1, 2)] * 4)\n"
        "pool.submit('time:sleep', (50,)); time.sleep(0.2)\n"
        f"print(pool._template._process.pid, flush=True); {ending}\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert owner.stdout is not None
    template = int(owner.stdout.readline())
    workers = _children(template)
    if how == "killed":
        owner.kill()
    owner.wait(timeout=60)
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(_alive, (template, *workers))):
        time.sleep(0.05)
    assert workers and not any(map(_alive, (template, *workers)))


def test_workers_import_no_torch_and_see_no_gpu(pool: VerifierPool, functions: str) -> None:
    Path(functions).write_text(
        "import os, sys\ndef state(): return 'torch' in sys.modules, os.environ['CUDA_VISIBLE_DEVICES']\n"
    )
    with VerifierPool(workers=1) as fresh:
        assert fresh.map(f"{functions}:state", [()])[0].value == (False, "")


def test_overhead_of_a_job_is_small(pool: VerifierPool) -> None:
    pool.map("operator:add", [(1, 2)] * 4)
    best = min(_seconds(lambda: pool.map("operator:add", [(1, 2)] * 500)) for _ in range(5)) / 500
    print(f"\n{best * 1e6:.0f} us per job")
    assert best < 0.002


def _seconds(call: object) -> float:
    assert callable(call)
    started = time.monotonic()
    call()
    return time.monotonic() - started


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _workers_below(pid: int) -> int:
    """How many processes the templates of this process have made."""
    return max((len(_children(child)) for child in _all_children(pid)), default=0)


def _all_children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
