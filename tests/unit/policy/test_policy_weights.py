"""Weights: strict loading that names keys, shards, fp8, multi-token prediction layers, dtypes; deterministic init."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.policy.weights import dequantise_fp8, load_policy, save_policy

SHAPE: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "eos_token_id": 2,
}


def policy(**changes: Any) -> Policy:
    return init_policy(PolicyConfig.from_dict(SHAPE | changes), seed=5)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a: Policy, b: Policy) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_files_hold_one_matrix_per_expert(tmp_path: Path) -> None:
    ours = policy()
    save_policy(ours, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    experts = ours.model.layers[1].mlp.experts
    assert torch.equal(tensors["model.layers.1.mlp.experts.3.gate_proj.weight"], experts.gate_up_proj[3, :8])
    assert torch.equal(tensors["model.layers.1.mlp.experts.3.up_proj.weight"], experts.gate_up_proj[3, 8:])
    assert torch.equal(tensors["model.layers.1.mlp.experts.0.down_proj.weight"], experts.down_proj[0])
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert same(ours, load_policy(tmp_path))


def test_a_checkpoints_generation_config_is_saved_with_it(tmp_path: Path) -> None:
    """A chat model's end tokens and sampling stand there, and not in config.json."""
    save_policy(policy(), tmp_path / "theirs")
    named = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(named))
    save_policy(load_policy(tmp_path / "theirs"), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == named


def test_shards_and_their_index(tmp_path: Path) -> None:
    ours = policy()
    save_policy(ours, tmp_path)
    save_policy(ours, tmp_path, max_shard_bytes=4000)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.state_dict().values())
    assert all((tmp_path / name).stat().st_size < 4000 + 4000 for name in files)
    assert same(ours, load_policy(tmp_path))
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"the index names {files[1]}, which is not there"):
        load_policy(tmp_path)
    other = init_policy(ours.config, seed=6)
    save_policy(other, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert same(other, load_policy(tmp_path))


def test_keys_that_old_or_other_programs_write_beside_the_weights(tmp_path: Path) -> None:
    ours = policy(tie_word_embeddings=True)
    save_policy(ours, tmp_path)
    extra = {
        "lm_head.weight": ours.lm_head.weight.detach().clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    edit(tmp_path, lambda t: t.update(extra))
    assert same(ours, load_policy(tmp_path))


@pytest.mark.parametrize("keys", [("dtype", "torch_dtype"), ("torch_dtype",), ("dtype",), ()])
def test_the_dtype_is_that_of_config_json(keys: tuple[str, ...], tmp_path: Path) -> None:
    save_policy(policy().to(torch.bfloat16), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    path.write_text(json.dumps({k: v for k, v in config.items() if k in keys or not k.endswith("dtype")}))
    assert load_policy(tmp_path).lm_head.weight.dtype == (torch.bfloat16 if keys else torch.float32)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    save_policy(policy(), tmp_path)
    edit(
        tmp_path, lambda t: t.update({"model.layers.1.mlp.extra": t.pop("model.layers.1.mlp.experts.2.up_proj.weight")})
    )
    with pytest.raises(
        ValueError, match=r"missing: .*experts\.2\.up_proj\.weight; unexpected: model\.layers\.1\.mlp\.extra"
    ):
        load_policy(tmp_path)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    save_policy(policy(), tmp_path)
    edit(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\); config\.json implies \(16,\)"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "neither a folder nor a hub id"),
        (".", "no config.json"),
    ],
)
def test_unusable_places(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_policy(name)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    save_policy(policy(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors checkpoints are read"):
        load_policy(tmp_path)


def test_bad_config_names_the_file(tmp_path: Path) -> None:
    save_policy(policy(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_group": 3}))
    with pytest.raises(ValueError, match=r"config\.json: policy config: n_group = 3"):
        load_policy(tmp_path)


def test_prediction_layers_are_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = policy()
    save_policy(ours, tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.layers.2.self_attn.o_proj.weight": torch.ones(2)}
    edit(tmp_path, lambda t: t.update(extra))
    with caplog.at_level(logging.INFO, logger="rl.policy.weights"):
        assert same(ours, load_policy(tmp_path))
    assert "skipped 2 tensors of multi-token prediction layers" in caplog.text


def test_layers_that_config_json_does_not_count_are_unexpected(tmp_path: Path) -> None:
    save_policy(policy(num_hidden_layers=3), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.2\.input_layernorm\.weight"):
        load_policy(tmp_path)


def test_bf16_file_keeps_an_fp32_bias(tmp_path: Path) -> None:
    ours = policy()
    ours.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.001, 1.0001, -0.3, 0.2]))
    ours.to(torch.bfloat16)
    save_policy(ours, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert same(ours, load_policy(tmp_path))
    loaded = load_policy(tmp_path, dtype=torch.float32)
    assert loaded.lm_head.weight.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, ours.lm_head.weight.float())


def test_fused_expert_keys_are_read_too(tmp_path: Path) -> None:
    ours = policy()
    save_policy(ours, tmp_path)
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same(ours, load_policy(tmp_path))


def test_saving_a_gathered_state_dict(tmp_path: Path) -> None:
    ours = policy()
    gathered = {key: tensor + 1 for key, tensor in ours.state_dict().items()}
    save_policy(ours, tmp_path, state_dict=gathered)
    assert torch.equal(load_policy(tmp_path).lm_head.weight, ours.lm_head.weight + 1)
    del gathered["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        save_policy(ours, tmp_path, state_dict=gathered)


def test_fp8_blocks_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [8.0, 8.0, 8.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    expected = [[1, 2, 40], [1, 2, 40], [800, 800, 8000]]
    assert dequantise_fp8(weight, scale, block=(2, 2)).tolist() == expected


def test_fp8_checkpoint_is_dequantised(tmp_path: Path) -> None:
    ours = policy()
    save_policy(ours, tmp_path)
    key = "model.layers.1.mlp.experts.2.down_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = scale.reshape(1, 1)

    edit(tmp_path, quantise)
    loaded = load_policy(tmp_path)
    wanted = ours.model.layers[1].mlp.experts.down_proj[2]
    error = (loaded.model.layers[1].mlp.experts.down_proj[2] - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 2**-4
    edit(tmp_path, lambda t: t.pop(key + "_scale_inv"))
    with pytest.raises(ValueError, match=f"{key} is FP8 and has no"):
        load_policy(tmp_path)
    path = tmp_path / "config.json"
    for quantisation, message in (
        ({"quant_method": "awq"}, "quant_method = 'awq'; allowed: 'fp8' or none"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size = None; allowed: "),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path)


def test_init_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = policy()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, policy())
    other = init_policy(first.config, seed=6)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    rounded = init_policy(first.config, seed=5, dtype=torch.bfloat16)
    assert torch.equal(rounded.lm_head.weight, first.lm_head.weight.to(torch.bfloat16))


def test_init_has_the_stated_distribution() -> None:
    ours = policy(initializer_range=0.5, vocab_size=2000, attention_bias=True)
    assert ours.model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert ours.model.embed_tokens.weight.mean().item() == pytest.approx(0.0, abs=0.01)
    assert (ours.model.norm.weight == 1).all() and (ours.model.layers[0].self_attn.o_proj.bias == 0).all()
    assert (ours.model.layers[1].mlp.gate.e_score_correction_bias == 0).all()
    tied = policy(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
