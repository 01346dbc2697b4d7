"""Two ranks on two GPUs over NCCL: collectives, memory and graphs of the second GPU, and the update against one plain
process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import ROOT, environment, launch
from tests.integration.test_update_invariance import FEW, SPLIT, WHOLE, Launch, largest_difference

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.xdist_group("two GPUs"),
    pytest.mark.timeout(600),
]
__all__ = ["launch"]  # the fixture


def test_collectives_memory_and_graphs() -> None:
    worker = Path(__file__).parent / "workers" / "two_gpus_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-6000:]
    assert all(f"rank {rank}: sound" in done.stdout for rank in (0, 1))


@pytest.fixture(scope="module")
def plain(launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Launch(losses=FEW, tokens=WHOLE).found(launch, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("config", ["ddp.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_the_update_equals_one_plain_process(
    config: str, plain: dict[str, Any], launch: Callable[..., str], tmp_path: Path
) -> None:
    """Whether a repeated step has the same bits is not asked: some of torch's kernels add in an order that differs from
    run to run."""
    pytest.importorskip("deepspeed")
    found = Launch(config, 2, losses=FEW, tokens=SPLIT).found(launch, tmp_path / "run")
    for step, (left, right) in enumerate(zip(found["metrics"], plain["metrics"], strict=True)):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3, abs=1e-4), FEW[step]
    difference = largest_difference(found["weights"], plain["weights"])
    print(f"{config}: weights differ by at most {difference:.1e}, repeated exactly: {found['resumed_exactly']}")
    assert difference < 1e-4
    assert found["tokens"] == plain["tokens"]
