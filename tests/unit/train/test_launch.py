"""The command line, and how mistakes in what it names are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl.train import launch
from rl.train.launch import run_command, user_mistakes

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "AHA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def test_recipe_and_resume_are_read() -> None:
    recipe, resume = run_command("", ["--config", str(RECIPE), "--resume", "--seed", "3", "--grpo.steps=7"])
    assert resume and recipe.seed == 3 and recipe.grpo.steps == 7


def test_a_mistake_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("", ["--config", str(RECIPE), "--grpo.stepps", "7"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "did you mean" in printed and "Traceback" not in printed and "AHA_TRACEBACK=1" in printed


def test_a_batch_that_cannot_be_divided_is_told_before_torch_is_loaded() -> None:
    code = "import sys, rl.train.launch as l\ntry: l.run_command('')\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(RECIPE)],
        env={**os.environ, "WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "False\n"
    assert "rollout.prompts_per_step = 16: must be a multiple of the 3 processes" in done.stderr


def test_an_error_inside_a_library_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_mistakes():
        json.loads("{")  # a ValueError, raised in the standard library
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "decoder.py" in printed and "cannot start: Expecting property name" in printed
    assert "AHA_TRACEBACK" not in printed


def test_aha_traceback_shows_every_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AHA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run_command("", ["--config", "nowhere.yaml"])
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "read_yaml" in printed and "cannot start: nowhere.yaml" in printed


@pytest.mark.parametrize(
    ("rank", "local_rank", "waits", "who"),
    [("0", "0", False, "cannot start: "), ("8", "0", False, "cannot start on rank 8: ")]
    + [(rank, "1", True, f"cannot start on rank {rank}: ") for rank in ("1", "9")],
)
def test_each_machine_tells_a_mistake(
    rank: str,
    local_rank: str,
    waits: bool,
    who: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first process of a machine at once, the others after the launcher had time to end them."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(SystemExit):
        run_command("", ["--config", "nowhere.yaml"])
    assert slept == ([launch.LAUNCHER_S] if waits else [])
    assert who in capsys.readouterr().err
