"""How integration tests start training as a user does: in processes of its own, through the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
TIMEOUT_S = 420


def command(
    script: str | Path, arguments: Sequence[str], *, config: str | None = None, processes: int = 1
) -> list[str]:
    """The command line of `script`: plain Python without a launch config, else `accelerate launch` with it."""
    words = [str(script), *map(str, arguments)]
    if config is None:
        return [sys.executable, *words]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    return [*launcher, "--num_processes", str(processes), *words]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Run a script to its end and return what it printed; fails the test with the output if it fails."""

    def run(script: str | Path, arguments: Sequence[str], *, config: str | None = None, processes: int = 1) -> str:
        done = subprocess.run(
            command(script, arguments, config=config, processes=processes),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run
