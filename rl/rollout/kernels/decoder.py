"""One decode step of an MLA/MoE policy as about eleven launches a layer, every shape fixed, nothing read on the host.

In: the policy's own parameters, the latent caches, and `StepInputs` (device tensors). Out: logits (N, V) of the next
token; the new tokens' cache rows and expert choices are written in place. Safe to capture in a CUDA graph.

    combine_norm | joined q and latent projection | absorb (+ RoPE, cache write) | attend prompt | attend own
    merge_and_expand | o_proj | combine_norm | route | experts' gate_up | down

The sum over a token's experts and the residual sum are part of the next `combine_norm`; products without a name are
cuBLAS. The only weight-derived buffers are the joined projections (`derived_bytes`), built with the decoder, once a
rollout; everything else is read where it lives.

Tried on an H200 without gain: prompt attention on a second stream; prompt attention as two matrix products (scores,
then values; 138 us against 136 for 256 rows and 4,096 tokens, slower for short prompts); programmatic dependent
launches between the kernels; the first 16 to 48 MB of the experts' matrices fetched into the L2 cache from the norm
before the router (the product takes 6 us less of 183, the norm as much more); a higher priority for the main stream;
the shared experts beside the others' product instead of beside the router; own attention with the latent in quarters
(four short chains of products instead of one: 59.5 us against 59.1 for 1,024 rows); the absorbed queries as cuBLAS'
product of each head (8.8 us of 19.2, but the rest of `absorb` takes 9 on its own; 55,087 tokens/s against 55,263).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rl.rollout.arena import Zeros, torch_zeros
from rl.rollout.kernels.attention import attend, head_block
from rl.rollout.kernels.layout import cdiv
from rl.rollout.kernels.moe import ExpertWeights, gated_rows, grouped_experts, sorts_rows
from rl.rollout.kernels.norm import combine_norm, embed_norm
from rl.rollout.kernels.projections import absorb, merge_and_expand
from rl.rollout.kernels.router import route, router_scratch
from rl.rollout.kernels.sorting import SortedRows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """N rows of one step, all int32 on the device except tokens (int64).

    tokens: fed now. positions: their place in prompt + completion. slots: own cache slot. places: index within it
    where the new cache row goes, -1 for an idle row. own_lengths: own tokens to attend to, the new one included (0:
    idle). prompt_slots, prompt_lengths: the group's prompt. tiles (M, rows_per_tile): rows that share a prompt, -1
    padded; every row that is not idle stands in exactly one tile. """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    own_lengths: torch.Tensor
    prompt_slots: torch.Tensor
    prompt_lengths: torch.Tensor
    tiles: torch.Tensor


@dataclass(slots=True)
class _Layer:
    """module: the policy's layer. joined: [queries | latent and key] projection and its bias."""

    module: Any
    joined: torch.Tensor
    joined_bias: torch.Tensor | None


