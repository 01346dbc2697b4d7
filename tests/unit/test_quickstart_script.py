"""scripts/quickstart.sh, what it launches: in a copy of the project whose set-up and launcher do nothing but report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl.train.report import summarize_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "quickstart.sh").write_text((ROOT / "scripts" / "quickstart.sh").read_text())
    (tmp_path / "scripts" / "setup.sh").write_text("exit 0\n")
    for part in ("rl", "rewards", "recipes"):
        (tmp_path / part).symlink_to(ROOT / part)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "accelerate").write_text('#!/bin/sh\necho "launched $*"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


def quickstart(project: Path, *arguments: str, code: int = 0) -> tuple[list[str], str]:
    """(what was launched: script and what follows the recipe; everything that was printed)"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    launched = [line for line in done.stdout.splitlines() if line.startswith("launched")]
    short = [line.split(" scripts/")[1].replace(" --config recipes/quickstart.yaml", "") for line in launched]
    return short, done.stdout + done.stderr


def test_a_fresh_run_does_both_stages(project: Path) -> None:
    launched, printed = quickstart(project, "--grpo.steps", "3")
    assert launched == ["sft.py --grpo.steps 3", "grpo.py --grpo.steps 3"] and "unfinished" not in printed


def test_an_interrupted_cold_start_goes_on(project: Path) -> None:
    (project / "runs" / "quickstart-seed1" / "cold_start" / "checkpoints").mkdir(parents=True)
    launched, printed = quickstart(project, "--seed", "1")
    assert launched == ["sft.py --seed 1 --resume", "grpo.py --seed 1"]
    assert "runs/quickstart-seed1 holds an unfinished run: going on with it" in printed


def test_interrupted_grpo_goes_on(project: Path) -> None:
    folder = project / "runs" / "quickstart-seed0"
    (folder / "cold_start" / "policy").mkdir(parents=True)
    (folder / "cold_start" / "checkpoints").mkdir()
    assert quickstart(project)[0] == ["grpo.py"]
    (folder / "checkpoints").mkdir()
    assert quickstart(project)[0] == ["grpo.py --resume"]


def test_a_finished_run_is_shown_and_another_folder_is_another_run(project: Path) -> None:
    folder = project / "runs" / "quickstart-seed0"
    folder.mkdir(parents=True)
    last = {"eval/accuracy": 0.953, "eval/greedy_mean_length": 50.0}
    summary = {"name": "quickstart", **summarize_run([], seed=0, first=None, last=last, grpo_seconds=120.0)}
    (folder / "summary.json").write_text(json.dumps(summary))
    launched, printed = quickstart(project)
    assert launched == [] and "95.3%" in printed and "rm -r runs/quickstart-seed0" in printed
    assert len(quickstart(project, "--seed=1")[0]) == 2


def test_a_mistake_in_the_arguments_is_told_once(project: Path) -> None:
    launched, printed = quickstart(project, "--grpo.stepps", "3", code=2)
    assert launched == [] and printed.count("did you mean grpo.steps?") == 1
