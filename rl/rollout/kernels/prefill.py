"""Prompts through an MLA/MoE policy with few launches: about twelve a layer, where the policy's own forward has fifty.

In: packed prompt tokens and where they go. Out: the logits after each prompt's last token, the experts of every token,
and each token's cache row, written straight into the prompt cache. Attention is expanded (keys and values of all
heads), as in training; everything else is the decode step's kernels on the decode step's joined projections.

    combine_norm | joined q and latent projection | write_latents | kv_b | assemble_heads | variable-length attention |
    o_proj | combine_norm | route | experts' gate_up | down

For few tokens this is quicker because the host is: the policy's forward keeps it busy for 2.5 ms a layer, whatever the
number of tokens. For many the device is the limit, and the policy's forward has the better expert products
(`rl.rollout.prefill.LEAN_TOKENS`).

Every tensor that is written belongs to the call (the caching allocator hands the same memory out again), so a call may
run on any stream, beside a decode step. A prompt that runs alone gets the same bits whatever came before it: tiles
follow its own length, and a row's result does not depend on its place in an expert's list.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from rl.policy import attention
from rl.policy.attention import PackedLayout
from rl.policy.kernels import assemble_heads
from rl.rollout.arena import torch_zeros
from rl.rollout.kernels.decoder import FusedDecoder
from rl.rollout.kernels.layout import cdiv, next_power_of_2
from rl.rollout.kernels.moe import ExpertWeights, gated_rows, grouped_experts, sorts_rows
from rl.rollout.kernels.norm import combine_norm
from rl.rollout.kernels.projections import _rotated
from rl.rollout.kernels.router import route, router_scratch
from rl.rollout.kernels.sorting import SortedRows


@triton.jit(do_not_specialize=["num_rows"])
def _write_latents_kernel(
    kv_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    latent_ptr,
    turned_ptr,
    num_rows,
    kv_stride,
    slot_stride,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    C_POW2: tl.constexpr,
    HALF_POW2: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    slot = tl.load(slots_ptr + rows, mask=valid, other=0).to(tl.int64)
    position = tl.load(positions_ptr + rows, mask=valid, other=0).to(tl.int64)
    wide_rows = rows.to(tl.int64)[:, None]
    source = kv_ptr + wide_rows * kv_stride
    line = cache_ptr + (slot * slot_stride + position * (C + R))[:, None]
    dtype = cache_ptr.dtype.element_ty
    wide = tl.arange(0, C_POW2)
    inside = valid[:, None] & (wide < C)[None, :]
    latent = tl.load(source + wide[None, :], mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(norm_ptr + wide, mask=wide < C, other=0.0).to(tl.float32)
    first, second = _rotated(source + C, rows, valid, cos_ptr, sin_ptr, positions_ptr, R, HALF_POW2, INTERLEAVE)
    inverse = tl.rsqrt(tl.sum(latent * latent, 1) / C + eps)
    normed = (latent * inverse[:, None] * gain[None, :]).to(dtype)
    first = first.to(dtype)
    second = second.to(dtype)
    tl.store(line + wide[None, :], normed, mask=inside)
    tl.store(latent_ptr + wide_rows * C + wide[None, :], normed, mask=inside)
    pair = tl.arange(0, HALF_POW2)[None, :]
    mask = valid[:, None] & (pair < R // 2)
    tl.store(line + C + pair, first, mask=mask)
    tl.store(line + C + R // 2 + pair, second, mask=mask)
    tl.store(turned_ptr + wide_rows * R + pair, first, mask=mask)
    tl.store(turned_ptr + wide_rows * R + R // 2 + pair, second, mask=mask)


def write_latents(
    kv: torch.Tensor,
    kv_norm: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    *,
    interleave: bool,
    eps: float,
    latent: torch.Tensor,
    turned: torch.Tensor,
) -> None:
    """kv: (T, C + R) as projected, rows may be strided; tables: cos and sin (positions, R/2) float32; positions, slots:
    (T,) int32 -> RMSNorm of the latent in `latent` (T, C), the rotated key in `turned` (T, R), and both, side by side,
    in row positions[t] of slot slots[t] of cache (slots, T_prompt, C + R)."""
    (num_rows, c), r, block = latent.shape, turned.shape[1], 4
    _write_latents_kernel[(cdiv(num_rows, block),)](
        kv, kv_norm, *tables, positions, slots, cache, latent, turned, num_rows, kv.stride(0), cache.stride(0), eps,
        C=c, R=r, C_POW2=next_power_of_2(c), HALF_POW2=next_power_of_2(r // 2), INTERLEAVE=interleave,
        BLOCK_M=block, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any) -> _Norm:
        return cls(norm.weight.detach(), norm.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's tensors without the look-ups through modules (each takes the host a microsecond), matrices transposed.
    Either dense_gate, dense_up and dense_down are set or router and experts."""

    norm: _Norm
    joined: torch.Tensor
    joined_bias: torch.Tensor | None
    q_norm: _Norm | None
    q_b: torch.Tensor | None
    kv_norm: _Norm
    kv_b: torch.Tensor
    scale: float
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: _Norm
    dense_gate: torch.Tensor | None
    dense_up: torch.Tensor | None
    dense_down: torch.Tensor | None
    router: Any
    experts: ExpertWeights | None

    @classmethod
    def of(cls, layer: Any, joined: torch.Tensor, joined_bias: torch.Tensor | None) -> _Layer:
        """layer: `rl.policy.model.DecoderLayer`; joined, joined_bias: the decoder's."""
        mla, mlp = layer.self_attn, layer.mlp
        routed = hasattr(mlp, "experts")
        return cls(
            norm=_Norm.of(layer.input_layernorm),
            joined=joined.t(),
            joined_bias=joined_bias,
            q_norm=_Norm.of(mla.q_a_layernorm) if mla.compresses_queries else None,
            q_b=mla.q_b_proj.weight.detach().t() if mla.compresses_queries else None,
            kv_norm=_Norm.of(mla.kv_a_layernorm),
            kv_b=mla.kv_b_proj.weight.detach().t(),
            scale=mla.scale,
            output=mla.o_proj.weight.detach().t(),
            output_bias=None if mla.o_proj.bias is None else mla.o_proj.bias.detach(),
            mlp_norm=_Norm.of(layer.post_attention_layernorm),
            dense_gate=None if routed else mlp.gate_proj.weight.detach(),
            dense_up=None if routed else mlp.up_proj.weight.detach(),
            dense_down=None if routed else mlp.down_proj.weight.detach().t(),
            router=mlp.gate if routed else None,
            experts=ExpertWeights.of(mlp) if routed else None,
        )


