"""The cold start is one and the same on any number of processes, with any micro-batches, in one go or resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.train.record import read_rows

RECIPE = Path(__file__).parent / "tiny.yaml"
pytestmark = [pytest.mark.xdist_group("launch"), pytest.mark.timeout(600)]


def words(folder: Path, *, steps: int, micro_batch_tokens: int, resume: bool = False) -> list[str]:
    section = (
        # Adam with a usual epsilon would turn rounding errors of gradients near 0 into steps of full size
        "{data: {source: 'rl.data.chain_arithmetic:traces', params: {size: 40, operations: 3}}, batch_size: 8, "
        f"max_length: 64, learning_rate: 1.0e-2, adam_epsilon: 1.0e-3, logging_steps: 1, steps: {steps}, "
        f"micro_batch_tokens: {micro_batch_tokens}}}"
    )
    rate = "--model.router_bias_update_rate=0.01"
    return ["--config", str(RECIPE), "--output_dir", str(folder), f"--sft={section}", rate, *["--resume"] * resume]


def trained(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, weights)"""
    losses = [row["loss"] for row in read_rows(folder / "cold_start" / "metrics.jsonl")]
    return losses, load_file(folder / "cold_start" / "policy" / "model.safetensors")


def test_processes_micro_batches_and_interruption_change_nothing(launch: Callable[..., str], tmp_path: Path) -> None:
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    launch("scripts/sft.py", words(one, steps=4, micro_batch_tokens=10_000))
    how = {"config": "zero2.yaml", "processes": 2}
    launch("scripts/sft.py", words(two, steps=4, micro_batch_tokens=64), **how)
    launch("scripts/sft.py", words(resumed, steps=2, micro_batch_tokens=64), **how)
    launch("scripts/sft.py", words(resumed, steps=4, micro_batch_tokens=64, resume=True), **how)
    losses, weights = trained(one)
    others, divided = trained(two)
    assert len(losses) == 4 and losses[-1] < losses[0] and others == pytest.approx(losses, rel=1e-5)
    difference = max(float((weights[name] - divided[name]).abs().max()) for name in weights)
    print(f"weights differ by at most {difference:.1e} (allowed 2e-6)")
    assert difference < 2e-6
    again, continued = trained(resumed)
    assert again == others
    assert all(torch.equal(divided[name], continued[name]) for name in divided)
