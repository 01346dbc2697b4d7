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
def decode(
    policy: Policy, prompts: list[torch.Tensor], groups: list[list[int]], completions: torch.Tensor, slots: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed completions (n, t) of rows in `groups` through steps of five rows, the last of them idle; row r's own cache
    is slots[r] -> logits (n, t, V), record (slots, t, Lm, K)."""
    count, steps = completions.shape
    idle = range(count, 5)
    group_of = {row: g for g, members in enumerate(groups) for row in members}
    layers, width = policy.config.num_hidden_layers, policy.config.cache_width
    prompt_cache = [torch.zeros(len(prompts), 6, width, device=DEVICE) for _ in range(layers)]
    own_cache = [torch.zeros(5, 4, width, device=DEVICE) for _ in range(layers)]
    for g, prompt in enumerate(prompts):
        latents: list[torch.Tensor] = []
        policy(prompt.to(DEVICE), ints([0, len(prompt)]), len(prompt), latents=latents)
        for cache, rows in zip(prompt_cache, latents, strict=True):
            cache[g, : len(prompt)] = rows
    record = torch.zeros(5, 4, 2, 2, dtype=torch.uint8, device=DEVICE)
    decoder = FusedDecoder(policy, max_rows=6, positions=16)
    together = [*groups, *([n] for n in idle)]
    tiles = torch.tensor(prompt_tiles(together, decoder.rows_per_tile, 5), dtype=torch.int32, device=DEVICE)
    lengths = [len(prompts[group_of[n]]) for n in range(count)]
    found = []
    for t in range(steps):
        inputs = StepInputs(
            tokens=torch.cat((completions[:, t], torch.zeros(len(idle), dtype=torch.int64))).to(DEVICE),
            positions=ints([*(n + t for n in lengths), *(0 for _ in idle)]),
            slots=ints(slots),
            places=ints([t] * count + [-1 for _ in idle]),
            own_lengths=ints([t + 1] * count + [0 for _ in idle]),
            prompt_slots=ints([*(group_of[n] for n in range(count)), *(0 for _ in idle)]),
            prompt_lengths=ints([*lengths, *(0 for _ in idle)]),
            tiles=tiles,
        )
        assert decoder.counts is not None
        decoder.counts.zero_()
        found.append(decoder(inputs, own_cache, prompt_cache, record)[:count].clone())
    return torch.stack(found, dim=1), record


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("name", list(SHAPES))
def test_decode_equals_forward(name: str) -> None:
    policy = small_policy(name)
    generator = torch.Generator().manual_seed(0)
    prompts = [draw(generator, n) for n in (5, 1)]
    groups = [[0, 2, 3], [1]]
    completions = draw(generator, 4, 3)
    slots = [4, 1, 0, 2, 3]
    logits, record = decode(policy, prompts, groups, completions, slots)
    for n, slot in enumerate(slots[:4]):
        sequence = torch.cat((prompts[n == 1], completions[n])).to(DEVICE)
        out = policy(sequence, ints([0, len(sequence)]), len(sequence))
        expected = policy.lm_head(out.hidden)[-3:]
        assert (logits[n] - expected).abs().max() < 2e-5
        assert out.routes is not None
        assert torch.equal(record[slot, :3].long().sort(-1).values, out.routes[-3:].sort(-1).values)


def test_a_rows_bits_do_not_depend_on_the_others_in_steps_of_one_size() -> None:
    policy = small_policy("v3")
    generator = torch.Generator().manual_seed(0)
    prompt, completion = draw(generator, 5), draw(generator, 1, 3)
    alone, _ = decode(policy, [prompt], [[0]], completion, [4, 1, 0, 2, 3])
    others, more = draw(generator, 3), draw(generator, 3, 3)
    together, _ = decode(
        policy, [others, prompt], [[0, 3], [1, 2]], torch.cat((more[:2], completion, more[2:])), [4, 1, 0, 2, 3]
    )
    assert torch.equal(together[2], alone[0])
