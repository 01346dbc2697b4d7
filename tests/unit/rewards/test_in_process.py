"""Time limits of functions in this process: they are reported by name, hold nobody else up, and do not keep a process
from exiting."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.daemon_threads import DaemonThreads
from rewards.reward_entry import CALL_LIMIT_S, ISOLATED_LIMIT_S, parse_entries
from rewards.scorer import RewardError, RewardScorer, ScoredBatch

REPOSITORY = Path(__file__).parents[3]
FUNCTIONS = """
import asyncio, sys, threading, time
go_on = threading.Event()
calls = []

def waits(completions):
    calls.append(completions)
    go_on.wait(30)
    return [1.0] * len(completions)
def fine(completions): return [1.0] * len(completions)
async def sleeps(completions):
    await asyncio.sleep(30)
    return [1.0] * len(completions)
async def blocks(completions):
    go_on.wait(30)
    return [1.0] * len(completions)
async def deaf(completions):
    while not go_on.is_set():
        try: await asyncio.sleep(0.05)
        except asyncio.CancelledError: pass
    return [1.0] * len(completions)
async def quick(completions): return [1.0] * len(completions)
async def times_out_by_itself(completions): raise TimeoutError("the server did not answer")
def leaves(completions): sys.exit(3)
async def leaves_late(completions): sys.exit(3)
def names_its_thread(completions): return [float(threading.current_thread().daemon)] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    yield str(path)
    for name, module in list(sys.modules.items()):
        if name.startswith("_reward_file_mine") and getattr(module, "__file__", "") == str(path):
            module.go_on.set()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.in_process._CANCEL_GRACE_S", 0.3)


def score(scorer: RewardScorer, texts: list[str]) -> ScoredBatch:
    return scorer.score(["p"] * len(texts), texts, [[0]] * len(texts), {}, [0] * len(texts))


def limited(file: str, name: str, seconds: float = 0.2) -> dict[str, Any]:
    return {"func": f"{file}:{name}", "time_limit_s": seconds}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("waits", "did not return within 0.2 s; only `isolate` can end it"),
        ("sleeps", "was cancelled after 0.2 s"),
        ("blocks", "did not return within 0.2 s; it blocks its loop"),
        ("deaf", "did not return within 0.2 s; it blocks its loop or ignores"),
    ],
)
def test_a_function_that_hangs_stops_or_is_masked_in_time(file: str, name: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        score(RewardScorer([f"{file}:fine", limited(file, name)]), ["a", "b"])
    assert caught.value.function == name and says in str(caught.value) and "time_limit_s" in str(caught.value)
    masked = score(RewardScorer([f"{file}:fine", f"{file}:quick", limited(file, name)], on_error="mask"), ["a", "b"])
    assert masked.rewards == [None, None]
    assert masked.by_function == {"fine": [1.0] * 2, "quick": [1.0] * 2, name: [None] * 2}
    assert masked.metrics[f"rewards/{name}/timeout_frac"] == 1.0
    assert time.monotonic() - started < 15


def test_a_function_that_still_hangs_is_not_called_again_until_it_returns(file: str) -> None:
    scorer = RewardScorer([limited(file, "waits")], on_error="mask")
    module = sys.modules[scorer.entries[0].function.__module__]
    assert score(scorer, ["first"]).rewards == [None]
    second = score(scorer, ["second"])
    assert second.rewards == [None] and "an earlier call has not returned" in second.scores["waits"][0].reason
    assert second.metrics["rewards/waits/timeout_frac"] == 1.0 and module.calls == [["first"]]
    module.go_on.set()
    deadline = time.monotonic() + 30
    while (rewards := score(scorer, ["third"]).rewards) == [None] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rewards == [1.0] and module.calls == [["first"], ["third"]]


def test_own_timeouts_and_exits_of_a_function_are_its_errors(file: str) -> None:
    for name, says in (
        ("times_out_by_itself", "TimeoutError: the server did not answer"),
        ("leaves", "SystemExit: 3"),
        ("leaves_late", "SystemExit: 3"),
    ):
        batch = score(RewardScorer([f"{file}:{name}"], on_error="mask"), ["a"])
        assert batch.scores[name][0].reason == says and batch.statuses[name] == ["error"]


def test_an_error_is_not_kept_waiting_by_an_async_function(file: str) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match="'leaves'"):
        score(RewardScorer([limited(file, "sleeps", 20.0), f"{file}:leaves"]), ["a"])
    assert time.monotonic() - started < 15


def test_default_limits(file: str) -> None:
    isolated = {"func": f"{file}:fine", "isolate": True}
    judge = {"func": "judge", "params": {"base_url": "http://x/v1", "model": "m"}}
    entries = parse_entries([f"{file}:fine", {**isolated, "name": "apart"}, judge, "format", f"{file}:quick"])
    assert [entry.time_limit_s for entry in entries] == [
        CALL_LIMIT_S, ISOLATED_LIMIT_S, CALL_LIMIT_S, None, CALL_LIMIT_S,
    ]  # fmt: skip
    assert score(RewardScorer([f"{file}:names_its_thread"]), ["a"]).rewards == [1.0]  # so it cannot hold up the exit


@pytest.mark.parametrize("function", ["sync", "asynchronous", "in_thread"])
def test_a_process_that_fails_can_exit_while_a_function_hangs(function: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio, time\n"
        "def sync(completions): time.sleep(300)\n"
        "async def asynchronous(completions): time.sleep(300)\n"
        "async def in_thread(completions): await asyncio.to_thread(time.sleep, 300)\n"
    )
    script = (
        "import time\n"
        "from rewards.scorer import RewardScorer\n"
        f"scorer = RewardScorer(['mine.py:{function}', 'accuracy'])\n"
        "for _ in range(6): scorer.submit(['p'], ['t'], [[0]], {'answer': ['1']}, [0])\n"
        "time.sleep(1)\n"
        "raise SystemExit(7)\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 7 and time.monotonic() - started < 30


def test_daemon_threads_are_an_executor() -> None:
    most, running, lock = 0, 0, threading.Lock()

    def work(number: int) -> int:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number * number

    with DaemonThreads(3, "t") as threads:
        assert list(threads.map(work, range(12))) == [number * number for number in range(12)]
        with pytest.raises(ZeroDivisionError):
            threads.submit(lambda: 1 / 0).result()
    assert 2 <= most <= 3
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(work, 1)
    busy = DaemonThreads(1, "t")
    go_on = threading.Event()
    running_call, queued = busy.submit(go_on.wait, 30), busy.submit(work, 1)
    while not running_call.running():
        time.sleep(0.001)
    busy.shutdown(wait=False, cancel_futures=True)
    assert queued.cancelled() and not running_call.done()
    go_on.set()
    assert running_call.result(timeout=30) is True
