"""Rotary position embedding of MLA's decoupled dimensions (arXiv:2104.09864, arXiv:2405.04434), with YaRN (2309.00071).

In: positions. Out: tables of cos and sin, fp32, one angle per pair; `rotate` applies them. Checkpoints store a rotated
head either interleaved (pairs x0 x1, x2 x3, ..., DeepSeek's own layout) or in halves (x0 pairs with x[R/2]). The
result is always in halves: queries and keys agree and only their dot products are used, and it is what the latent
cache stores.

Departs from transformers in keeping the tables in fp32 when the model is bf16, where it rounds every cosine to 8 bits.
"""

from __future__ import annotations

import math

import torch

from rl.policy.config import PolicyConfig, YarnScaling

RotaryTables = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding:
    """Frequencies of one policy. Not a module: it has no state to save, and casting the policy must not touch it."""

    def __init__(self, config: PolicyConfig) -> None:
        self.interleave = config.rope_interleave
        self.inv_freq, self.table_scale = _frequencies(config)
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def tables(self, positions: torch.Tensor) -> RotaryTables:
        """positions: (T,) integers -> cos, sin: (T, R/2) float32, YaRN's temperature included."""
        inv_freq = self._on_device.get(positions.device)
        if inv_freq is None:
            with torch.inference_mode(False):  # the first caller may be a rollout; training uses the same tensor
                inv_freq = self._on_device[positions.device] = self.inv_freq.to(positions.device)
        angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
        if self.table_scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.table_scale, angles.sin() * self.table_scale


def rotate(x: torch.Tensor, tables: RotaryTables, *, interleave: bool) -> torch.Tensor:
    """x: (T, R) or (T, H, R) as projected -> same shape and dtype, rotated, in halves layout."""
    cos, sin = tables
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleave:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def softmax_scale(config: PolicyConfig) -> float:
    """(nope + R) ** -1/2, times YaRN's mscale_all_dim temperature squared."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _frequencies(config: PolicyConfig) -> tuple[torch.Tensor, float]:
    """-> inverse frequencies (R/2,) float32 on the CPU, and the factor on cos and sin."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / dim
    plain = 1.0 / (base**exponents)
    yarn = config.rope_scaling
    if yarn is None:
        return plain, 1.0
    low, high = _correction_range(yarn, dim, base)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    extrapolate = 1.0 - ramp.clamp(0, 1)
    stretched = 1.0 / (yarn.factor * base**exponents)
    inv_freq = stretched * (1 - extrapolate) + plain * extrapolate
    if yarn.attention_factor is not None:
        return inv_freq, yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return inv_freq, _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return inv_freq, _mscale(yarn.factor)


def _correction_range(yarn: YarnScaling, dim: int, base: float) -> tuple[float, float]:
    """The pairs between which YaRN goes over from extrapolation to interpolation (2309.00071, section 3.2)."""

    def pair_of(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
