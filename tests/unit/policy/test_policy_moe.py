"""Router against hand-computed choices and weights; the bias through casts; dispatch; load balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rl.policy.config import PolicyConfig
from rl.policy.model import init_policy, moe_leaf_classes
from rl.policy.moe import MoE, Router, balanced_bias, dispatch, expert_load

SHAPE: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 2,
    "v_head_dim": 4,
    "intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "first_k_dense_replace": 1,
}


def identity_router(**changes: Any) -> Router:
    """A router whose logits are its inputs (D = E = 4)."""
    router = Router(PolicyConfig.from_dict(SHAPE | changes))
    router.weight.data = torch.eye(4)
    return router


def logit(p: float) -> float:
    return torch.logit(torch.tensor(p)).item()


def test_sigmoid_router_by_hand() -> None:
    """Scores .9 .8 .3 .2, bias 0 -.5 0 .3: the choice is by .9 .3 .3 .5, the weights are of .9 and .2."""
    router = identity_router(routed_scaling_factor=2.0)
    router.e_score_correction_bias = torch.tensor([0.0, -0.5, 0.0, 0.3])
    x = torch.tensor([[logit(0.9), logit(0.8), logit(0.3), logit(0.2)]])
    experts, weights = router(x)
    chosen = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen == pytest.approx({0: 2 * 0.9 / 1.1, 3: 2 * 0.2 / 1.1})


def test_group_scores_are_the_top_two_in_v3_and_the_top_one_in_v2() -> None:
    """Groups (.9 .1) and (.6 .5): by the sum of two the second wins (1.1 > 1.0), by the best one the first."""
    limited = {"n_group": 2, "topk_group": 1}
    x = torch.tensor([[logit(0.9), logit(0.1), logit(0.6), logit(0.5)]])
    experts, _ = identity_router(**limited)(x)
    assert sorted(experts[0].tolist()) == [2, 3]
    v2 = identity_router(**limited, model_type="deepseek_v2", topk_method="group_limited_greedy")
    probabilities = torch.tensor([[0.45, 0.05, 0.3, 0.2]])
    experts, weights = v2(probabilities.log())
    chosen = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen == pytest.approx({0: 0.45, 1: 0.05})
    greedy = identity_router(**limited, model_type="deepseek_v2")
    assert sorted(greedy(probabilities.log())[0][0].tolist()) == [0, 2]


def test_experts_of_dropped_groups_lose_to_kept_ones_with_negative_scores() -> None:
    """Biases of -2 make every score negative; the better expert of the kept group still goes before the dropped one."""
    router = identity_router(n_group=2, topk_group=1)
    router.e_score_correction_bias = torch.full((4,), -2.0)
    x = torch.tensor([[logit(0.9), logit(0.8), logit(0.3), logit(0.2)]])
    assert sorted(router(x)[0][0].tolist()) == [0, 1]


def test_replayed_routes_take_live_weights_and_give_gradients() -> None:
    router = identity_router()
    x = torch.tensor([[logit(0.9), logit(0.8), logit(0.3), logit(0.2)]], requires_grad=True)
    experts, weights = router(x, torch.tensor([[3, 2]], dtype=torch.uint8))
    assert experts.tolist() == [[3, 2]] and experts.dtype == torch.int64
    assert weights[0].tolist() == pytest.approx([0.4, 0.6])
    weights[0, 0].backward()
    # w = .2 / (.2 + .3); dw/dscore3 = .3 / .25, and dscore/dlogit = .2 * .8
    assert x.grad is not None and x.grad[0].tolist() == pytest.approx([0, 0, -0.2 / 0.25 * 0.21, 0.3 / 0.25 * 0.16])


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_bias_stays_fp32_through_casts(cast: Any) -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0)
    router = policy.model.layers[1].mlp.gate
    router.e_score_correction_bias.copy_(torch.tensor([0.001, 0.0017, -1.00001, 3.0]))
    before = router.e_score_correction_bias.clone()
    cast(policy)
    assert router.weight.dtype != torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, before)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in policy.state_dict()


def test_router_scores_are_fp32_in_a_bf16_model() -> None:
    router = identity_router().to(torch.bfloat16)
    x = torch.tensor([[1.0, 0.5, -1.0, 0.25]], dtype=torch.bfloat16, requires_grad=True)
    _, weights = router(x)
    assert weights.dtype == torch.float32
    weights[0, 0].backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and router.weight.grad.dtype == torch.bfloat16


def test_dispatch_by_hand() -> None:
    plan = dispatch(torch.tensor([[2, 0], [0, 3], [2, 2]]), 4)
    assert plan.slot_of_row.tolist() == [1, 2, 0, 4, 5, 3]
    assert plan.token_of_row.tolist() == [0, 1, 0, 2, 2, 1]
    assert plan.row_of_slot.tolist() == [[2, 0], [1, 5], [3, 4]]
    assert plan.offsets.tolist() == [2, 2, 5, 6] and plan.offsets.dtype == torch.int32


def test_dispatch_of_many_experts() -> None:
    plan = dispatch(torch.tensor([[299, 257], [0, 299]]), 300)
    assert plan.slot_of_row.tolist() == [2, 1, 0, 3]
    assert plan.offsets[[0, 256, 257, 298, 299]].tolist() == [1, 1, 2, 2, 4]


def test_balance() -> None:
    load = expert_load(torch.tensor([[[0, 1], [0, 2]], [[0, 1], [0, 1]]]), 4)
    assert load.tolist() == [4, 3, 1, 0]
    assert balanced_bias(torch.zeros(4), load, rate=0.5).tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert balanced_bias(torch.ones(2), torch.tensor([3, 3]), rate=0.5).tolist() == [1, 1]


def test_leaf_classes_are_found_by_structure() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 3, 4))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(2, 2)
            self.experts = Fused()

    assert moe_leaf_classes(nn.Sequential(Block(), Block())) == [Block]
    assert moe_leaf_classes(init_policy(PolicyConfig.from_dict(SHAPE), seed=0)) == [MoE]
    split = Block()  # as ZeRO-3 leaves a parameter that it has split
    split.experts.w = nn.Parameter(torch.zeros(0))
    split.experts.w.ds_shape = torch.Size([2, 3, 4])
    assert moe_leaf_classes(split) == [Block]
    assert moe_leaf_classes(nn.Linear(2, 2)) == [] and moe_leaf_classes(nn.Sequential(nn.Conv1d(2, 2, 2))) == []
