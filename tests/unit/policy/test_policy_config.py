"""PolicyConfig: both spellings of RoPE, exact round trips, errors that name key, value and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rl.policy.config import PolicyConfig, YarnScaling
from rl.policy.model import Policy

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
# The published config.json files: (keys, parameters without the selection bias and multi-token prediction).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "DeepSeek-V3": (
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "initializer_range": 0.02,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "transformers_version": "4.33.1",
            "use_cache": True,
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671_026_404_352,
    ),
    "DeepSeek-V2-Lite": (
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v2",
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "pretraining_tp": 1,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "greedy",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        15_706_484_224,
    ),
    "Moonlight-16B-A3B": (
        {
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "kv_lora_rank": 512,
            "max_position_embeddings": 8192,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "num_nextn_predict_layers": 0,
            "pretraining_tp": 1,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.446,
            "scoring_func": "sigmoid",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "v_head_dim": 128,
            "vocab_size": 163840,
        },
        15_960_108_544,
    ),
}
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
        (
            {"model_type": "deepseek_v2", "hidden_size": 30},
            r"hidden_size = 30; allowed: a multiple of num_attention_heads",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'; allowed: 'silu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1; allowed: 0"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2; allowed: equal to num_attention_heads"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax'; allowed: one of \['sigmoid'\] for deepseek_v3"),
        ({"topk_method": "greedy"}, r"topk_method = 'greedy'; allowed: one of \['noaux_tc'\]"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, r"norm_topk_prob = True; allowed: one of \[False\]"),
        (
            {"model_type": "deepseek_v2", "rope_interleave": False},
            r"rope_interleave = False; allowed: true for deepseek",
        ),
        ({"n_group": 3}, r"n_group = 3; allowed: a divisor of n_routed_experts = 8"),
        ({"n_group": 8}, r"n_group = 8; allowed: two or more experts in each group"),
        ({"topk_group": 5}, r"topk_group = 5; allowed: 1 to n_group = 4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok = 5; allowed: 1 to 4"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size = None; allowed: an integer >= 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            r"rope_scaling.type = 'linear'; allowed: 'default' or 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, r"rope_scaling.factor = 0.0; allowed: a number >= 1"),
        (
            {"rope_scaling": V3_SCALING | {"original_max_position_embeddings": 0}},
            r"original_max_.* = 0; allowed: an int",
        ),
        ({"rope_scaling": V3_SCALING | {"beta_slow": 0}}, r"rope_scaling.beta_slow = 0.0; allowed: a number > 0"),
        ({"rope_scaling": V3_SCALING | {"beta_fast": 0.5}}, r"beta_fast = 0.5; allowed: a number >= beta_slow = 1"),
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


def test_null_means_not_used() -> None:
    keys = ("n_group", "topk_group", "n_shared_experts", "moe_layer_freq", "rope_interleave", "q_lora_rank")
    config = PolicyConfig.from_dict({key: value for key, value in SHAPE.items() if key not in keys})
    assert PolicyConfig.from_dict(SHAPE | dict.fromkeys(keys)) == config


def test_the_saved_file_promises_no_prediction_layers() -> None:
    """Where the key is missing, transformers takes one for granted."""
    assert PolicyConfig.from_dict(SHAPE | {"num_nextn_predict_layers": 1}).to_dict()["num_nextn_predict_layers"] == 0


def test_defaults_follow_the_family() -> None:
    v3 = PolicyConfig.from_dict(SHAPE)
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    v2 = PolicyConfig.from_dict(SHAPE | {"model_type": "deepseek_v2"})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    assert PolicyConfig.from_dict(SHAPE | {"model_type": "kimi_k2"}).model_type == "deepseek_v3"


def test_numbers_that_yaml_reads_as_strings() -> None:
    config = PolicyConfig.from_dict(SHAPE | {"rms_norm_eps": "1e-5", "rope_theta": "1e4", "initializer_range": 1})
    assert (config.rms_norm_eps, config.rope_theta, config.initializer_range) == (1e-5, 10000.0, 1.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    values, parameters = PUBLISHED[name]
    with torch.device("meta"):
        policy = Policy(PolicyConfig.from_dict(values))
    assert sum(parameter.numel() for parameter in policy.parameters()) == parameters
    assert policy.config.cache_width == 576


def test_moe_layers() -> None:
    assert PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 1}).moe_layers == (1, 2, 3)
    assert PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 1, "moe_layer_freq": 2}).moe_layers == (2,)
    dense = PolicyConfig.from_dict(SHAPE | {"first_k_dense_replace": 4})
    assert dense.moe_layers == () and dense == PolicyConfig.from_dict(SHAPE | {"n_routed_experts": None})
