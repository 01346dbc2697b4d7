"""Killed with SIGKILL at any moment and resumed, a run gives the numbers of the run that was never killed, bit for
bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.conftest import ROOT, command, environment

RECIPE = Path(__file__).parent / "tiny.yaml"
STEPS = 6
MODERATE = [pytest.mark.xdist_group("launch"), pytest.mark.timeout(900)]
pytestmark = MODERATE


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--config", str(RECIPE), "--output_dir", str(folder), *more]


def kill_when(reached: Callable[[], bool], words: list[str]) -> None:
    """Start a run and kill its whole process group as soon as `reached()`."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not reached():
        if process.poll() is not None:
            pytest.fail(f"the run ended before it could be killed: {process.communicate()[1][-3000:]}")
        assert time.monotonic() < deadline, "the run never got to the point where it was to be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all steps, without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and "per_s" not in k and "latency" not in k}
        for row in rows
    ]


def assert_same_run(left: Path, right: Path) -> None:
    assert recorded(left) == recorded(right)
    first, second = (load_file(folder / "policy" / "model.safetensors") for folder in (left, right))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), f"{name} differs after the resume"
    completions = [(folder / "completions.jsonl").read_text() for folder in (left, right)]
    assert completions[0] == completions[1]


def steps_recorded(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"reward"') if path.exists() else 0


@pytest.mark.parametrize(
    ("config", "processes"), [(None, 1), ("zero2.yaml", 2)], ids=["one process", "two processes, ZeRO-2"]
)
def test_killed_and_resumed(config: str | None, processes: int, launch: Callable[..., str], tmp_path: Path) -> None:
    how = {"config": config, "processes": processes}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch("scripts/grpo.py", arguments(whole), **how)
    # Between the save of step 2 and the record of step 4: in sampling, scoring or updating.
    kill_when(
        lambda: steps_recorded(killed) >= 3,
        command("scripts/grpo.py", arguments(killed), config=config, processes=processes),
    )
    # In the middle of writing a later checkpoint.
    kill_when(
        lambda: any(p.suffix == ".writing" and int(p.stem[5:]) > 4 for p in (killed / "checkpoints").iterdir()),
        command("scripts/grpo.py", arguments(killed, "--resume"), config=config, processes=processes),
    )
    printed = launch("scripts/grpo.py", arguments(killed, "--resume"), **how)
    assert "resumed from" in printed
    assert len([row for row in recorded(killed) if "reward" in row]) == STEPS
    assert len(list((killed / "checkpoints" / f"step-{STEPS:08d}").glob("reference.*"))) == 1, "all ranks hold the same"
    assert_same_run(whole, killed)


BROKEN_REWARD = '''
"""Raises in evaluations (groups of one) once the process has scored as many training groups as the file says."""
from pathlib import Path

groups = 0

def guard(prompts, completions, completion_ids, **columns):
    global groups
    broken = Path(__file__).with_name("broken")
    if len(completions) == 1 and broken.exists() and groups >= int(broken.read_text()):
        raise RuntimeError("this row has no answer")
    groups += len(completions) > 2
    return [0.0] * len(completions)
'''


def test_an_evaluation_that_fails_loses_nothing(launch: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BROKEN_REWARD)
    more = [f"--rewards.reward_funcs=[format, tag_count, accuracy, '{tmp_path}/own.py:guard']", "--eval.eval_steps=4"]
    more += ["--eval.eval_on_start=true"]
    whole, broken = tmp_path / "whole", tmp_path / "run"
    launch("scripts/grpo.py", arguments(whole, *more))

    def fails_after(groups: int, *words: str) -> list[str]:
        """Checkpoints left by a run whose evaluation fails after so many groups of training."""
        (tmp_path / "broken").write_text(str(groups))
        done = subprocess.run(
            command("scripts/grpo.py", arguments(broken, *more, *words)),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode != 0 and "this row has no answer" in done.stderr
        return sorted(path.name for path in (broken / "checkpoints").iterdir())

    assert fails_after(16)[-1] == "step-00000004"
    assert fails_after(8, "--resume")[-1] == "step-00000006"  # the evaluation after step 4 went well this time
    assert fails_after(0, "--resume")[-1] == "step-00000006" and (broken / "policy" / "config.json").exists()
    (tmp_path / "broken").unlink()
    for _ in range(2):  # and once more when all is done
        launch("scripts/grpo.py", arguments(broken, *more, "--resume"))
        assert_same_run(whole, broken)
        answers = [(folder / "evaluations.jsonl").read_text() for folder in (whole, broken)]
        assert answers[0] == answers[1]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
        for name in ("cold_start_accuracy", "final_accuracy", "final_mean_length"):
            assert summaries[0][name] == summaries[1][name] is not None


def test_damaged_checkpoint_is_skipped_and_a_finished_run_is_not_overwritten(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launch("scripts/grpo.py", arguments(folder, "--grpo.steps", "3", "--eval.num_samples", "0"))
    again = subprocess.run(
        command("scripts/grpo.py", arguments(folder, "--grpo.steps", "3", "--eval.num_samples", "0")),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode != 0 and "--resume" in again.stderr
    before = recorded(folder)
    newest = max((folder / "checkpoints").glob("step-*"))
    victim = newest / "learner.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    printed = launch("scripts/grpo.py", arguments(folder, "--grpo.steps", "3", "--eval.num_samples", "0", "--resume"))
    assert "step-00000002" in printed
    assert recorded(folder) == before
