"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in two forms over the same weights.

Keys and values of all heads come from one latent c (C numbers per token) and one rotated key shared by the heads
(R numbers): those C + R numbers are the cache row of a token.

- Expanded (`MLA.expanded`): per-head keys and values by `kv_b_proj`, then ordinary attention. Training and prefill.
- Absorbed (`absorbed_attention`): `kv_b_proj` is split into W_UK and W_UV; the query is mapped into the latent space
  and the output back, so that decode reads each cache row once for all heads:
      score = ((q_nope W_UK) . c + q_rope . k_rope) * scale,   o = W_UV (sum_t p_t c_t)

Departs from the hub's code in nothing but layout: tokens are packed (T, ...), and a cached k_rope is in halves layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rl.policy.attention import PackedLayout, attend
from rl.policy.config import PolicyConfig
from rl.policy.norm import RMSNorm
from rl.policy.rope import RotaryTables, rotate, softmax_scale

try:
    from rl.policy import flash, kernels
except ImportError:  # torch without CUDA comes without triton
    flash = kernels = None  # type: ignore[assignment]


class MLA(nn.Module):
    """(T, D) -> (T, D). `scale` multiplies the scores (YaRN's temperature included)."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.num_heads = heads
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_rank = config.kv_lora_rank
        self.interleave = config.rope_interleave
        self.scale = softmax_scale(config)
        self.compresses_queries = config.q_lora_rank is not None
        # The two inner norms keep DeepSeek's default epsilon whatever `rms_norm_eps` says (Moonlight's is 1e-5).
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.cache_width, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_dim, width, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        tables: RotaryTables,
        layout: PackedLayout,
        latents: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x: (T, D). If `latents` is a list, this layer's cache rows (T, C + R) are appended to it."""
        latent, k_rope = self.latent(x, tables)
        if latents is not None:
            latents.append(torch.cat((latent, k_rope), dim=-1))
        prefill = latents is not None
        out = self.expanded(self._project_queries(x), latent, k_rope, tables, layout, prefill=prefill)
        return self.o_proj(out)

    def queries(self, x: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
        """x: (T, D) -> (T, H, nope + R), the last R rotated."""
        return self._rotate_queries(self._project_queries(x), tables)

    def _project_queries(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_queries else self.q_proj(x)
        return q.view(x.shape[0], self.num_heads, -1)

    def _rotate_queries(self, q: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
        nope, rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((nope, rotate(rope, tables, interleave=self.interleave)), dim=-1)

    def latent(self, x: torch.Tensor, tables: RotaryTables) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (T, D) -> normalised latent (T, C) and rotated shared key (T, R); side by side they are the cache row."""
        latent, rope = self.kv_a_proj_with_mqa(x).split((self.latent_rank, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent), rotate(rope, tables, interleave=self.interleave)

    def expanded(
        self,
        q: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        tables: RotaryTables,
        layout: PackedLayout,
        *,
        prefill: bool = False,
    ) -> torch.Tensor:
        """q: (T, H, nope + R) not yet rotated, latent: (T, C), k_rope: (T, R) rotated -> (T, H * v), causal within each
        sequence. prefill: a rollout's, for which a faster kernel may round otherwise than training does (what is
        compared with the update's log-probabilities keeps to the update's kernel)."""
        tokens = latent.shape[0]
        kv = self.kv_b_proj(latent).view(tokens, self.num_heads, -1)
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        if prefill and flash is not None and not torch.is_grad_enabled() and flash.applies(q, k_nope, k_rope, v):
            tiles, scale, interleave = layout.query_tiles, self.scale, self.interleave
            out = flash.flash_mla(q, k_nope, k_rope, v, tiles, scale=scale, tables=tables, interleave=interleave)
            return out.view(tokens, -1)
        if kernels is not None and q.is_cuda:
            width = (max(q.shape[-1], self.v_dim) + 7) // 8 * 8  # what the attention kernel wants
            q, k, v = kernels.AssembleHeads.apply(q, kv, k_rope, *tables, self.nope_dim, width, self.interleave)
        else:
            q = self._rotate_queries(q, tables)
            k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self.num_heads, -1)), dim=-1)
        return attend(q, k, v, layout, scale=self.scale)[..., : self.v_dim].reshape(tokens, -1)


class AbsorbedWeights(NamedTuple):
    """Views of `kv_b_proj.weight`. w_uk: (H, nope, C) maps queries into the latent space, w_uv: (H, v, C) maps back."""

    w_uk: torch.Tensor
    w_uv: torch.Tensor


def absorb(self_attn: MLA) -> AbsorbedWeights:
    """The absorbed form's weights, without a copy: an optimizer step on `kv_b_proj` is seen at once."""
    weight = self_attn.kv_b_proj.weight.view(self_attn.num_heads, -1, self_attn.latent_rank)
    return AbsorbedWeights(weight[:, : self_attn.nope_dim], weight[:, self_attn.nope_dim :])


def absorb_queries(q: torch.Tensor, weights: AbsorbedWeights) -> torch.Tensor:
    """q: (N, H, nope + R) from `MLA.queries` -> (N, H, C + R): its dot product with a cache row is the score."""
    nope = weights.w_uk.shape[1]
    q_latent = torch.bmm(q[..., :nope].transpose(0, 1), weights.w_uk).transpose(0, 1)
    return torch.cat((q_latent, q[..., nope:]), dim=-1)


def expand_outputs(context: torch.Tensor, weights: AbsorbedWeights) -> torch.Tensor:
    """context: (N, H, C), attention-weighted latents -> (N, H * v), the input of `o_proj`."""
    out = torch.bmm(context.transpose(0, 1), weights.w_uv.transpose(1, 2))
    return out.transpose(0, 1).reshape(context.shape[0], -1)


def absorbed_attention(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, weights: AbsorbedWeights, *, scale: float
) -> torch.Tensor:
    """One decode step, the plain reference that faster kernels are compared with.

    q: (N, H, nope + R) from `MLA.queries`. cache: (N, T, C + R), row n valid up to lengths[n] (>= 1, the current
    token's own row included). -> (N, H * v), the input of `o_proj`. Softmax in fp32.
    """
    rank = weights.w_uk.shape[2]
    absorbed = absorb_queries(q, weights)
    scores = torch.bmm(absorbed, cache.transpose(1, 2)).float() * scale
    beyond = torch.arange(cache.shape[1], device=cache.device) >= lengths.unsqueeze(1)
    probabilities = F.softmax(scores.masked_fill(beyond.unsqueeze(1), float("-inf")), dim=-1).to(cache.dtype)
    return expand_outputs(torch.bmm(probabilities, cache[..., :rank]), weights)
