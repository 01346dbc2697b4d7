"""The policy's parameters as one decode step reads them.

In: the trainer's policy module, at each `generate`. Out: views of its parameters, plus a few buffers derived from them:
the query and latent projections joined into one matrix, gate and up of dense MLPs joined, and (fp32 only) the absorbed
projections W_UK and W_UV multiplied into their neighbours where the product is not much larger than its factors. In
bf16 the absorption stays two steps, since rounding a product matrix would move the sampler away from the trainer.

`DecodeWeights.derived_bytes` and `.build_s` state the cost. Embedding and output matrix are never copied, experts only
for the C form of small policies on a CPU (`rl.rollout.native.step.pack`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from rl.policy.mla import absorb
from rl.policy.rope import softmax_scale

# A product matrix may be so many times larger than its factors: at small sizes a call costs more than its arithmetic.
_FOLD_UP_TO = 2


@dataclass(slots=True)
class Norm:
    weight: torch.Tensor
    eps: float


@dataclass(slots=True)
class LayerWeights:
    """One layer. Matrices are (out, in). `down` names the query path: x -> `joined` = [query input | latent | rope];
    with query compression the query input is normalised and multiplied by `query`. `absorb_k` (H, nope, C) and
    `absorb_v` (H, C, v) are None when they are multiplied into `query`/`joined` and `output`."""

    attention_norm: Norm
    joined: torch.Tensor
    joined_bias: torch.Tensor | None
    query_norm: Norm | None
    query: torch.Tensor | None
    latent_norm: Norm
    absorb_k: torch.Tensor | None
    absorb_v: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: Norm
    dense_gate_up: torch.Tensor | None  # a dense layer's MLP, or the shared experts
    dense_down: torch.Tensor | None
    router: Any = None
    expert_gate_up: torch.Tensor | None = None
    expert_down: torch.Tensor | None = None
    # Packed for decode.c: joined, query and output; gate_up and down.
    attention_panels: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None
    dense_panels: tuple[torch.Tensor, torch.Tensor] | None = None
    expert_panels: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(slots=True)
class DecodeWeights:
    """Everything a step reads. turns: (positions, R/2) complex64, the rotation of each position."""

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: Norm
    head: torch.Tensor
    heads: int
    latent_rank: int
    rope_dims: int
    scale: float
    turns: torch.Tensor
    derived_bytes: int = 0
    build_s: float = 0.0
    _owned: list[torch.Tensor] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.latent_rank + self.rope_dims


def build_decode_weights(policy: Any, *, positions: int) -> DecodeWeights:
    """Read `policy` (rl.policy.model.Policy) now. positions: longest prompt + completion that the tables must cover."""
    started = time.perf_counter()
    config = policy.config
    rope, embed = policy.rotary, policy.model.embed_tokens.weight
    cos, sin = rope.tables(torch.arange(positions, device=embed.device))
    weights = DecodeWeights(
        embed=embed,
        layers=[],
        norm=_norm(policy.model.norm),
        head=policy.lm_head.weight,
        heads=config.num_attention_heads,
        latent_rank=config.kv_lora_rank,
        rope_dims=config.qk_rope_head_dim,
        scale=softmax_scale(config),
        turns=torch.complex(cos.float(), sin.float()),
    )
    for layer in policy.model.layers:
        weights.layers.append(_layer(layer, config, rope.interleave, weights._owned))
    weights.derived_bytes = sum(t.numel() * t.element_size() for t in weights._owned)
    weights.build_s = time.perf_counter() - started
    return weights


def halves_to_pairs(rope_dims: int, device: torch.device) -> torch.Tensor:
    """Index that turns the policy's rotated layout (x0..., then their partners) into adjacent pairs."""
    return torch.arange(rope_dims, device=device).view(2, -1).t().reshape(-1)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.eps)


def _own(tensor: torch.Tensor, owned: list[torch.Tensor]) -> torch.Tensor:
    owned.append(tensor)
    return tensor


def _layer(layer: Any, config: Any, interleave: bool, owned: list[torch.Tensor]) -> LayerWeights:
    attention = layer.self_attn
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    absorbed = absorb(attention)
    latent, latent_bias = attention.kv_a_proj_with_mqa.weight, attention.kv_a_proj_with_mqa.bias
    compressed = config.q_lora_rank is not None
    query = (attention.q_b_proj if compressed else attention.q_proj).weight
    if not interleave:  # stored in halves: bring partners side by side
        order = halves_to_pairs(rope, latent.device)
        latent = torch.cat((latent[:rank], latent[rank:][order]))
        if latent_bias is not None:
            latent_bias = torch.cat((latent_bias[:rank], latent_bias[rank:][order]))
        by_head = query.view(heads, nope + rope, -1)
        query = torch.cat((by_head[:, :nope], by_head[:, nope:][:, order]), dim=1).reshape_as(query)
    fold = query.dtype == torch.float32
    absorb_k: torch.Tensor | None = absorbed.w_uk
    absorb_v: torch.Tensor | None = absorbed.w_uv.transpose(1, 2)
    if fold and query.shape[1] * rank <= _FOLD_UP_TO * nope * (query.shape[1] + rank):
        by_head = query.view(heads, nope + rope, -1)
        folded = torch.bmm(absorbed.w_uk.transpose(1, 2), by_head[:, :nope])
        query = torch.cat((folded, by_head[:, nope:]), dim=1).reshape(heads * (rank + rope), -1)
        absorb_k = None
    output = attention.o_proj.weight
    if fold and output.shape[0] * rank <= _FOLD_UP_TO * value * (output.shape[0] + rank):
        folded = torch.bmm(output.view(-1, heads, value).transpose(0, 1), absorbed.w_uv)
        output, absorb_v = _own(folded.transpose(0, 1).reshape(-1, heads * rank), owned), None
    if compressed:
        first, bias = attention.q_a_proj.weight, attention.q_a_proj.bias
        if query.untyped_storage().data_ptr() != attention.q_b_proj.weight.untyped_storage().data_ptr():
            _own(query, owned)
    else:
        first, bias = query, None
    joined_bias = None
    if latent_bias is not None:
        joined_bias = torch.cat((bias if bias is not None else latent.new_zeros(first.shape[0]), latent_bias))
    result = LayerWeights(
        attention_norm=_norm(layer.input_layernorm),
        joined=_own(torch.cat((first, latent)), owned),
        joined_bias=joined_bias,
        query_norm=_norm(attention.q_a_layernorm) if compressed else None,
        query=query if compressed else None,
        latent_norm=_norm(attention.kv_a_layernorm),
        absorb_k=absorb_k,
        absorb_v=absorb_v,
        output=output,
        output_bias=attention.o_proj.bias,
        mlp_norm=_norm(layer.post_attention_layernorm),
        dense_gate_up=None,
        dense_down=None,
    )
    _read_mlp(result, layer.mlp, owned)
    return result


def _read_mlp(result: LayerWeights, mlp: Any, owned: list[torch.Tensor]) -> None:
    dense = mlp
    if hasattr(mlp, "experts"):
        result.router = mlp.gate
        result.expert_gate_up, result.expert_down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        dense = mlp.shared_experts
    if dense is not None:
        result.dense_gate_up = _own(torch.cat((dense.gate_proj.weight, dense.up_proj.weight)), owned)
        result.dense_down = dense.down_proj.weight
