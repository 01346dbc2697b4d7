"""The decode step of `rl.rollout.decode.hidden_states` in C.

With AVX-512, layers whose matrices are small and whole panels wide (`pack`) are computed in C altogether; of others the
matrix products stay with torch. Needs fp32 on the CPU and absorbed projections that were multiplied into their
neighbours (`takes`); others decode with plain torch. Every row is computed in an order that only its own lengths
decide.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from rl.rollout.cache import LatentCache
from rl.rollout.native.library import NativeDecode
from rl.rollout.ops import MIN_MATMUL_ROWS, AttentionPlan, rows_by_expert
from rl.rollout.weights import DecodeWeights, LayerWeights

PACKED_MOST = 2**28  # bytes of matrices that are copied for decode.c; of larger policies there is one copy only


def takes(weights: DecodeWeights) -> bool:
    embed = weights.embed
    folded = all(layer.absorb_k is None and layer.absorb_v is None for layer in weights.layers)
    return folded and embed.dtype == torch.float32 and embed.device.type == "cpu"


def pack(native: NativeDecode, weights: DecodeWeights) -> None:
    """Have layers computed by decode.c as far as they are small and whole panels wide."""
    started = time.perf_counter()
    for layer in weights.layers:
        matrices = (
            layer.joined, layer.query, layer.output, layer.dense_gate_up, layer.dense_down, layer.expert_gate_up,
            layer.expert_down,
        )  # fmt: skip
        if sum(matrix.nbytes for matrix in matrices if matrix is not None) > PACKED_MOST // len(weights.layers):
            continue
        joined, query, output, dense_gate_up, dense_down, gate_up, down = map(native.panels, matrices)
        biased = layer.joined_bias is not None or layer.output_bias is not None
        if joined is not None and output is not None and (query is None) == (layer.query is None) and not biased:
            layer.attention_panels = (joined, query, output)
        if dense_gate_up is not None and dense_down is not None:
            layer.dense_panels = (dense_gate_up, dense_down)
        if gate_up is not None and down is not None:
            layer.expert_panels = (gate_up, down)
        for panels in (layer.attention_panels, layer.dense_panels, layer.expert_panels):
            weights.derived_bytes += sum(part.nbytes for part in panels or () if part is not None)
    weights.build_s += time.perf_counter() - started


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
    used: list[torch.Tensor] = []
    for layer, own, prompt in zip(weights.layers, cache.own, cache.prompt, strict=True):
        if layer.attention_panels is not None:
            native.attention(x, layer, weights, turns, own, prompt, plan)
        else:
            x = _attend(native, x, layer, weights, turns, own, prompt, plan)
        x, experts = _feed_forward(native, x, layer)
        if experts is not None:
            used.append(experts)
    hidden = native.rms_norm(x, weights.norm.weight, weights.norm.eps)
    return hidden, torch.stack(used, dim=1) if used else None


def _attend(
    native: NativeDecode, x: torch.Tensor, layer: LayerWeights, weights: DecodeWeights, turns: torch.Tensor,
    own: torch.Tensor, prompt: torch.Tensor, plan: AttentionPlan,
) -> torch.Tensor:  # fmt: skip
    """x (n, D) -> x + attention(norm(x)); writes the rows' new cache rows first."""
    normed = native.rms_norm(x, layer.attention_norm.weight, layer.attention_norm.eps)
    joined = F.linear(normed, layer.joined, layer.joined_bias)
    query_norm = None if layer.query_norm is None else (layer.query_norm.weight, layer.query_norm.eps)
    query = native.split_joined(
        joined, query_norm, (layer.latent_norm.weight, layer.latent_norm.eps), turns, own, plan.own_len - 1
    )
    if layer.query is not None:
        query = F.linear(query, layer.query)
    context = native.attend(
        query.view(x.shape[0], weights.heads, -1), turns, own, plan.own_len, prompt, plan.prompt_slot,
        plan.prompt_len, rank=weights.latent_rank, scale=weights.scale,
    )  # fmt: skip
    if layer.output_bias is not None:
        x = x + layer.output_bias
    return torch.addmm(x, context.flatten(1), layer.output.t())


def _feed_forward(
    native: NativeDecode, x: torch.Tensor, layer: LayerWeights
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (n, D) -> x + mlp(norm(x)), and the experts used (n, K) or None for a dense layer."""
    normed = native.rms_norm(x, layer.mlp_norm.weight, layer.mlp_norm.eps)
    if layer.dense_panels is not None:
        native.dense_mlp(x, normed, *layer.dense_panels)
    elif layer.dense_gate_up is not None:
        assert layer.dense_down is not None
        x = torch.addmm(x, native.silu_mul(F.linear(normed, layer.dense_gate_up)), layer.dense_down.t())
    if layer.router is None:
        return x, None
    chosen, mix = native.route(normed, layer.router)
    if layer.expert_panels is not None:
        native.experts(x, normed, chosen, mix, *layer.expert_panels)
        return x, chosen
    assert layer.expert_gate_up is not None and layer.expert_down is not None
    rows, offsets, place, fewest = native.gather_by_expert(
        normed, chosen, layer.expert_gate_up.shape[0], spare=MIN_MATMUL_ROWS
    )
    choices = chosen.numel()
    hidden = native.silu_mul(rows_by_expert(rows, layer.expert_gate_up, offsets, choices=choices, fewest=fewest))
    parts = rows_by_expert(hidden, layer.expert_down, offsets, choices=choices, fewest=fewest)
    return native.add_experts(x, parts, place, mix), chosen
