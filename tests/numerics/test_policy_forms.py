"""One policy, several ways to compute: absorbed and expanded, packed and alone, chosen and replayed routes, grouped and
one-by-one experts, checkpointed and not. All must agree.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.policy.config import PolicyConfig, YarnScaling
from rl.policy.mla import absorb, absorbed_attention
from rl.policy.model import Policy, init_policy
from rl.policy.moe import Experts, experts_reference

ALLOWED = 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.1,
    "rope_theta": 100.0,
}
LENGTHS = (5, 1, 11, 3)


def small_policy(**changes: Any) -> Policy:
    return init_policy(PolicyConfig.from_dict(SHAPE | changes), seed=3)


def packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def decode_logits(policy: Policy, tokens: torch.Tensor) -> torch.Tensor:
    """Every token of one sequence in turn, by the absorbed form over a growing latent cache."""
    config = policy.config
    caches = [torch.zeros(1, len(tokens), config.cache_width) for _ in range(config.num_hidden_layers)]
    logits = []
    for t, token in enumerate(tokens):
        tables = policy.rotary.tables(torch.tensor([t]))
        x = policy.model.embed_tokens(token[None])
        for layer, cache in zip(policy.model.layers, caches, strict=True):
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            cache[:, t] = torch.cat(attention.latent(normed, tables), dim=-1)
            q = attention.queries(normed, tables)
            lengths = torch.tensor([t + 1])
            out = absorbed_attention(q, cache, lengths, absorb(attention), scale=attention.scale)
            x = x + attention.o_proj(out)
            update = layer.mlp(layer.post_attention_layernorm(x))
            x = x + (update[0] if isinstance(update, tuple) else update)
        logits.append(policy.lm_head(policy.model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "rope_interleave": False},
        {"rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.8)},
    ],
    ids=["v3", "moonlight_half_rope", "yarn"],
)
def test_absorbed_decode_equals_expanded_forward(changes: dict[str, Any]) -> None:
    policy = small_policy(**changes)
    tokens, cu = packed((13,))
    with torch.no_grad():
        latents: list[torch.Tensor] = []
        out = policy(tokens, cu, 13, latents=latents)
        expanded = policy.lm_head(out.hidden)
        decoded = decode_logits(policy, tokens)
    error = (expanded - decoded).abs().max().item()
    print(f"\nabsorbed against expanded: {error:.1e} (allowed {ALLOWED:.0e})")
    assert error <= ALLOWED
    assert [rows.shape for rows in latents] == [(13, policy.config.cache_width)] * policy.config.num_hidden_layers


def test_absorbed_weights_are_views_that_follow_the_parameter() -> None:
    attention = small_policy().model.layers[0].self_attn
    weights = absorb(attention)
    assert weights.w_uk.shape == (4, 12, 16) and weights.w_uv.shape == (4, 20, 16)
    with torch.no_grad():
        attention.kv_b_proj.weight.fill_(2.0)
    assert (weights.w_uk == 2).all() and (weights.w_uv == 2).all()


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6)], ids=["ragged", "equal"])
def test_packed_equals_one_by_one(lengths: tuple[int, ...]) -> None:
    policy = small_policy()
    tokens, cu = packed(lengths)
    together = policy(tokens, cu, max(lengths))
    alone = [policy(t, torch.tensor([0, len(t)], dtype=torch.int32), len(t)) for t in tokens.split(lengths)]
    assert (together.hidden - torch.cat([out.hidden for out in alone])).abs().max() <= ALLOWED
    assert torch.equal(together.routes, torch.cat([out.routes for out in alone]))
    roomier = policy(tokens, cu, max(lengths) + 3)  # max_seqlen is a bound, not an exact length
    assert (together.hidden - roomier.hidden).abs().max() <= ALLOWED


def gradients(policy: Policy, **options: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    policy.zero_grad()
    tokens, cu = packed()
    hidden, routes = policy(tokens, cu, max(LENGTHS), **options)
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)))
    return hidden.detach(), routes, {k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None}


def test_replaying_own_routes_changes_nothing() -> None:
    policy = small_policy()
    hidden, routes, wanted = gradients(policy)
    assert routes.shape == (sum(LENGTHS), 2, 2) and routes.dtype == torch.int64
    again, used, got = gradients(policy, routes=routes.to(torch.uint8))
    assert torch.equal(hidden, again) and torch.equal(routes, used)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key
    assert got["model.layers.1.mlp.gate.weight"].abs().max() > 0


def test_replayed_routes_are_used() -> None:
    policy = small_policy()
    tokens, cu = packed()
    first = torch.arange(2).expand(sum(LENGTHS), 2, 2)
    out = policy(tokens, cu, max(LENGTHS), routes=first)
    assert torch.equal(out.routes, first)
    assert (out.hidden - policy(tokens, cu, max(LENGTHS)).hidden).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"routes have shape \(20, 1, 2\)"):
        policy(tokens, cu, max(LENGTHS), routes=first[:, :1])


def test_checkpointing_gives_the_same_gradients() -> None:
    policy = small_policy()
    hidden, _, wanted = gradients(policy)
    policy.gradient_checkpointing = True
    again, _, got = gradients(policy)
    assert torch.equal(hidden, again)
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


def choices(kind: str, tokens: int, top_k: int, experts: int) -> torch.Tensor:
    if kind == "all_to_one":
        return torch.full((tokens, 1), experts - 1)
    if kind == "some_unused":
        return torch.tensor([[1, 4]]).expand(tokens, 2)
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4))
    return scores.topk(top_k).indices


@pytest.mark.parametrize("kind", ["random", "all_to_one", "some_unused"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_grouped_experts_equal_the_reference(kind: str, tokens: int) -> None:
    experts = small_policy().model.layers[1].mlp.experts
    assert isinstance(experts, Experts)
    generator = torch.Generator().manual_seed(5)
    chosen = choices(kind, tokens, 3, experts.num_experts)
    x = torch.randn(tokens, 32, generator=generator)
    weights = torch.rand(chosen.shape, generator=generator)
    cotangent = torch.randn(tokens, 32, generator=generator)
    results = []
    for fast in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, weights, experts.gate_up_proj.data, experts.down_proj.data)]
        experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(t.detach()) for t in inputs[2:])
        if fast:
            out = experts(inputs[0], chosen, inputs[1])
            out.backward(cotangent)
            grads = [inputs[0].grad, inputs[1].grad, experts.gate_up_proj.grad, experts.down_proj.grad]
        else:
            out = experts_reference(inputs[0], chosen, inputs[1], inputs[2], inputs[3])
            out.backward(cotangent)
            grads = [t.grad for t in inputs]
        results.append([out.detach(), *grads])
    for got, wanted in zip(*results, strict=True):
        assert got is not None and wanted is not None
        assert (got - wanted).abs().max() <= ALLOWED * max(1.0, wanted.abs().max().item())


def test_experts_of_odd_width_use_the_reference() -> None:
    """moe_intermediate_size 6 in fp32 is 24 bytes: grouped_mm would refuse the strides."""
    policy = small_policy(moe_intermediate_size=6)
    tokens, cu = packed()
    policy(tokens, cu, max(LENGTHS)).hidden.sum().backward()
    assert policy.model.layers[1].mlp.experts.down_proj.grad.abs().max() > 0


def test_double_precision_runs_and_agrees() -> None:
    policy = small_policy()
    tokens, cu = packed()
    single = policy(tokens, cu, max(LENGTHS)).hidden
    double = policy.double()(tokens, cu, max(LENGTHS)).hidden
    assert (single - double).abs().max() <= ALLOWED


def test_a_rollout_before_training_changes_nothing() -> None:
    """What is cached under inference_mode (tables, probes) must serve training afterwards."""
    policy = small_policy()
    tokens, cu = packed()
    with torch.inference_mode():
        policy(tokens, cu, max(LENGTHS))
    _, _, got = gradients(policy)
    _, _, wanted = gradients(small_policy())
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
