"""Expert load as the policy used it, and the biases that follow it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rl.policy.config import PolicyConfig
from rl.policy.model import init_policy
from rl.train.balance import ExpertLoad, update_router_biases
from rl.train.batching import MicroBatch, Row, idle_micro_batch, make_micro_batch
from rl.train.learner import Scored
from tests.integration.test_update_invariance import DEEPSEEK

BATCH = make_micro_batch([Row(index=0, prompt_ids=[1, 2], completion_ids=[3, 4])])  # 3 places
NOTHING = torch.zeros(0)


def loss(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor(1.5), {"entropy_sum": torch.tensor(2.5)}


def test_load_is_what_the_forward_used_over_all_micro_batches_but_idle_ones() -> None:
    policy = SimpleNamespace(config=SimpleNamespace(n_routed_experts=4))
    load = ExpertLoad(policy)
    counted = load.counting(loss)
    # (3 places, 2 MoE layers, 2 experts a token)
    routes = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[0, 3], [2, 1]]])
    value, sums = counted(Scored(NOTHING, NOTHING, routes), BATCH)
    assert (float(value), float(sums["entropy_sum"])) == (1.5, 2.5)
    counted(Scored(NOTHING, NOTHING, routes[:1]), BATCH)
    counted(Scored(NOTHING, NOTHING, routes[:1]), idle_micro_batch(BATCH))
    found = load.over_ranks(torch.device("cpu"))
    assert found is not None and found.tolist() == [[4, 2, 1, 1], [0, 1, 4, 3]]


def test_a_rank_that_only_idles_knows_the_shape() -> None:
    """Its zeros take part in the sum over ranks."""
    load = ExpertLoad(SimpleNamespace(config=SimpleNamespace(n_routed_experts=4)))
    load.counting(loss)(Scored(NOTHING, NOTHING, torch.zeros(1, 2, 2, dtype=torch.int64)), idle_micro_batch(BATCH))
    found = load.over_ranks(torch.device("cpu"))
    assert found is not None and found.tolist() == [[0] * 4] * 2


def test_experts_that_cannot_be_seen_have_no_load() -> None:
    load = ExpertLoad(SimpleNamespace(config=SimpleNamespace()))
    load.counting(loss)(Scored(NOTHING, NOTHING, None), BATCH)
    assert load.over_ranks(torch.device("cpu")) is None


def test_biases_of_crowded_experts_fall_and_of_idle_ones_rise() -> None:
    policy = init_policy(PolicyConfig.from_dict(DEEPSEEK), seed=0)
    update_router_biases(policy, torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 40]]), rate=0.25)
    biases = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in list(policy.model.layers)[1:]]
    assert biases == [[-0.25, 0.25, 0, 0, 0, 0, 0, 0], [0.25] * 7 + [-0.25]]
