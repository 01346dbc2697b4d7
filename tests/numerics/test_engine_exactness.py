"""The sampler is the trainer: what the engine draws, reports and records equals the policy's own full forward
(fp32)."""

from __future__ import annotations

import pytest
import torch

from rl.policy.config import PolicyConfig, YarnScaling
from rl.policy.model import Policy, init_policy
from rl.rollout.engine import Engine
from rl.rollout.native import library, step
from rl.rollout.sampling import Sampler, exponential_noise, row_keys, sampling_logprobs
from rl.rollout.weights import build_decode_weights
from rl.types import Problem, RolloutGroup, RolloutRequest, SamplingParams

V3 = PolicyConfig(
    vocab_size=40, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=16, q_lora_rank=24,
    qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20, intermediate_size=96, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, rope_theta=100.0,
    initializer_range=0.15, n_group=2, topk_group=1, routed_scaling_factor=1.5,
)  # fmt: skip
# Uncompressed queries, stored in halves, YaRN, biases, no folding (wide latents), no shared experts.
WIDE = PolicyConfig(
    vocab_size=33, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=33, qk_rope_head_dim=6,
    qk_nope_head_dim=4, v_head_dim=6, intermediate_size=64, n_routed_experts=4, num_experts_per_tok=3,
    moe_intermediate_size=16, initializer_range=0.2, rope_interleave=False, attention_bias=True,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9),
)  # fmt: skip
DENSE = PolicyConfig(
    vocab_size=29, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, intermediate_size=48, initializer_range=0.2, tie_word_embeddings=True,
)  # fmt: skip
V2 = PolicyConfig(
    vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, intermediate_size=48, initializer_range=0.2, model_type="deepseek_v2",
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=2, n_group=3, topk_group=2,
    topk_method="group_limited_greedy",
)  # fmt: skip
# Every matrix is whole panels wide (64 outputs), so that decode.c computes whole layers; with and without compressed
# queries.
PANELS = PolicyConfig(
    vocab_size=40, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=24, q_lora_rank=32,
    qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=24, intermediate_size=96, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, rope_theta=100.0,
    initializer_range=0.15, n_group=4, topk_group=2, routed_scaling_factor=1.5,
)  # fmt: skip
PLAIN_QUERIES = PolicyConfig(
    vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=40, qk_rope_head_dim=24,
    qk_nope_head_dim=40, v_head_dim=40, intermediate_size=64, n_routed_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=64, n_shared_experts=0, initializer_range=0.15, model_type="deepseek_v2",
    topk_method="greedy",
)  # fmt: skip


@pytest.fixture(autouse=True, params=["native", "torch"])
def decode_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both forms of the CPU's decode step."""
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    elif library.load() is None:
        pytest.skip("no C compiler that takes decode.c")


CONFIGS = {"v3": V3, "wide": WIDE, "dense": DENSE, "v2": V2, "panels": PANELS, "plain queries": PLAIN_QUERIES}


@pytest.mark.parametrize("config", [PANELS, PLAIN_QUERIES], ids=["panels", "plain queries"])
def test_whole_layers_are_computed_in_c(config: PolicyConfig) -> None:
    native = library.load()
    if native is None or native.panels(torch.zeros(64, 1)) is None:
        pytest.skip("plain torch, or no AVX-512")
    weights = build_decode_weights(make_policy(config), positions=8)
    before = weights.derived_bytes
    with torch.no_grad():
        step.pack(native, weights)
    assert all(layer.attention_panels is not None for layer in weights.layers)
    assert all((layer.dense_panels is None) == (layer.dense_gate_up is None) for layer in weights.layers)
    assert all((layer.expert_panels is None) == (layer.router is None) for layer in weights.layers)
    assert weights.derived_bytes > before


def make_policy(config: PolicyConfig, seed: int = 0) -> Policy:
    policy = init_policy(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:  # norms that are not 1 and biases that are not 0, so that none can be forgotten
            with torch.no_grad():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + (0.5 if "norm" in name else -0.5))
    for module in policy.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(0.1 * torch.rand(bias.shape, generator=generator))
    return policy