@dataclass(frozen=True, slots=True)
class _Experts:
    """Scratch of the MoE layers of one call. rows: (T,) int32, 0 to T - 1. records, counts: one per layer; records[i]
    is (T, positions, K), where a token has the same K places at every position."""

    rows: torch.Tensor
    records: Sequence[torch.Tensor]
    counts: Sequence[torch.Tensor]
    weights: torch.Tensor
    lists: torch.Tensor
    scratch: tuple[torch.Tensor, torch.Tensor]
    act: torch.Tensor
    parts: torch.Tensor
    sorted_rows: SortedRows | None


@dataclass(frozen=True, slots=True)
class _Call:
    """What all layers of one call share: where the prompts lie, and scratch. angles: cos and sin of every token, (T,
    R/2) each. heads: q, k, v (T, H, width)."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    layout: PackedLayout | None
    positions: torch.Tensor
    slots: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor]
    latent: torch.Tensor
    turned: torch.Tensor
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dense_act: torch.Tensor | None
    experts: _Experts | None


class FusedPrefill:
    """decoder: lends its joined projections and rotary tables. Like it, this is made once a rollout: it holds the
    addresses of the weights. routes_dtype: of the experts' numbers that are returned."""

    def __init__(self, decoder: FusedDecoder, *, routes_dtype: torch.dtype) -> None:
        self._decoder, self._config, self._routes_dtype = decoder, decoder.config, routes_dtype
        self._device, self._dtype = decoder.device, decoder.dtype
        config = decoder.config
        self._width = cdiv(max(config.qk_head_dim, config.v_head_dim), 8) * 8  # what the attention kernel wants
        self._flash = self._device.type == "cuda" and _flash_works(self._device, self._dtype, self._width)
        self._query_columns = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        self._layers = [_Layer.of(layer.module, layer.joined, layer.joined_bias) for layer in decoder.layers]
        policy = decoder.policy
        self._embed, self._head = policy.model.embed_tokens.weight.detach(), policy.lm_head.weight.detach().t()
        self._final = _Norm.of(policy.model.norm)

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prompt: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens (T,) integers of S prompts, packed; cu_seqlens (S + 1,) int32 and max_seqlen as in `Policy.forward`;
        positions (T,) int32: of each token in its prompt, which is its place in the cache too; slots (T,) int32: the
        prompt slot of each token; prompt: (L, slots, T_prompt, C + R), written -> logits (S, V) of the tokens
        that follow the prompts, experts used (T, Lm, K), None for a policy without any."""
        x = F.embedding(tokens, self._embed)
        routes = self._routes(tokens.shape[0])
        call = self._prepare(cu_seqlens, max_seqlen, positions, slots, routes)
        hidden = torch.empty_like(x)
        parts: torch.Tensor | None = None
        moe_index = 0
        for layer, cache in zip(self._layers, prompt, strict=True):
            combine_norm(x, parts, None, layer.norm.weight, layer.norm.eps, out=hidden)
            attended = self._attention(hidden, layer, cache, call)
            combine_norm(x, attended.unsqueeze(1), None, layer.mlp_norm.weight, layer.mlp_norm.eps, out=hidden)
            if layer.experts is None:
                parts = self._mlp(hidden, layer, call).unsqueeze(1)
            else:
                assert call.experts is not None
                parts = _routed(hidden, layer.router, layer.experts, call, call.experts, moe_index)
                moe_index += 1
        assert parts is not None
        last = cu_seqlens[1:] - 1
        x, parts = x.index_select(0, last), parts.index_select(0, last)
        combine_norm(x, parts, None, self._final.weight, self._final.eps, out=hidden[: x.shape[0]])
        return torch.mm(hidden[: x.shape[0]], self._head), routes

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self._dtype, device=self._device)

    def _routes(self, num_tokens: int) -> torch.Tensor | None:
        moe_layers, top_k = len(self._config.moe_layers), self._config.num_experts_per_tok
        return self._empty(num_tokens, moe_layers, top_k, dtype=self._routes_dtype) if moe_layers else None

    def _prepare(
        self,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        positions: torch.Tensor,
        slots: torch.Tensor,
        routes: torch.Tensor | None,
    ) -> _Call:
        config, num_tokens = self._config, positions.shape[0]
        dense = len(config.moe_layers) < config.num_hidden_layers
        cos, sin = self._decoder.tables
        q, k, v = self._empty(3, num_tokens, config.num_attention_heads, self._width).unbind()
        layout = None
        if not self._flash:
            layout = PackedLayout.of(cu_seqlens, num_tokens=num_tokens, max_seqlen=max_seqlen)
        return _Call(
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            layout=layout,
            positions=positions,
            slots=slots,
            angles=(cos.index_select(0, positions), sin.index_select(0, positions)),
            latent=self._empty(num_tokens, config.kv_lora_rank),
            turned=self._empty(num_tokens, config.qk_rope_head_dim),
            heads=(q, k, v),
            dense_act=self._empty(num_tokens, config.intermediate_size) if dense else None,
            experts=None if routes is None else self._prepare_experts(routes, max_seqlen),
        )

    def _prepare_experts(self, routes: torch.Tensor, max_seqlen: int) -> _Experts:
        config, (num_tokens, moe_layers, top_k), device = self._config, routes.shape, self._device
        slots, experts = top_k + config.n_shared_experts, config.n_routed_experts
        list_stride = cdiv(num_tokens, 16) * 16  # aligned for every T: the router is compiled once
        sorted_rows = None
        matrix = config.hidden_size * config.moe_intermediate_size
        if sorts_rows(num_tokens * top_k / experts, matrix, self._dtype, device):
            sorted_rows = SortedRows.of(
                lambda shape, dtype: self._empty(*shape, dtype=dtype), num_tokens, top_k=top_k, parts=slots - top_k,
                experts=experts, width=config.hidden_size, dtype=self._dtype,
            )  # fmt: skip
        return _Experts(
            rows=torch.arange(num_tokens, dtype=torch.int32, device=device),
            records=routes.unsqueeze(1).expand(-1, max_seqlen, -1, -1).unbind(2),
            counts=torch.zeros(moe_layers, experts, dtype=torch.int32, device=device).unbind(),
            weights=self._empty(num_tokens, top_k, dtype=torch.float32),
            lists=self._empty(experts, list_stride, dtype=torch.int32),
            scratch=router_scratch(num_tokens, experts, torch_zeros(device)),
            act=self._empty(num_tokens * slots, config.moe_intermediate_size),
            parts=self._empty(num_tokens, slots, config.hidden_size),
            sorted_rows=sorted_rows,
        )

    def _attention(self, hidden: torch.Tensor, layer: _Layer, cache: torch.Tensor, call: _Call) -> torch.Tensor:
        """-> (T, D)."""
        config = self._config
        projected = _product(hidden, layer.joined, layer.joined_bias)
        q, kv = projected.split_with_sizes((self._query_columns, config.cache_width), 1)
        write_latents(
            kv, layer.kv_norm.weight, self._decoder.tables, call.positions, call.slots, cache,
            interleave=config.rope_interleave, eps=layer.kv_norm.eps, latent=call.latent, turned=call.turned,
        )  # fmt: skip
        if layer.q_b is not None:
            assert layer.q_norm is not None
            q = torch.mm(F.rms_norm(q, q.shape[1:], layer.q_norm.weight, layer.q_norm.eps), layer.q_b)
        assemble_heads(
            q, torch.mm(call.latent, layer.kv_b), call.turned, *call.angles, call.heads,
            nope=config.qk_nope_head_dim, value=config.v_head_dim, interleave=config.rope_interleave,
        )  # fmt: skip
        if self._flash:
            mixed = _flash_attend(*call.heads, call.cu_seqlens, call.max_seqlen, layer.scale)
        else:
            assert call.layout is not None
            mixed = attention.attend(*call.heads, call.layout, scale=layer.scale)
        if config.v_head_dim != self._width:
            mixed = mixed[..., : config.v_head_dim]
        return _product(mixed.reshape(hidden.shape[0], -1), layer.output, layer.output_bias)

    def _mlp(self, hidden: torch.Tensor, layer: _Layer, call: _Call) -> torch.Tensor:
        """-> (T, D)."""
        assert layer.dense_gate is not None and layer.dense_up is not None and layer.dense_down is not None
        assert call.dense_act is not None
        gated_rows(hidden, layer.dense_gate, layer.dense_up, act=call.dense_act)
        return torch.mm(call.dense_act, layer.dense_down)


def _routed(
    hidden: torch.Tensor, router: Any, experts: ExpertWeights, call: _Call, shared: _Experts, index: int
) -> torch.Tensor:
    """-> parts (T, P, D), whose sum over P is the output of MoE layer `index`; valid until the next layer."""
    counts = shared.counts[index]
    route(
        hidden, router, num_shared=experts.parts, slots=shared.rows, places=call.positions, weights=shared.weights,
        counts=counts, lists=shared.lists, record=shared.records[index], scratch=shared.scratch,
    )  # fmt: skip
    return grouped_experts(
        hidden, experts, shared.weights, counts, shared.lists, act=shared.act, out=shared.parts,
        sorted_rows=shared.sorted_rows,
    )  # fmt: skip


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _flash_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """What `rl.policy.attention.attend` comes to on CUDA, without the Python around the kernel (torch's `varlen_attn`
    is an operator written in Python, with an autograd formula, and fills a tensor of its own). q, k, v: (T, H, width)
    -> (T, H, width)."""
    found = torch.ops.aten._flash_attention_forward.default(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False,
        scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return found[0]


@functools.cache
def _flash_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the operator beneath `varlen_attn` takes this, and gives what `attend` gives: it is not public."""
    if not attention._varlen_works(device, dtype, width):
        return False
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(24, 2, width, device=device, dtype=dtype, generator=generator) for _ in range(3))
    ends = torch.tensor([0, 7, 24], device=device, dtype=torch.int32)
    expected = attention.attend(q, k, v, PackedLayout.of(ends, num_tokens=24, max_seqlen=17), scale=0.3)
    try:
        found = _flash_attend(q, k, v, ends, 17, 0.3)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return torch.equal(found, expected)
