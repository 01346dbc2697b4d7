"""scripts/quickstart.sh, what it launches: in a copy of the project whose set-up and launcher do nothing but report.
And scripts/setup.sh, with an interpreter that installs nothing."""

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
    folder = project / "runs" / "my run-seed0"
    folder.mkdir(parents=True)
    last = {"eval/accuracy": 0.953, "eval/greedy_mean_length": 50.0}
    summary = {"name": "quickstart", **summarize_run([], seed=0, first=None, last=last, grpo_seconds=120.0)}
    (folder / "summary.json").write_text(json.dumps(summary))
    launched, printed = quickstart(project, "--name", "my run")
    assert launched == [] and "95.3%" in printed and "rm -r runs/my\\ run-seed0" in printed
    assert len(quickstart(project, "--name", "my run", "--seed=1")[0]) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--seed", "1", "-h"]])
def test_help_explains_and_starts_nothing(project: Path, arguments: list[str]) -> None:
    (project / "scripts" / "setup.sh").write_text("exit 9\n")
    launched, printed = quickstart(project, *arguments)
    assert launched == [] and printed.startswith("The whole R1 pipeline") and "--seed 1 --grpo.steps 40" in printed


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """scripts/setup.sh in a copy of the project, with an interpreter whose environments only say what they are asked.
    Making one fails half-way, as Debian's without python3-venv, until the file `whole` exists."""
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("scripts/setup.sh", "scripts/constraints.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    python = folder / "python"
    python.write_text(
        f"""#!/bin/sh
        if [ "$2" != venv ]; then exec {sys.executable} "$@"; fi
        mkdir -p .venv/bin
        if [ -e whole ]; then said='echo "asked $*"'; else said="exit 1"; fi
        printf '#!/bin/sh\n%s\n' "$said" > .venv/bin/python
        chmod +x .venv/bin/python
        [ -e whole ]
        """
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", "scripts/setup.sh", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_environment_without_pip_is_made_again(tmp_path: Path) -> None:
    assert setup(tmp_path).returncode == 1 and (tmp_path / ".venv" / "bin" / "python").exists()
    (tmp_path / "whole").touch()
    done = setup(tmp_path)
    assert done.returncode == 0 and "creating .venv" in done.stdout and "asked -m pip" in done.stdout
    assert "up to date" in setup(tmp_path).stdout


def test_setup_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = setup(tmp_path, "--help")
    assert done.returncode == 2 and "'--help' is not allowed; --dev, or nothing" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_mistake_in_the_arguments_is_told_once(project: Path) -> None:
    launched, printed = quickstart(project, "--grpo.stepps", "3", code=2)
    assert launched == [] and printed.count("did you mean grpo.steps?") == 1