class FusedDecoder:
    """policy: `rl.policy.model.Policy` on CUDA in bf16 or fp32. max_rows: largest N. positions: longest prompt +
    completion. zeros: where its memory comes from."""

    def __init__(self, policy: Any, *, max_rows: int, positions: int, zeros: Zeros | None = None) -> None:
        self.policy, self.config = policy, policy.config
        self.max_rows = max_rows
        config = self.config
        weight = policy.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.rows_per_tile = rows_per_tile(config.num_attention_heads)
        cos, sin = policy.rotary.tables(torch.arange(positions, device=self.device))
        self._zeros = zeros or torch_zeros(self.device)
        self.tables = (self._zeros(cos.shape, cos.dtype).copy_(cos), self._zeros(sin.shape, sin.dtype).copy_(sin))
        self._allocate()
        started = time.perf_counter()
        self.layers = [self._read_layer(layer) for layer in policy.model.layers]
        self.derived_bytes = sum(layer.joined.numel() * layer.joined.element_size() for layer in self.layers)
        self.build_s = time.perf_counter() - started

    def _allocate(self) -> None:
        config, rows, zeros = self.config, self.max_rows, self._zeros
        width = config.hidden_size

        def empty(*shape: int) -> torch.Tensor:
            return zeros(shape, self.dtype)

        heads, latent = config.num_attention_heads, config.kv_lora_rank
        self._x, self._hidden = empty(rows, width), empty(rows, width)
        self._logits = empty(rows, config.vocab_size)  # outside the graphs' pool, so it goes with the rollout
        self._q = empty(rows, heads, config.cache_width)
        self._mixed = empty(rows, heads * config.v_head_dim)
        splits = (prompt_splits(cdiv(n, self.rows_per_tile)) + own_splits(n) for n in range(1, rows + 1))
        most = max(n * both for n, both in enumerate(splits, start=1))
        self._partial = empty(most * heads * latent)
        self._lse = zeros((most * heads,), torch.float32)
        self.counts: torch.Tensor | None = None
        self._sorted: SortedRows | None = None
        dense, moe = config.intermediate_size, config.moe_layers
        if moe:
            experts, top_k, inner = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
            parts = top_k + config.n_shared_experts
            self.counts = zeros((len(moe), experts), torch.int32)
            self._lists = zeros((experts, rows), torch.int32)
            self._router_scratch = router_scratch(rows, experts, zeros)
            self._weights = zeros((rows, top_k), torch.float32)
            self._act = empty(rows * parts, inner)
            if sorts_rows(rows * top_k / experts, width * inner, self.dtype, self.device):
                self._sorted = SortedRows.of(
                    zeros, rows, top_k=top_k, parts=parts - top_k, experts=experts, width=width, dtype=self.dtype
                )
            dense = max(dense, config.n_shared_experts * inner)
            self._y = empty(rows * parts, width)
        self._dense_act = empty(rows * dense)

    @torch.no_grad()
    def _read_layer(self, layer: Any) -> _Layer:
        attention = layer.self_attn
        first = attention.q_a_proj if attention.compresses_queries else attention.q_proj
        latent = attention.kv_a_proj_with_mqa
        split, width = first.weight.shape
        joined = self._zeros((split + latent.weight.shape[0], width), self.dtype)
        joined[:split].copy_(first.weight)
        joined[split:].copy_(latent.weight)
        bias = None
        if latent.bias is not None:
            bias = self._zeros((joined.shape[0],), self.dtype)
            if first.bias is not None:
                bias[:split].copy_(first.bias)
            bias[split:].copy_(latent.bias)
        return _Layer(layer, joined, bias)

    @torch.no_grad()
    def __call__(
        self,
        inputs: StepInputs,
        own: Sequence[torch.Tensor],
        prompt: Sequence[torch.Tensor],
        record: torch.Tensor | None,
    ) -> torch.Tensor:
        """own, prompt: per layer (slots, T, C + R); record: (slots, T, Lm, K) integers or None -> logits (N, V).

        `counts` must be zero on entry (`rows.begin` clears it). The logits are valid until the next call."""
        num_rows = inputs.tokens.shape[0]
        x, hidden = self._x[:num_rows], self._hidden[:num_rows]
        parts: torch.Tensor | None = None
        shared: torch.Tensor | None = None
        moe_index = 0
        for i, layer in enumerate(self.layers):
            norm = layer.module.input_layernorm
            if i == 0:
                embed_norm(inputs.tokens, self.policy.model.embed_tokens.weight, norm.weight, norm.eps, x=x, out=hidden)
            else:
                combine_norm(x, parts, shared, norm.weight, norm.eps, out=hidden)
            attended = self._attention(hidden, layer, inputs, own[i], prompt[i])
            norm = layer.module.post_attention_layernorm
            combine_norm(x, attended.unsqueeze(1), None, norm.weight, norm.eps, out=hidden)
            if self.config.is_moe_layer(i):
                assert record is not None
                parts, shared = self._experts(hidden, layer.module.mlp, inputs, moe_index, record[:, :, moe_index])
                moe_index += 1
            else:
                parts, shared = self._mlp(hidden, layer.module.mlp).unsqueeze(1), None
        norm = self.policy.model.norm
        combine_norm(x, parts, shared, norm.weight, norm.eps, out=hidden)
        return torch.mm(hidden, self.policy.lm_head.weight.t(), out=self._logits[:num_rows])

    def _attention(
        self, hidden: torch.Tensor, layer: _Layer, inputs: StepInputs, own: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        config, attention, num_rows = self.config, layer.module.self_attn, hidden.shape[0]
        projected = F.linear(hidden, layer.joined, layer.joined_bias)
        first = projected.shape[1] - config.cache_width
        q, kv = projected[:, :first], projected[:, first:]
        if attention.compresses_queries:
            norm = attention.q_a_layernorm
            q = F.linear(F.rms_norm(q, norm.weight.shape, norm.weight, norm.eps), attention.q_b_proj.weight)
        kv_b, kv_norm, nope = attention.kv_b_proj.weight, attention.kv_a_layernorm, config.qk_nope_head_dim
        absorbed = absorb(
            q, kv, kv_b, kv_norm.weight, self.tables, inputs.positions, inputs.slots, inputs.places, own,
            nope=nope, interleave=config.rope_interleave, eps=kv_norm.eps, out=self._q[:num_rows],
        )  # fmt: skip
        from_prompt, from_own = prompt_splits(inputs.tiles.shape[0]), own_splits(num_rows)
        splits, heads, latent = from_prompt + from_own, config.num_attention_heads, config.kv_lora_rank
        partial = self._partial[: num_rows * splits * heads * latent].view(num_rows, splits, heads, latent)
        lse = self._lse[: num_rows * splits * heads].view(num_rows, splits, heads)
        attend(
            absorbed, prompt, inputs.prompt_slots, inputs.prompt_lengths, scale=attention.scale, out=partial, lse=lse,
            first_split=0, splits=from_prompt, tiles=inputs.tiles,
        )  # fmt: skip
        attend(
            absorbed, own, inputs.slots, inputs.own_lengths, scale=attention.scale, out=partial, lse=lse,
            first_split=from_prompt, splits=from_own,
        )  # fmt: skip
        mixed = merge_and_expand(partial, lse, kv_b, nope=nope, out=self._mixed[:num_rows])
        return F.linear(mixed, attention.o_proj.weight, attention.o_proj.bias)

    def _mlp(self, hidden: torch.Tensor, mlp: Any) -> torch.Tensor:
        num_rows, inner = hidden.shape[0], mlp.gate_proj.weight.shape[0]
        act = self._dense_act[: num_rows * inner].view(num_rows, inner)
        gated_rows(hidden, mlp.gate_proj.weight, mlp.up_proj.weight, act=act)
        return F.linear(act, mlp.down_proj.weight)

    def _experts(
        self, hidden: torch.Tensor, moe: Any, inputs: StepInputs, index: int, record: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> parts (N, P, D) of the layer's output, and the shared experts' (N, D) where they ran on their own."""
        assert self.counts is not None
        num_rows, width = hidden.shape
        experts = ExpertWeights.of(moe)
        shared, second = None, None
        if hidden.is_cuda and self._shared_apart(num_rows, experts.parts):
            main, second = torch.cuda.current_stream(), second_stream(self.device)
            second.wait_stream(main)
            with torch.cuda.stream(second):
                shared = self._mlp(hidden, moe.shared_experts)
            experts = ExpertWeights(experts.gate_up, experts.down)
        weights, counts = self._weights[:num_rows], self.counts[index]
        route(
            hidden, moe.gate, num_shared=experts.parts, slots=inputs.slots, places=inputs.places, weights=weights,
            counts=counts, lists=self._lists, record=record, scratch=self._router_scratch,
        )  # fmt: skip
        slots = weights.shape[1] + experts.parts
        parts = self._y[: num_rows * slots].view(num_rows, slots, width)
        grouped_experts(
            hidden, experts, weights, counts, self._lists, act=self._act, out=parts, sorted_rows=self._sorted
        )
        if second is not None:
            main.wait_stream(second)
        return parts, shared

    def _shared_apart(self, num_rows: int, parts: int) -> bool:
        """Whether the shared experts run beside the others: where their narrow tiles would be a fifth of all, and the
        step is bandwidth, not arithmetic (5 % faster for 256 rows of a Moonlight, slower for 64, 1,024 or a 1.6B)."""
        return num_rows < 512 and 5 * parts * cdiv(num_rows, 32) >= self.config.n_routed_experts


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: the allocator keeps free blocks, and cuBLAS its workspace, by stream."""
    return torch.cuda.Stream(device)


def rows_per_tile(heads: int) -> int:
    """Rows of a group that one program of prompt attention takes: up to 64 query rows (rows x heads)."""
    return max(1, 64 // head_block(heads, 1))


def own_splits(num_rows: int) -> int:
    """Splits of each row's own completion: enough programs for 132 multiprocessors, two each."""
    return _power_of_two(min(8, 192 // num_rows))


def prompt_splits(tiles: int) -> int:
    """Splits of a prompt that so many tiles attend to: one program a multiprocessor."""
    return _power_of_two(min(4, 132 // tiles))


def _power_of_two(most: int) -> int:
    """The largest that is at most `most`; 1 for less: few different values, so few kernels to compile."""
    return 1 << (max(1, most).bit_length() - 1)


def prompt_tiles(groups: Sequence[Sequence[int]], per_tile: int, num_tiles: int) -> list[list[int]]:
    """The `tiles` table: groups of rows that share a prompt, cut into tiles of at most `per_tile`, padded with -1 to
    `num_tiles` tiles. [[0, 1, 2], [3]] with per_tile 2 -> [[0, 1], [2, -1], [3, -1], ...]."""
    tiles = []
    for rows in groups:
        for start in range(0, len(rows), per_tile):
            part = list(rows[start : start + per_tile])
            tiles.append(part + [-1] * (per_tile - len(part)))
    if len(tiles) > num_tiles:
        raise ValueError(f"{len(tiles)} tiles of rows that share a prompt, but the table holds {num_tiles}")
    return tiles + [[-1] * per_tile] * (num_tiles - len(tiles))
