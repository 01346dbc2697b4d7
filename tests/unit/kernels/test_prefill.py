"""The lean prefill against the policy's own forward: logits, cache rows and experts, through `rl.rollout.prefill`."""

import pytest
import torch

pytest.importorskip("triton")

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout.arena import torch_zeros
from rl.rollout.cache import CacheShape, LatentCache
from rl.rollout.kernels.decoder import FusedDecoder
from rl.rollout.kernels.prefill import FusedPrefill
from rl.rollout.prefill import Prefill
from rl.rollout.scheduler import Group
from rl.types import Problem, RolloutRequest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS, SLOTS, PROMPT_TOKENS = [5, 1, 6, 2], [2, 0, 4, 3], 9

SHAPES: dict[str, dict] = {
    "v3": {
        "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
        "attention_bias": True,
    },
    "moonlight": {"q_lora_rank": None, "n_shared_experts": 1, "rope_interleave": False, "v_head_dim": 20},
    "v2": {
        "q_lora_rank": None, "n_shared_experts": 0, "model_type": "deepseek_v2", "n_group": 4, "topk_group": 2,
        "topk_method": "group_limited_greedy", "qk_nope_head_dim": 12,
    },
    "dense": {"q_lora_rank": None, "n_routed_experts": None, "n_shared_experts": 0, "attention_bias": True},
}  # fmt: skip


def small_policy(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    values: dict = {
        "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24, "intermediate_size": 80,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "initializer_range": 0.1,
    }  # fmt: skip
    policy = init_policy(PolicyConfig(**(values | SHAPES[name])), seed=3, dtype=dtype, device=DEVICE)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*policy.parameters(), *policy.buffers()):
            if tensor.dim() == 1:  # biases and norms, which start as zeros and ones
                tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor))
    return policy


def prompts(lengths: list[int], slots: list[int], seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        ids = tuple(torch.randint(0, 50, (length,), generator=generator).tolist())
        groups.append(Group(i, RolloutRequest(Problem(str(i), "", ids), (0,)), prompt_slot=slot))
    return groups


def empty_cache(policy: Policy) -> LatentCache:
    config, dtype = policy.config, policy.lm_head.weight.dtype
    cache = LatentCache(
        CacheShape(1, 5, 1, PROMPT_TOKENS), layers=config.num_hidden_layers, width=config.cache_width, dtype=dtype,
        zeros=torch_zeros(DEVICE),
    )  # fmt: skip
    cache.prompt.fill_(-7.0)
    return cache


def lean(policy: Policy) -> FusedPrefill:
    return FusedPrefill(FusedDecoder(policy, max_rows=2, positions=PROMPT_TOKENS), routes_dtype=torch.uint8)


@torch.no_grad()
def prefill(
    policy: Policy, groups: list[Group], with_lean: FusedPrefill | None, *, one_by_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """-> logits (prompt slots, V), cache (L, prompt slots, T, C + R), routes by group."""
    cache = empty_cache(policy)
    found = Prefill(
        policy, cache, column_order=None, chunk_tokens=100, routes_dtype=torch.uint8, one_by_one=one_by_one,
        lean=with_lean,
    )  # fmt: skip
    routes = found.run(groups)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found.logits, cache.prompt, routes


@pytest.mark.parametrize("name", list(SHAPES))
def test_lean_prefill_equals_the_policys_forward(name: str) -> None:
    policy, groups = small_policy(name), prompts(LENGTHS, SLOTS)
    logits, cache, routes = prefill(policy, groups, lean(policy))
    expected_logits, expected_cache, expected_routes = prefill(policy, groups, None)
    assert (logits - expected_logits).abs().max() < 2e-5
    assert logits.abs().amax(1).gt(0).tolist() == [True, False, True, True, True]
    assert (cache - expected_cache).abs().max() < 1e-5  # also: untouched where there is no prompt token
    assert routes.keys() == expected_routes.keys() == (set() if name == "dense" else {0, 1, 2, 3})
    for index, used in routes.items():
        assert used.dtype == torch.uint8 and used.shape == (LENGTHS[index], 2, 2)
        assert torch.equal(used.sort(-1).values, expected_routes[index].sort(-1).values)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="bf16 and the flash kernel need a GPU")
@pytest.mark.parametrize("name", list(SHAPES))
def test_lean_prefill_in_bf16_is_as_near_to_fp32_as_the_policys_forward(name: str) -> None:
    """Behind the first MoE layer, which is layer 1, near ties between experts would be compared: only the cache rows of
    two layers are, and the logits of the policy without experts."""
    policy, groups = small_policy(name, torch.bfloat16), prompts(LENGTHS, SLOTS)
    found, other = prefill(policy, groups, lean(policy)), prefill(policy, groups, None)
    exact = prefill(policy.float(), groups, None)

    def error(result: tuple[torch.Tensor, ...], part: int) -> float:
        computed, expected = (result[part], exact[part]) if part == 0 else (result[part][:2], exact[part][:2])
        return float((computed.float() - expected).norm() / expected.norm())

    for part in (0, 1) if name == "dense" else (1,):
        assert 0 < error(found, part) < 2 * error(other, part) < 0.1


def test_a_prompts_bits_do_not_depend_on_the_others_when_prompts_go_one_by_one() -> None:
    policy, groups = small_policy("v3"), prompts([4, 1, 3], SLOTS[:3])
    way = lean(policy)
    logits, cache, routes = prefill(policy, groups, way, one_by_one=True)
    for index in (0, 1):
        slot = SLOTS[index]
        alone_logits, alone_cache, alone_routes = prefill(policy, groups[index : index + 1], way, one_by_one=True)
        assert torch.equal(alone_logits[slot], logits[slot])
        assert torch.equal(alone_cache[:, slot], cache[:, slot])
        assert torch.equal(alone_routes[index], routes[index])


def test_only_small_chunks_take_the_lean_way() -> None:
    policy, groups = small_policy("dense"), prompts([2, 9, 3, 3], [0, 1, 2, 3])
    taken, way = [], lean(policy)

    def spy(tokens: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        taken.append(tokens.shape[0])
        return way(tokens, *rest)  # type: ignore[arg-type]

    prefill_them = Prefill(
        policy, empty_cache(policy), column_order=None, chunk_tokens=5, routes_dtype=torch.uint8, lean=spy,
        lean_tokens=4,
    )  # fmt: skip
    with torch.no_grad():
        prefill_them.run(groups)
    assert taken == [3]  # chunks [2, 3], [3], [9]
