"""The fused decode step against the policy's own forward: same logits and same experts, prompt shared by a group."""

import pytest
import torch

pytest.importorskip("triton")

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout.kernels.decoder import FusedDecoder, StepInputs, prompt_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SHAPES = {
    "v3": {"q_lora_rank": 24, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
    "moonlight": {"q_lora_rank": None, "n_shared_experts": 1, "rope_interleave": False},
    "v2": {"q_lora_rank": None, "n_shared_experts": 0, "model_type": "deepseek_v2"},
}


def small_policy(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    config = PolicyConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=24, intermediate_size=80, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1, initializer_range=0.1, **SHAPES[name],
    )  # fmt: skip
    return init_policy(config, seed=3, dtype=dtype, device=DEVICE)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("name", list(SHAPES))
def test_decode_equals_forward(name: str) -> None:
    policy = small_policy(name)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 50, (n,), generator=generator) for n in (5, 1)]
    groups = [[0, 2, 3], [1]]
    completions = torch.randint(0, 50, (4, 3), generator=generator)
    group_of = {row: g for g, members in enumerate(groups) for row in members}
    layers, width = 3, policy.config.cache_width
    prompt_cache = [torch.zeros(2, 6, width, device=DEVICE) for _ in range(layers)]
    own_cache = [torch.zeros(5, 4, width, device=DEVICE) for _ in range(layers)]
    for g, prompt in enumerate(prompts):
        latents: list[torch.Tensor] = []
        policy(prompt.to(DEVICE), ints([0, len(prompt)]), len(prompt), latents=latents)
        for cache, rows in zip(prompt_cache, latents, strict=True):
            cache[g, : len(prompt)] = rows
    record = torch.zeros(5, 4, 2, 2, dtype=torch.uint8, device=DEVICE)
    decoder = FusedDecoder(policy, max_rows=6, positions=16)
    tiles = torch.tensor(prompt_tiles([*groups, [4]], decoder.rows_per_tile, 5), dtype=torch.int32, device=DEVICE)
    lengths = [len(prompts[group_of[n]]) for n in range(4)]
    found = []
    for t in range(3):  # row 4 is idle: it must not disturb the others
        inputs = StepInputs(
            tokens=torch.cat((completions[:, t], torch.zeros(1, dtype=torch.int64))).to(DEVICE),
            positions=ints([*(n + t for n in lengths), 0]),
            slots=ints([4, 1, 0, 2, 3]),
            places=ints([t, t, t, t, -1]),
            own_lengths=ints([t + 1] * 4 + [0]),
            prompt_slots=ints([*(group_of[n] for n in range(4)), 0]),
            prompt_lengths=ints([*lengths, 0]),
            tiles=tiles,
        )
        assert decoder.counts is not None
        decoder.counts.zero_()
        found.append(decoder(inputs, own_cache, prompt_cache, record)[:4].clone())
    logits = torch.stack(found, dim=1)
    for n, slot in enumerate([4, 1, 0, 2]):
        sequence = torch.cat((prompts[group_of[n]], completions[n])).to(DEVICE)
        out = policy(sequence, ints([0, len(sequence)]), len(sequence))
        expected = policy.lm_head(out.hidden)[-3:]
        assert (logits[n] - expected).abs().max() < 2e-5
        assert out.routes is not None
        assert torch.equal(record[slot, :3].long().sort(-1).values, out.routes[-3:].sort(-1).values)


@torch.no_grad()
def test_refresh_reads_new_weights_into_the_same_buffers() -> None:
    policy = small_policy("moonlight")
    decoder = FusedDecoder(policy, max_rows=2, positions=4)
    before = [layer.joined.data_ptr() for layer in decoder.layers]
    policy.model.layers[1].self_attn.q_proj.weight.add_(1.0)
    decoder.refresh()
    assert [layer.joined.data_ptr() for layer in decoder.layers] == before
    query = policy.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(decoder.layers[1].joined[: query.shape[0]], query)
    assert not decoder.parameters_moved()
    policy.lm_head.weight.data = policy.lm_head.weight.data.clone()
    assert decoder.parameters_moved()
