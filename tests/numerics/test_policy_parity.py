"""The policy equals transformers' DeepseekV3ForCausalLM / DeepseekV2ForCausalLM: logits, gradients, files both ways.

Every case prints measured beside allowed error (`pytest -s`), and records it (`--junitxml`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.policy.moe import Router
from rl.policy.weights import load_policy, save_policy

LOGITS_ALLOWED = 1e-5  # max |difference|, fp32, logits of size about 2
GRADIENTS_ALLOWED = 1e-5  # max |difference| / max |reference|, for every parameter

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_theta": 100.0,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
MOONLIGHT = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rms_norm_eps": 1e-5}
V2 = {"model_type": "deepseek_v2", "n_shared_experts": 2}
CASES: dict[str, dict[str, Any]] = {
    "v3": TINY,
    "v3_yarn": TINY | {"rope_scaling": YARN},
    "v3_yarn_plain": TINY | {"rope_scaling": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    "v3_yarn_factor": TINY
    | {"rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False, "original_max_position_embeddings": 64}},
    "v3_yarn_short": TINY | {"rope_scaling": YARN | {"original_max_position_embeddings": 4}},  # a ramp of no width
    "v3_half_rope": TINY | {"rope_interleave": False},
    "v3_biased_tied": TINY | {"attention_bias": True, "tie_word_embeddings": True},
    "v3_dense": TINY | {"n_routed_experts": None},
    "v3_unnormalised": TINY | {"norm_topk_prob": False},
    "moonlight": TINY | MOONLIGHT,
    "v2": TINY | V2 | {"topk_method": "group_limited_greedy"},
    "v2_lite": TINY | V2 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_scaling": YARN},
}
LENGTHS = (4, 1, 9)


def random_policy(name: str) -> Policy:
    """Random weights, norms and biases included, so that none of them can be left out unnoticed."""
    policy = init_policy(PolicyConfig.from_dict(CASES[name]), seed=7)
    generator = torch.Generator().manual_seed(8)
    for parameter in policy.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for module in policy.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)
    return policy


def packed_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(9))
    return tokens, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def reference_logits(reference: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([reference(sequence[None], use_cache=False).logits[0] for sequence in tokens.split(LENGTHS)])


@pytest.mark.parametrize("name", CASES)
def test_saved_policy_equals_transformers(name: str, tmp_path: Path, record_property: Any) -> None:
    policy = random_policy(name)
    save_policy(policy, tmp_path)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert reference.dtype == torch.float32
    tokens, cu_seqlens = packed_batch()
    logits = policy.lm_head(policy(tokens, cu_seqlens, max(LENGTHS)).hidden)
    expected = reference_logits(reference, tokens)
    error = (logits - expected).abs().max().item()

    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(10))
    logits.backward(cotangent)
    expected.backward(cotangent)
    gradients = {key: parameter.grad for key, parameter in policy.named_parameters()}
    wanted = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert gradients.keys() == wanted.keys()
    gradient_errors = {}
    for key, gradient in gradients.items():
        assert gradient is not None and wanted[key] is not None, key
        scale = wanted[key].abs().max()
        assert scale > 0, f"{key} has no gradient in the reference: the case proves nothing about it"
        gradient_errors[key] = ((gradient - wanted[key]).abs().max() / scale).item()
    worst = max(gradient_errors, key=gradient_errors.__getitem__)
    print(
        f"\n{name}: logits {error:.1e} (allowed {LOGITS_ALLOWED:.0e}), gradients {gradient_errors[worst]:.1e} "
        f"(allowed {GRADIENTS_ALLOWED:.0e}; {worst})"
    )
    record_property("logits_error", error)
    record_property("gradient_error", gradient_errors[worst])
    assert error <= LOGITS_ALLOWED
    assert gradient_errors[worst] <= GRADIENTS_ALLOWED


@pytest.mark.parametrize("name", ["v3_yarn", "v3_biased_tied", "moonlight", "v2_lite"])
def test_transformers_checkpoint_loads_into_the_policy(name: str, tmp_path: Path) -> None:
    policy = random_policy(name)
    save_policy(policy, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    loaded = load_policy(tmp_path / "theirs")
    assert loaded.config == policy.config
    state = loaded.state_dict()
    assert state.keys() == policy.state_dict().keys()
    for key, tensor in policy.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_bf16_checkpoint_keeps_its_fp32_bias_both_ways(tmp_path: Path) -> None:
    policy = random_policy("v3").to(torch.bfloat16)
    save_policy(policy, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reference.dtype == torch.bfloat16
    reference.save_pretrained(tmp_path / "theirs")
    theirs, loaded = reference.state_dict(), load_policy(tmp_path / "theirs").state_dict()
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert policy.state_dict()[key].dtype == torch.float32
    for other in (theirs, loaded):
        assert all(torch.equal(tensor, other[name]) for name, tensor in policy.state_dict().items())
        assert other[key].dtype == torch.float32


def test_transformers_generates_what_the_policy_predicts(tmp_path: Path) -> None:
    """Greedy continuation by transformers' own generate equals repeated full forwards of the policy."""
    policy = random_policy("v3")
    save_policy(policy, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([3, 14, 15, 9, 26])
    generated = reference.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)[0]
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
            following = policy.lm_head(policy(tokens, cu, len(tokens)).hidden[-1]).argmax()
            tokens = torch.cat((tokens, following[None]))
    assert generated.tolist() == tokens.tolist()
