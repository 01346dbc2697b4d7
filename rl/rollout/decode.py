"""One decode step: every row's last token goes through the policy once and its next token is drawn.

MLA in its absorbed form (arXiv:2405.04434, section 2.1.2; see rl.policy.mla for the algebra), experts as the router of the
policy chooses them. `hidden_states` is the torch form; `StepBackend` names it together with the sampler, and the kernels for
CUDA give another pair with the same signatures. Nothing here waits for the device or depends on the host's clock or RNG.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rl.rollout import ops
from rl.rollout.cache import LatentCache
from rl.rollout.ops import AttentionPlan
from rl.rollout.sampling import Sampler
from rl.rollout.state import RowState
from rl.rollout.weights import DecodeWeights, LayerWeights

HiddenFunction = Callable[
    [DecodeWeights, LatentCache, torch.Tensor, torch.Tensor, AttentionPlan], tuple[torch.Tensor, torch.Tensor | None]
]
SampleFunction = Callable[[Sampler, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class StepBackend:
    """hidden(weights, cache, tokens (n,), positions (n,), plan) -> normed hidden (n, D), experts used (n, Lm, K) or None;
    it writes each row's cache row at own_len - 1. sample(sampler, logits (n, V), seeds, steps) -> token, logprob."""

    name: str
    hidden: HiddenFunction
    sample: SampleFunction


def decode_step(
    weights: DecodeWeights, cache: LatentCache, state: RowState, plan: AttentionPlan, sampler: Sampler, backend: StepBackend
) -> None:
    """Advance the rows of `plan` by one token, in place."""
    rows = plan.slot
    tokens = state.token.index_select(0, rows)
    positions = plan.prompt_len + plan.own_len - 1
    hidden, routes = backend.hidden(weights, cache, tokens, positions, plan)
    if routes is not None:
        assert state.out_routes is not None
        place = rows * state.limit + plan.own_len - 1
        state.out_routes.flatten(0, 1).index_copy_(0, place, routes.to(state.out_routes.dtype))
    logits = F.linear(hidden, weights.head)
    drawn, logprobs = backend.sample(sampler, logits, state.seed.index_select(0, rows), plan.own_len)
    state.record(rows, drawn, logprobs)


def hidden_states(
    weights: DecodeWeights, cache: LatentCache, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The torch form of `StepBackend.hidden`."""
    x = F.embedding(tokens, weights.embed)
    turns = weights.turns.index_select(0, positions)
    place = plan.slot * cache.shape.own_tokens + plan.own_len - 1
    used: list[torch.Tensor] = []
    for layer, own, prompt in zip(weights.layers, cache.own, cache.prompt, strict=True):
        x = _attend(x, layer, weights, own, prompt, turns, place, plan)
        x, experts = _feed_forward(x, layer)
        if experts is not None:
            used.append(experts)
    hidden = ops.rms_norm(x, weights.norm.weight, weights.norm.eps)
    return hidden, torch.stack(used, dim=1) if used else None


def _attend(
    x: torch.Tensor,
    layer: LayerWeights,
    weights: DecodeWeights,
    own: torch.Tensor,
    prompt: torch.Tensor,
    turns: torch.Tensor,
    place: torch.Tensor,
    plan: AttentionPlan,
) -> torch.Tensor:
    """x (n, D) -> x + attention(norm(x)); writes the rows' new cache rows first."""
    rank = weights.latent_rank
    normed = ops.rms_norm(x, layer.attention_norm.weight, layer.attention_norm.eps)
    joined = F.linear(normed, layer.joined, layer.joined_bias)
    query, latent = joined[:, : -weights.width], joined[:, -weights.width :]
    ops.write_latent(latent, layer.latent_norm.weight, layer.latent_norm.eps, turns, own, place)
    if layer.query is not None:
        assert layer.query_norm is not None
        query = F.linear(ops.rms_norm(query, layer.query_norm.weight, layer.query_norm.eps), layer.query)
    query = query.unflatten(-1, (weights.heads, -1))
    ops.rotate(query[..., -weights.rope_dims :], turns)
    if layer.absorb_k is not None:
        nope = query[..., : -weights.rope_dims].transpose(0, 1)
        absorbed = torch.bmm(nope, layer.absorb_k).transpose(0, 1)
        query = torch.cat((absorbed, query[..., -weights.rope_dims :]), dim=-1)
    context = ops.attention(query, own, prompt, plan, weights.scale)[..., :rank]
    if layer.absorb_v is not None:
        context = torch.bmm(context.transpose(0, 1), layer.absorb_v).transpose(0, 1)
    context = context.reshape(x.shape[0], -1)
    if layer.output_bias is not None:
        x = x + layer.output_bias
    return torch.addmm(x, context, layer.output.t())


def _feed_forward(x: torch.Tensor, layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (n, D) -> x + mlp(norm(x)), and the experts used (n, K) or None for a dense layer."""
    normed = ops.rms_norm(x, layer.mlp_norm.weight, layer.mlp_norm.eps)
    chosen = None
    if layer.router is not None:
        assert layer.expert_gate_up is not None and layer.expert_down is not None
        chosen, mix = layer.router(normed)
        experts = ops.experts_by_loop if x.device.type == "cpu" else ops.experts_grouped
        x = x + experts(normed, chosen, mix, layer.expert_gate_up, layer.expert_down)
    if layer.dense_gate_up is not None:
        assert layer.dense_down is not None
        x = torch.addmm(x, ops.silu_mul(F.linear(normed, layer.dense_gate_up)), layer.dense_down.t())
    return x, chosen


def draw(
    sampler: Sampler, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The torch form of `StepBackend.sample`."""
    return sampler(logits, seeds, steps)


TORCH_BACKEND = StepBackend("torch", hidden_states, draw)
