"""PolicyConfig: both spellings of RoPE, exact round trips, errors that name key, value and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rl.policy.config import PolicyConfig, YarnScaling

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
}
# Values from the published config.json files (shape cut to what matters here).
V3_SCALING = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, r"unknown key 'hiden_size' = 3; did you mean 'hidden_size'\?"),
        ({"hidden_size": 0}, r"hidden_size = 0; allowed: an integer >= 1"),
        ({"hidden_size": 32.5}, r"hidden_size = 32.5; allowed: an integer"),
        ({"first_k_dense_replace": "1"}, r"first_k_dense_replace = '1'; allowed: an integer"),
        ({"q_lora_rank": True}, r"q_lora_rank = True; allowed: an integer or null"),
        ({"rms_norm_eps": "tiny"}, r"rms_norm_eps = 'tiny'; allowed: a number"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings = 1; allowed: true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, r"rope_scaling.factor = 'x'; allowed: a number"),
        ({"kv_lora_rank": None}, r"lacks kv_lora_rank"),
        ({"q_lora_rank": 0}, r"q_lora_rank = 0; allowed: null or"),
        ({"qk_rope_head_dim": 7}, r"qk_rope_head_dim = 7; allowed: an even integer"),
        ({"model_type": "llama"}, r"model_type = 'llama'; allowed: one of \['deepseek_v2', 'deepseek_v3', 'kimi_k2'\]"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'; allowed: 'silu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1; allowed: 0"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2; allowed: equal to num_attention_heads"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax'; allowed: one of \['sigmoid'\] for deepseek_v3"),
        ({"topk_method": "greedy"}, r"topk_method = 'greedy'; allowed: one of \['noaux_tc'\]"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, r"norm_topk_prob = True; allowed: one of \[False\]"),
        ({"n_group": 3}, r"n_group = 3; allowed: a divisor of n_routed_experts = 8"),
        ({"n_group": 8}, r"n_group = 8; allowed: two or more experts in each group"),
        ({"topk_group": 5}, r"topk_group = 5; allowed: 1 to n_group = 4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok = 5; allowed: 1 to 4"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size = None; allowed: an integer >= 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            r"rope_scaling.type = 'linear'; allowed: 'default' or 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling of type 'yarn' lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factr": 2}}, r"unknown key 'factr' = 2; did you mean 'factor'\?"),
        ({"rope_theta": 0}, r"rope_theta = 0.0; allowed: a number > 0"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig.from_dict(SHAPE | change)


def test_hub_files_may_carry_foreign_keys() -> None:
    assert PolicyConfig.from_dict(SHAPE | {"some_other_program": 1}, strict=False).vocab_size == 100


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_both_spellings_of_rope(spelling: str) -> None:
    if spelling == "old":
        values = {"rope_theta": 50000.0, "rope_scaling": V3_SCALING}
    else:
        rest = {k: v for k, v in V3_SCALING.items() if k != "type"}
        values = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0, **rest}}
    config = PolicyConfig.from_dict(SHAPE | values)
    assert config.rope_theta == 50000.0
    assert config.rope_scaling == YarnScaling(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": V3_SCALING, "rope_theta": 10.0},
        {"n_routed_experts": None},
        {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "q_lora_rank": None},
        {"eos_token_id": [1, 2], "tie_word_embeddings": True, "moe_layer_freq": 2},
    ],
)
def test_round_trip_through_json(change: dict[str, Any]) -> None:
    config = PolicyConfig.from_dict(SHAPE | change)
    assert PolicyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_follow_the_family() -> None:
    v3 = PolicyConfig.from_dict(SHAPE)
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    v2 = PolicyConfig.from_dict(SHAPE | {"model_type": "deepseek_v2"})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    assert PolicyConfig.from_dict(SHAPE | {"model_type": "kimi_k2"}).model_type == "deepseek_v3"


def test_numbers_that_yaml_reads_as_strings() -> None:
    config = PolicyConfig.from_dict(SHAPE | {"rms_norm_eps": "1e-5", "rope_theta": "1e4", "initializer_range": 1})
    assert (config.rms_norm_eps, config.rope_theta, config.initializer_range) == (1e-5, 10000.0, 1.0)


def test_moe_layers() -> None:
    assert PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 1}).moe_layers == (1, 2, 3)
    assert PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 1, "moe_layer_freq": 2}).moe_layers == (2,)
    dense = PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 4})
    assert dense.moe_layers == () and dense == PolicyConfig.from_dict(SHAPE | {"n_routed_experts": None})
