"""Other architectures behind the packed call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.policy.hf import HFPolicy, checkpoint_end_tokens, init_any, load_any, save_any
from rl.policy.model import Policy

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.1,
}
LENGTHS = (4, 1, 6)


def qwen(**changes: Any) -> HFPolicy:
    made = init_any(QWEN | changes, seed=1)
    assert isinstance(made, HFPolicy)
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    return tokens, torch.tensor([0, 4, 5, 11], dtype=torch.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_call_equals_the_model_one_by_one(tied: bool) -> None:
    policy = qwen(tie_word_embeddings=tied)
    tokens, cu = batch()
    out = policy(tokens, cu, 6)
    alone = torch.cat([policy.inner(sequence[None]).logits[0] for sequence in tokens.split(LENGTHS)])
    assert out.routes is None
    assert (policy.lm_head(out.hidden) - alone).abs().max() <= 1e-5


def test_checkpointing_gives_the_same_gradients() -> None:
    policy = qwen().train()
    tokens, cu = batch()
    results = []
    for on in (False, True, False):
        policy.gradient_checkpointing = on
        assert policy.inner.is_gradient_checkpointing == on
        policy.zero_grad()
        policy(tokens, cu, 6).hidden.square().sum().backward()
        results.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert results[0]
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results[0], other, strict=True))


TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
NOISY: list[dict[str, Any]] = [
    # dropout modules, 0.1 by default
    {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    # attributes of layers; whole layers are left out at random
    {"model_type": "opt", **TINY, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5},
    # read from the configuration at every call
    {"model_type": "falcon", **TINY, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    # the router's input
    {"model_type": "mixtral", **TINY, "num_key_value_heads": 2, "intermediate_size": 24, "router_jitter_noise": 0.5},
]


@pytest.mark.parametrize("values", NOISY, ids=lambda values: values["model_type"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_draws_no_noise(values: dict[str, Any], checkpointing: bool) -> None:
    policy = init_any({**values, "bos_token_id": None, "eos_token_id": None}, seed=1)
    tokens, cu = batch()
    sampled_from = policy.eval()(tokens, cu, 6).hidden
    policy.gradient_checkpointing = checkpointing
    assert torch.equal(policy.train()(tokens, cu, 6).hidden, sampled_from)


def test_save_and_load(tmp_path: Path) -> None:
    policy = qwen()
    save_any(policy, tmp_path / "own")
    gathered = {key: value * 2 for key, value in policy.state_dict().items()}
    save_any(policy, tmp_path / "gathered", state_dict=gathered)
    tokens, cu = batch()
    same, doubled = load_any(tmp_path / "own"), load_any(tmp_path / "gathered")
    assert torch.equal(same(tokens, cu, 6).hidden, policy(tokens, cu, 6).hidden)
    assert torch.equal(doubled.lm_head.weight, policy.lm_head.weight * 2)


def test_seed_decides_and_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, second = qwen(), qwen()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_deepseek_goes_to_our_own_policy(tmp_path: Path) -> None:
    values = {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "kv_lora_rank": 4,
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 2,
        "v_head_dim": 4,
        "intermediate_size": 8,
    }
    policy = init_any(values, seed=0)
    assert isinstance(policy, Policy)
    save_any(policy, tmp_path)
    assert isinstance(load_any(tmp_path), Policy)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"deepseek_v3"', '"kimi_k2"'))  # unknown to transformers
    assert isinstance(load_any(tmp_path), Policy)


def test_a_checkpoint_without_its_output_head_is_refused(tmp_path: Path) -> None:
    """A reward model's files, say: transformers gives the missing matrix random numbers and a warning."""
    policy = qwen(tie_word_embeddings=False)
    policy.inner.base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not the files of a causal language model: lm_head\.weight missing"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": [7, 8]}, {"top_p": 0.9}, (7, 8)),
        ({"eos_token_id": 7}, None, (7,)),
        ({}, None, ()),
    ],
)
def test_end_tokens_of_a_checkpoint(
    config: dict[str, Any], generation: dict[str, Any] | None, ends: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoint_end_tokens(str(tmp_path)) == ends


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5"}, "'t5' is an encoder-decoder; allowed: causal language models"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.02}, "lm_head_multiplier = 0.02"),
        ({"model_type": "recurrent_gemma"}, "logits_soft_cap = 30.0"),
        ({"model_type": "gemma3", "text_config": {"final_logit_softcapping": 9.0}}, "final_logit_softcapping = 9.0"),
        ({"model_type": "no_such_model"}, "model_type = 'no_such_model'"),
    ],
)
def test_unsupported_models_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_any(values, seed=0)


def test_routes_are_refused() -> None:
    tokens, cu = batch()
    with pytest.raises(ValueError, match="neither replays routes nor gives latents"):
        qwen()(tokens, cu, 6, latents=[])
