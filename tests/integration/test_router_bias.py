"""The selection biases of the experts follow their load in every kind of training, replayed routes or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).parent / "tiny.yaml"
COLD_START = (
    "--sft={data: {source: 'rl.data.chain_arithmetic:traces', params: {size: 40, operations: 3}}, steps: 3, "
    "max_length: 64, micro_batch_tokens: 256}"
)
pytestmark = [pytest.mark.xdist_group("one process"), pytest.mark.timeout(600)]


def biases(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "policy" / "model.safetensors")
    return torch.cat([tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")])


def test_biases_move_in_the_cold_start_and_without_replay(launch: Callable[..., str], tmp_path: Path) -> None:
    words = ["--config", str(RECIPE), "--output_dir", str(tmp_path), COLD_START, "--grpo.steps=3"]
    words += ["--model.router_bias_update_rate=0.25", "--grpo.routing_replay=false", "--eval.num_samples=0"]
    launch("scripts/sft.py", words)
    started = biases(tmp_path / "cold_start")
    assert float(started.abs().max()) in (0.25, 0.5, 0.75)  # 3 optimizer steps, a quarter up or down in each
    launch("scripts/grpo.py", words)
    assert not torch.equal(biases(tmp_path), started)  # an odd number of steps of equal size cannot cancel