def make_requests(config: PolicyConfig, lengths: list[int], group: int) -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(7)
    requests = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        seeds = tuple(2**63 - 5 + 1000 * i + k for k in range(group))  # beyond int64, as a hash may be
        requests.append(RolloutRequest(Problem(str(i), "", tuple(ids)), seeds))
    return requests


def full_forward(
    policy: Policy, prompt: tuple[int, ...], tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, V) that predict each completion token, and the routes of all prompt + completion tokens."""
    ids = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        hidden, routes = policy(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        return policy.lm_head(hidden[len(prompt) - 1 : -1]), routes


def check_group(policy: Policy, group: RolloutGroup, sampler: Sampler) -> float:
    """Largest difference in logprob; asserts that routes are equal."""
    worst = 0.0
    prompt = group.problem.prompt_ids
    for completion in group.completions:
        logits, routes = full_forward(policy, prompt, completion.token_ids)
        tokens = torch.tensor(completion.token_ids)
        expected = sampling_logprobs(logits, sampler).gather(1, tokens[:, None])[:, 0]
        assert completion.logprobs.shape == tokens.shape and completion.logprobs.dtype == torch.float32
        worst = max(worst, (expected - completion.logprobs).abs().max().item())
        if routes is None:
            assert completion.routes is None and group.prompt_routes is None
            continue
        assert completion.routes is not None and group.prompt_routes is not None
        recorded = torch.cat((group.prompt_routes, completion.routes)).long()
        assert torch.equal(recorded.sort(-1).values, routes[:-1].sort(-1).values)
    return worst


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_and_routes_are_those_of_the_full_forward(name: str, temperature: float) -> None:
    policy = make_policy(CONFIGS[name])
    params = SamplingParams(max_completion_length=40, temperature=temperature, stop_token_ids=(3, 11))
    groups = Engine(policy, cache_bytes=2**24).generate(make_requests(policy.config, [1, 37, 5, 2], 3), params)
    sampler = Sampler.from_params(params)
    assert max(check_group(policy, group, sampler) for group in groups) <= 1e-5  # measured: 2e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_argmax_of_the_full_forward(name: str) -> None:
    policy = make_policy(CONFIGS[name])
    requests = make_requests(policy.config, [3, 9], 1)
    params = SamplingParams(max_completion_length=40, temperature=0.0)
    for request, group in zip(requests, Engine(policy, cache_bytes=2**24).generate(requests, params), strict=True):
        tokens: list[int] = []
        for _ in range(40):
            logits, _ = full_forward(policy, request.problem.prompt_ids, [*tokens, 0])
            tokens.append(int(logits[-1].argmax()))
        assert group.completions[0].token_ids == tokens


def test_sampled_tokens_are_the_race_over_the_full_forward() -> None:
    """Temperature, top-k, top-p and min-p: token t wins argmax(logprob - log noise(seed, t)) of the trainer's
    logits."""
    policy = make_policy(V3)
    params = SamplingParams(max_completion_length=20, temperature=1.3, top_p=0.9, top_k=12, min_p=0.01)
    requests = make_requests(V3, [4, 8], 2)
    groups = Engine(policy, cache_bytes=2**24).generate(requests, params)
    sampler = Sampler.from_params(params)
    assert max(check_group(policy, group, sampler) for group in groups) <= 1e-5
    for request, group in zip(requests, groups, strict=True):
        for seed, completion in zip(request.seeds, group.completions, strict=True):
            logits, _ = full_forward(policy, request.problem.prompt_ids, completion.token_ids)
            steps = torch.arange(len(completion.token_ids))
            seeds = torch.full_like(steps, seed - 2**64 if seed >= 2**63 else seed)
            noise = exponential_noise(row_keys(seeds, steps), V3.vocab_size)
            assert (sampling_logprobs(logits, sampler) - noise.log()).argmax(-1).tolist() == completion.token_ids


# One row at a time, rows that overtake each other, a budget that admits two or three rows, looks at every fifth step,
# ...
COMPOSITIONS = {
    "all at once": {},
    "one row": {"max_batch_size": 1},
    "three rows": {"max_batch_size": 3},
    "seven rows, looking at every fifth step": {"max_batch_size": 7, "steps_per_look": 5},
    "looking behind": {"max_batch_size": 7, "steps_per_look": 3, "look_behind": True},
    "small budget": {"cache_bytes": 110_000},
    "prompts one by one": {"prefill_tokens": 1},
}


def outcome(group: RolloutGroup) -> list[tuple[list[int], str]]:
    return [(completion.token_ids, completion.finish_reason) for completion in group.completions]


@pytest.mark.parametrize("how", COMPOSITIONS)
def test_a_completion_depends_on_weights_prompt_and_seed_only(how: str) -> None:
    policy = make_policy(V3)
    params = SamplingParams(max_completion_length=30, stop_token_ids=(3,))
    requests = make_requests(V3, [5, 21, 1, 33, 8, 8], 4)
    expected = Engine(policy, cache_bytes=2**24).generate(requests, params)
    engine = Engine(policy, **{"cache_bytes": 2**24, **COMPOSITIONS[how]})  # type: ignore[arg-type]
    order = [3, 0, 5, 2, 4, 1]
    groups = engine.generate([requests[i] for i in order], params)
    for i, group in zip(order, groups, strict=True):
        assert group.problem.id == str(i)
        assert outcome(group) == outcome(expected[i])
        for one, other in zip(group.completions, expected[i].completions, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
            assert one.routes is not None and other.routes is not None
            assert torch.equal(one.routes.sort(-1).values, other.routes.sort(-1).values)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert len(set(lengths)) > 5, "rows must end at different times for this test to mean something"


@pytest.mark.parametrize("config", [V3, PANELS], ids=["v3", "panels"])
@pytest.mark.parametrize("how", COMPOSITIONS)
def test_batch_invariant_logprobs_are_equal_bit_for_bit(how: str, config: PolicyConfig) -> None:
    policy = make_policy(config)
    params = SamplingParams(max_completion_length=30, stop_token_ids=(3,))
    requests = make_requests(config, [5, 21, 1, 33, 8, 8], 4)
    expected = Engine(policy, cache_bytes=2**24, batch_invariant=True).generate(requests, params)
    options = {"cache_bytes": 2**24, **COMPOSITIONS[how], "batch_invariant": True}
    groups = Engine(policy, **options).generate(requests[::-1], params)  # type: ignore[arg-type]
    for group, other in zip(groups, expected[::-1], strict=True):
        for one, two in zip(group.completions, other.completions, strict=True):
            assert one.token_ids == two.token_ids
            assert torch.equal(one.logprobs, two.logprobs)


def test_adding_a_seed_leaves_the_other_completions_alone() -> None:
    policy = make_policy(V3)
    params = SamplingParams(max_completion_length=24)
    problem = make_requests(V3, [6], 1)[0].problem
    engine = Engine(policy, cache_bytes=2**24)
    alone = engine.generate([RolloutRequest(problem, (11,))], params)[0]
    among = engine.generate([RolloutRequest(problem, (5, 11, 9))], params)[0]
    assert among.completions[1].token_ids == alone.completions[0].token_ids
    assert len({tuple(c.token_ids) for c in among.completions}) == 3


def test_updated_weights_are_read_at_the_next_generate() -> None:
    policy = make_policy(V3)
    params = SamplingParams(max_completion_length=12, temperature=0.0)
    requests = make_requests(V3, [6], 1)
    engine = Engine(policy, cache_bytes=2**24)
    engine.generate(requests, params)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    group = engine.generate(requests, params)[0]
    assert check_group(policy, group, Sampler.from_params(params)) <= 1e-5
