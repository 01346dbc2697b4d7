"""The same verdicts from every place a trainer may call from: threads, executors, a running event loop, accelerate
ranks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.math_answer import accuracy_reward

ROOT = Path(__file__).parents[3]
ANSWERS = [
    "42",
    "41",
    "41 or 42",
    "10^{10^{10}}",
    "9**9**9",
    "\\int_0^{42} dx",
    "\\sqrt{1764}",
    "__import__('os')",
    "(10^9)!",
]
TEXTS = [f"<think>t</think><answer>{answer}</answer>" for answer in ANSWERS]
EXPECTED = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
# The last pair can only be settled by the symbolic verifier, so the pool is used as well.
ALL_TEXTS = [*TEXTS, "<think>t</think><answer>\\int_0^x t\\, dt</answer>"]
GOLDS = ["42"] * len(TEXTS) + ["x^3"]


def score() -> list[float | None]:
    return [one.value for one in accuracy_reward([], ALL_TEXTS, answer=GOLDS)]


WANTED = [*EXPECTED, 0.0]


def test_main_thread() -> None:
    assert score() == WANTED


def test_another_thread() -> None:
    found: list[list[float | None]] = []
    thread = threading.Thread(target=lambda: found.append(score()))
    thread.start()
    thread.join(30)
    assert found == [WANTED]


def test_executor() -> None:
    with ThreadPoolExecutor(4) as executor:
        assert [future.result(30) for future in [executor.submit(score) for _ in range(8)]] == [WANTED] * 8


def test_inside_a_running_event_loop() -> None:
    async def main() -> tuple[list[float | None], list[float | None]]:
        loop = asyncio.get_running_loop()
        return score(), await loop.run_in_executor(None, score)

    assert asyncio.run(main()) == (WANTED, WANTED)


SCRIPT = """
import sys
from pathlib import Path
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
sys.path[:0] = [{root!r}, {here!r}]
from test_math_answer_contexts import WANTED, score
assert score() == WANTED
accelerator.wait_for_everyone()
Path({folder!r}, f"rank {{accelerator.process_index}} of {{accelerator.num_processes}}").touch()
"""


@pytest.mark.timeout(180)
def test_accelerate_with_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "ranks.py"
    script.write_text(
        SCRIPT.format(root=str(ROOT), here=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8"
    )
    config = ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launcher, "--num_processes", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank 0 of 2").exists() and (tmp_path / "rank 1 of 2").exists()
