"""The decode step of `rl.rollout.decode.hidden_states` with its elementwise parts and attention in C.

Matrix products stay with torch. Needs fp32 on the CPU and absorbed projections that were multiplied into their
neighbours (`takes`); others decode with plain torch. Every row is computed in an order that only its own lengths
decide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rl.rollout.cache import LatentCache
from rl.rollout.native.library import NativeDecode
from rl.rollout.ops import MIN_MATMUL_ROWS, AttentionPlan, rows_by_expert
from rl.rollout.weights import DecodeWeights, LayerWeights


def takes(weights: DecodeWeights) -> bool:
    embed = weights.embed
    folded = all(layer.absorb_k is None and layer.absorb_v is None for layer in weights.layers)
    return folded and embed.dtype == torch.float32 and embed.device.type == "cpu"


def hidden_states(
    native: NativeDecode,
    weights: DecodeWeights,
    cache: LatentCache,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    plan: AttentionPlan,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `rl.rollout.decode.hidden_states`, for rows that stand at the slot of their number."""
    x = F.embedding(tokens, weights.embed)
    turns = weights.turns.index_select(0, positions)
    place = plan.own_len - 1
    used: list[torch.Tensor] = []
    for layer, own, prompt in zip(weights.layers, cache.own, cache.prompt, strict=True):
        normed = native.rms_norm(x, layer.attention_norm.weight, layer.attention_norm.eps)
        joined = F.linear(normed, layer.joined, layer.joined_bias)
        query_norm = None if layer.query_norm is None else (layer.query_norm.weight, layer.query_norm.eps)
        query = native.split_joined(
            joined, query_norm, (layer.latent_norm.weight, layer.latent_norm.eps), turns, own, place
        )
        if layer.query is not None:
            query = F.linear(query, layer.query)
        context = native.attend(
            query.view(x.shape[0], weights.heads, -1), turns, own, plan.own_len, prompt, plan.prompt_slot,
            plan.prompt_len, rank=weights.latent_rank, scale=weights.scale,
        )  # fmt: skip
        if layer.output_bias is not None:
            x = x + layer.output_bias
        x = torch.addmm(x, context.flatten(1), layer.output.t())
        x, experts = _feed_forward(native, x, layer)
        if experts is not None:
            used.append(experts)
    hidden = native.rms_norm(x, weights.norm.weight, weights.norm.eps)
    return hidden, torch.stack(used, dim=1) if used else None


def _feed_forward(
    native: NativeDecode, x: torch.Tensor, layer: LayerWeights
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (n, D) -> x + mlp(norm(x)), and the experts used (n, K) or None for a dense layer."""
    normed = native.rms_norm(x, layer.mlp_norm.weight, layer.mlp_norm.eps)
    if layer.dense_gate_up is not None:
        assert layer.dense_down is not None
        x = torch.addmm(x, native.silu_mul(F.linear(normed, layer.dense_gate_up)), layer.dense_down.t())
    if layer.router is None:
        return x, None
    assert layer.expert_gate_up is not None and layer.expert_down is not None
    chosen, mix = layer.router(normed)
    rows, offsets, place, fewest = native.gather_by_expert(
        normed, chosen, layer.expert_gate_up.shape[0], spare=MIN_MATMUL_ROWS
    )
    choices = chosen.numel()
    hidden = native.silu_mul(rows_by_expert(rows, layer.expert_gate_up, offsets, choices=choices, fewest=fewest))
    parts = rows_by_expert(hidden, layer.expert_down, offsets, choices=choices, fewest=fewest)
    return native.add_experts(x, parts, place, mix), chosen
