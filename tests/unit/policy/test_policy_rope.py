"""Rotation by hand, both layouts; YaRN's frequencies and temperatures against the paper's formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl.policy.attention import PackedLayout
from rl.policy.config import PolicyConfig, YarnScaling
from rl.policy.rope import RotaryEmbedding, rotate, softmax_scale

SHAPE: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,
    "v_head_dim": 4,
    "intermediate_size": 8,
    "rope_theta": 100.0,
}


def test_rotation_by_hand_in_both_layouts() -> None:
    """R = 4, theta 100: pair frequencies 1 and 0.1. The result: first of pair 0, of pair 1, second of 0, of 1."""
    tables = RotaryEmbedding(PolicyConfig.from_dict(SHAPE)).tables(torch.tensor([2]))
    a, b = 2.0, 0.2
    expected = [
        1 * math.cos(a) - 3 * math.sin(a),
        5 * math.cos(b) - 7 * math.sin(b),
        3 * math.cos(a) + 1 * math.sin(a),
        7 * math.cos(b) + 5 * math.sin(b),
    ]
    assert rotate(torch.tensor([[1.0, 3, 5, 7]]), tables, interleave=True)[0].tolist() == pytest.approx(expected)
    assert rotate(torch.tensor([[1.0, 5, 3, 7]]), tables, interleave=False)[0].tolist() == pytest.approx(expected)
    heads = rotate(torch.tensor([[[1.0, 3, 5, 7], [0, 0, 0, 0]]]), tables, interleave=True)
    assert heads[0, 0].tolist() == pytest.approx(expected) and heads[0, 1].tolist() == [0, 0, 0, 0]


def test_scores_depend_on_distance_only() -> None:
    rotary = RotaryEmbedding(PolicyConfig.from_dict(SHAPE))
    q, k = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).split(1)

    def score(i: int, j: int) -> float:
        tables = rotary.tables(torch.tensor([i])), rotary.tables(torch.tensor([j]))
        return float(rotate(q, tables[0], interleave=True) @ rotate(k, tables[1], interleave=True).T)

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)


def test_yarn_temperatures() -> None:
    """V3's values: factor 40, mscale = mscale_all_dim = 1 -> tables unscaled, softmax scale * (0.1 ln 40 + 1)^2."""
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    config = PolicyConfig.from_dict(SHAPE | {"rope_scaling": yarn})
    assert RotaryEmbedding(config).table_scale == 1.0
    assert softmax_scale(config) == pytest.approx(16**-0.5 * 1.3688879454113936**2)
    without = PolicyConfig.from_dict(
        SHAPE | {"rope_scaling": YarnScaling(factor=40.0, original_max_position_embeddings=4096)}
    )
    assert RotaryEmbedding(without).table_scale == pytest.approx(1.3688879454113936)
    assert softmax_scale(without) == 0.25


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    yarn = YarnScaling(factor=8.0, original_max_position_embeddings=4096)
    base = {"qk_rope_head_dim": 64, "rope_theta": 10000.0}
    plain = RotaryEmbedding(PolicyConfig.from_dict(SHAPE | base)).inv_freq
    stretched = RotaryEmbedding(PolicyConfig.from_dict(SHAPE | base | {"rope_scaling": yarn})).inv_freq
    ratio = plain / stretched
    turns = 4096 * plain / (2 * math.pi)
    assert torch.allclose(ratio[turns > 40], torch.tensor(1.0)) and torch.allclose(
        ratio[turns < 0.8], torch.tensor(8.0)
    )
    assert (ratio.diff() >= -1e-6).all()


def test_casting_the_policy_leaves_the_tables_alone() -> None:
    from rl.policy.model import init_policy

    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0).to(torch.bfloat16)
    cos, _ = policy.rotary.tables(torch.tensor([3]))
    assert cos.dtype == torch.float32 and cos[0, 0].item() == pytest.approx(math.cos(3.0))
    assert policy(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3], dtype=torch.int32), 2).hidden.dtype == torch.bfloat16


def test_packed_layout_by_hand() -> None:
    layout = PackedLayout.of(torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32), num_tokens=6, max_seqlen=3)
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.padded_rows is not None and layout.padded_rows.tolist() == [0, 1, 2, 3, 9, 10]
    even = PackedLayout.of(torch.tensor([0, 2, 4], dtype=torch.int32), num_tokens=4, max_seqlen=2)
    assert even.positions.tolist() == [0, 1, 0, 1] and even.padded_rows is None
