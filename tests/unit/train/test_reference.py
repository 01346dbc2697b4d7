"""The reference of the KL term stays what it was, its routing included, whatever becomes of the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.config import OptimizerSection
from rl.policy.hf import init_any
from rl.policy.moe import Router
from rl.train.batching import MicroBatch, pack_rows
from rl.train.learner import Learner, make_accelerator
from tests.integration.test_update_invariance import DEEPSEEK
from tests.integration.workers.update_worker import make_experience


def make_learner(*, seed: int) -> Learner:
    section = OptimizerSection(learning_rate=1e-3)
    accelerator = make_accelerator(torch.float32)
    return Learner(init_any(DEEPSEEK, seed=seed), section, accelerator=accelerator, total_steps=1, with_reference=True)


@pytest.fixture
def batches() -> list[MicroBatch]:
    return pack_rows(make_experience(0).rows(mask_truncated=False), max_tokens=60)


def own_logprobs(learner: Learner, batches: list[MicroBatch]) -> torch.Tensor:
    free = [replace(batch, routes=None) for batch in batches]
    return torch.cat([scored.logprobs.flatten() for scored in learner.score(free, temperature=0.8)])


def reference_logprobs(learner: Learner, batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([logprobs.flatten() for logprobs in learner.reference_logprobs(batches, temperature=0.8)])


def test_neither_weights_nor_biases_nor_replayed_routes_of_the_policy_move_it(batches: list[MicroBatch]) -> None:
    learner = make_learner(seed=0)
    at_first = own_logprobs(learner, batches)
    with torch.no_grad():
        for router in (module for module in learner.policy.modules() if isinstance(module, Router)):
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.copy_(torch.linspace(-1, 1, router.num_experts))
        for parameter in learner.policy.parameters():
            parameter.mul_(1.1)
    moved = own_logprobs(learner, batches)
    assert torch.equal(reference_logprobs(learner, batches), at_first)
    assert torch.equal(own_logprobs(learner, batches), moved) and not torch.equal(moved, at_first)
    assert learner.reference is not None
    places = [copy.data_ptr() for copy in learner.reference.copies.values()]
    learner.reference.refresh()
    assert torch.equal(reference_logprobs(learner, batches), moved)
    assert [copy.data_ptr() for copy in learner.reference.copies.values()] == places  # never two copies at once


def test_it_comes_back_from_a_checkpoint(batches: list[MicroBatch], tmp_path: Path) -> None:
    learner, other = make_learner(seed=0), make_learner(seed=1)
    learner.save_state(str(tmp_path))
    other.load_state(str(tmp_path))
    assert torch.equal(reference_logprobs(other, batches), reference_logprobs(learner, batches))
