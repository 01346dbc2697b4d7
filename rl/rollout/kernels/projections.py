"""The two ends of absorbed attention: queries into the latent space (with RoPE and the cache write), and back out.

`absorb` takes the projected queries and the projected [latent | key] of N new tokens. It writes q (N, H, C + R): q_nope W_UK and
the rotated part, and puts [RMSNorm(latent) | rotated key] into the cache row of the token. `merge_and_expand` weighs the
splits of `attention.attend` by their log-sum-exp and applies W_UV. W_UK (H, nope, C) and W_UV (H, v, C) are views of
kv_b_proj.weight (rows h * (nope + v) ...), no copies. RoPE turns pairs from interleaved or halves layout into halves, as
`rl.policy.rope.rotate`, with the same fp32 tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, dot_precision


@triton.jit
def _absorb_kernel(
    q_ptr,
    kv_ptr,
    kv_b_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    places_ptr,
    out_ptr,
    cache_ptr,
    num_rows,
    q_stride,
    kv_stride,
    slot_stride,
    eps,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_POW2: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    C_POW2: tl.constexpr,
    HALF_POW2: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, h): BLOCK_M tokens of head h; the one after the last head writes these tokens' cache rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    valid = rows < num_rows
    HALF: tl.constexpr = R // 2
    pair = tl.arange(0, HALF_POW2)
    pair_mask = valid[:, None] & (pair < HALF)[None, :]
    position = tl.load(positions_ptr + rows, mask=valid, other=0)
    cos = tl.load(cos_ptr + position.to(tl.int64)[:, None] * HALF + pair[None, :], mask=pair_mask, other=0.0)
    sin = tl.load(sin_ptr + position.to(tl.int64)[:, None] * HALF + pair[None, :], mask=pair_mask, other=0.0)
    if INTERLEAVE:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + HALF

    if head < HEADS:
        source = q_ptr + rows.to(tl.int64)[:, None] * q_stride + head * (NOPE + R)
        target = out_ptr + (rows.to(tl.int64) * HEADS + head)[:, None] * (C + R)
        a = tl.load(source + NOPE + first[None, :], mask=pair_mask, other=0.0).to(tl.float32)
        b = tl.load(source + NOPE + second[None, :], mask=pair_mask, other=0.0).to(tl.float32)
        tl.store(target + C + pair[None, :], (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=pair_mask)
        tl.store(target + C + HALF + pair[None, :], (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=pair_mask)
        dims = tl.arange(0, NOPE_POW2)
        q = tl.load(source + dims[None, :], mask=valid[:, None] & (dims < NOPE)[None, :], other=0.0)
        for start in range(0, C, BLOCK_C):
            wide = start + tl.arange(0, BLOCK_C)
            lines = head * (NOPE + V) + dims
            w_ptrs = kv_b_ptr + lines[:, None] * C + wide[None, :]
            w = tl.load(w_ptrs, mask=(dims < NOPE)[:, None] & (wide < C)[None, :], other=0.0)
            absorbed = tl.dot(q, w, input_precision=PRECISION)
            out_mask = valid[:, None] & (wide < C)[None, :]
            tl.store(target + wide[None, :], absorbed.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        slot = tl.load(slots_ptr + rows, mask=valid, other=0)
        place = tl.load(places_ptr + rows, mask=valid, other=-1)
        kept = valid & (place >= 0)
        source = kv_ptr + rows.to(tl.int64)[:, None] * kv_stride
        target = cache_ptr + slot.to(tl.int64)[:, None] * slot_stride + place.to(tl.int64)[:, None] * (C + R)
        wide = tl.arange(0, C_POW2)
        kept_pairs = kept[:, None] & (pair < HALF)[None, :]
        a = tl.load(source + C + first[None, :], mask=pair_mask, other=0.0).to(tl.float32)
        b = tl.load(source + C + second[None, :], mask=pair_mask, other=0.0).to(tl.float32)
        dtype = cache_ptr.dtype.element_ty
        tl.store(target + C + pair[None, :], (a * cos - b * sin).to(dtype), mask=kept_pairs)
        tl.store(target + C + HALF + pair[None, :], (b * cos + a * sin).to(dtype), mask=kept_pairs)
        latent = tl.load(source + wide[None, :], mask=valid[:, None] & (wide < C)[None, :], other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(latent * latent, 1) / C + eps)
        gain = tl.load(norm_ptr + wide, mask=wide < C, other=0.0).to(tl.float32)
        normed = latent * inverse[:, None] * gain[None, :]
        tl.store(target + wide[None, :], normed.to(dtype), mask=kept[:, None] & (wide < C)[None, :])


@triton.jit
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    kv_b_ptr,
    out_ptr,
    num_rows,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    V_POW2: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, h): BLOCK_M rows of head h: sum over splits of exp(lse_s - lse) * partial_s, then times W_UV^T."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    valid = rows < num_rows
    base = rows.to(tl.int64) * SPLITS * HEADS + head
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(lse_ptr + base + split * HEADS, mask=valid, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.exp(tl.load(lse_ptr + base + split * HEADS, mask=valid, other=float("-inf")) - top)
    total = tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, V_POW2)
    out = tl.zeros((BLOCK_M, V_POW2), tl.float32)
    for start in range(0, C, BLOCK_C):
        wide = start + tl.arange(0, BLOCK_C)
        in_c = (wide < C)[None, :]
        mixed = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for split in tl.static_range(SPLITS):
            lse = tl.load(lse_ptr + base + split * HEADS, mask=valid, other=float("-inf"))
            share = tl.exp(lse - top) / total
            lines = partial_ptr + (base + split * HEADS)[:, None] * C + wide[None, :]
            part = tl.load(lines, mask=(lse > float("-inf"))[:, None] & in_c, other=0.0)
            mixed += share[:, None] * part.to(tl.float32)
        w_ptrs = kv_b_ptr + (head * (NOPE + V) + NOPE + dims)[:, None] * C + wide[None, :]
        w = tl.load(w_ptrs, mask=(dims < V)[:, None] & in_c, other=0.0)
        out = tl.dot(mixed.to(w.dtype), tl.trans(w), out, input_precision=PRECISION)
    out_ptrs = out_ptr + (rows.to(tl.int64) * HEADS + head)[:, None] * V + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dims < V)[None, :])


def absorb(
    q: torch.Tensor,
    kv: torch.Tensor,
    kv_b: torch.Tensor,
    kv_norm: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    cache: torch.Tensor,
    *,
    nope: int,
    interleave: bool,
    eps: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """q: (N, H * (nope + R)) and kv: (N, C + R), rows may be strided (both may be columns of one product). kv_b:
    (H * (nope + v), C); tables: cos and sin (positions, R/2) float32; cache: (slots, T, C + R), of which row
    `places[n]` (none if negative) of slot `slots[n]` is written. -> out (N, H, C + R)."""
    num_rows, heads, width = out.shape
    c = kv_b.shape[1]
    r = width - c
    v = kv_b.shape[0] // heads - nope
    half = r // 2
    block = 16 if num_rows <= 256 else 32
    block_c = min(triton.next_power_of_2(c), 128 if q.dtype != torch.float32 else 32)
    _absorb_kernel[(cdiv(num_rows, block), heads + 1)](
        q, kv, kv_b, kv_norm, tables[0], tables[1], positions, slots, places, out, cache,
        num_rows, q.stride(0), kv.stride(0), cache.stride(0), eps,
        HEADS=heads, NOPE=nope, NOPE_POW2=max(16, triton.next_power_of_2(nope)), V=v, C=c, R=r,
        C_POW2=triton.next_power_of_2(c), HALF_POW2=triton.next_power_of_2(half), INTERLEAVE=interleave,
        BLOCK_M=block, BLOCK_C=max(16, block_c), PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def merge_and_expand(
    partial: torch.Tensor, lse: torch.Tensor, kv_b: torch.Tensor, *, nope: int, out: torch.Tensor
) -> torch.Tensor:
    """partial: (N, S, H, C), lse: (N, S, H) float32 (-inf: skip), kv_b: (H * (nope + v), C) -> out (N, H * v). A row
    without any cached token gives zeros."""
    num_rows, splits, heads, c = partial.shape
    v = kv_b.shape[0] // heads - nope
    exact = partial.dtype == torch.float32
    _merge_kernel[(cdiv(num_rows, 16), heads)](
        partial, lse, kv_b, out, num_rows,
        SPLITS=splits, HEADS=heads, NOPE=nope, V=v, V_POW2=max(16, triton.next_power_of_2(v)), C=c,
        BLOCK_M=16, BLOCK_C=max(16, min(triton.next_power_of_2(c), 32 if exact else 128)),
        PRECISION=dot_precision(partial.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
