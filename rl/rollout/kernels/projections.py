"""The two ends of absorbed attention: queries into the latent space (with RoPE and the cache write), and back out.

`absorb` takes the projected queries and the projected [latent | key] of N new tokens. It writes q (N, H, C + R):
q_nope W_UK and the rotated part, and puts [RMSNorm(latent) | rotated key] into the cache row of the token.
`merge_and_expand` weighs the splits of `attention.attend` by their log-sum-exp and applies W_UV. W_UK (H, nope, C)
and W_UV (H, v, C) are views of kv_b_proj.weight (rows h * (nope + v) ...), no copies. RoPE turns pairs from
interleaved or halves layout into halves, as `rl.policy.rope.rotate`, with the same fp32 tables. """

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, dot_precision, next_power_of_2


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: tokens of a program (BLOCK_M). latent: latent columns at a time (BLOCK_C)."""

    rows: int
    latent: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["num_rows"])
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
    CACHE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first programs write the cache rows of CACHE_ROWS tokens each; of the others each does BLOCK_M tokens of
    one head, either BLOCK_C of its latent columns or its rotated part."""
    cache_programs = (num_rows + CACHE_ROWS - 1) // CACHE_ROWS
    program = tl.program_id(0)
    if program < cache_programs:
        _write_cache_rows(
            program, kv_ptr, norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, places_ptr, cache_ptr,
            num_rows, kv_stride, slot_stride, eps, C, R, C_POW2, HALF_POW2, INTERLEAVE, CACHE_ROWS,
        )  # fmt: skip
        return
    program -= cache_programs
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunk = program % (CHUNKS + 1)
    head = (program // (CHUNKS + 1)) % HEADS
    rows = program // ((CHUNKS + 1) * HEADS) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    source = q_ptr + rows.to(tl.int64)[:, None] * q_stride + head * (NOPE + R)
    target = out_ptr + (rows.to(tl.int64) * HEADS + head)[:, None] * (C + R)
    if chunk < CHUNKS:
        dims = tl.arange(0, NOPE_POW2)
        q = tl.load(source + dims[None, :], mask=valid[:, None] & (dims < NOPE)[None, :], other=0.0)
        wide = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        w_ptrs = kv_b_ptr + (head * (NOPE + V) + dims)[:, None] * C + wide[None, :]
        w = tl.load(w_ptrs, mask=(dims < NOPE)[:, None] & (wide < C)[None, :], other=0.0)
        absorbed = tl.dot(q, w, input_precision=PRECISION).to(out_ptr.dtype.element_ty)
        tl.store(target + wide[None, :], absorbed, mask=valid[:, None] & (wide < C)[None, :])
    else:
        first, second = _rotated(
            source + NOPE, rows, valid, cos_ptr, sin_ptr, positions_ptr, R, HALF_POW2, INTERLEAVE
        )
        pair = tl.arange(0, HALF_POW2)
        mask = valid[:, None] & (pair < R // 2)[None, :]
        tl.store(target + C + pair[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + C + R // 2 + pair[None, :], second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(
    source, rows, valid, cos_ptr, sin_ptr, positions_ptr,
    R: tl.constexpr, HALF_POW2: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """The two halves (rows, R/2) of a rotated head whose R numbers start at `source`, in fp32."""
    HALF: tl.constexpr = R // 2
    pair = tl.arange(0, HALF_POW2)[None, :]
    mask = valid[:, None] & (pair < HALF)
    position = tl.load(positions_ptr + rows, mask=valid, other=0).to(tl.int64)[:, None]
    if INTERLEAVE:
        a = tl.load(source + 2 * pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        a = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + pair, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + pair, mask=mask, other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _write_cache_rows(
    program, kv_ptr, norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, places_ptr, cache_ptr,
    num_rows, kv_stride, slot_stride, eps,
    C: tl.constexpr, R: tl.constexpr, C_POW2: tl.constexpr, HALF_POW2: tl.constexpr, INTERLEAVE: tl.constexpr,
    CACHE_ROWS: tl.constexpr,
):  # fmt: skip
    rows = program * CACHE_ROWS + tl.arange(0, CACHE_ROWS)
    valid = rows < num_rows
    slot = tl.load(slots_ptr + rows, mask=valid, other=0).to(tl.int64)
    place = tl.load(places_ptr + rows, mask=valid, other=-1).to(tl.int64)
    kept = valid & (place >= 0)
    source = kv_ptr + rows.to(tl.int64)[:, None] * kv_stride
    target = cache_ptr + (slot * slot_stride + place * (C + R))[:, None]
    dtype = cache_ptr.dtype.element_ty
    wide = tl.arange(0, C_POW2)
    latent = tl.load(source + wide[None, :], mask=valid[:, None] & (wide < C)[None, :], other=0.0).to(tl.float32)
    gain = tl.load(norm_ptr + wide, mask=wide < C, other=0.0).to(tl.float32)
    first, second = _rotated(source + C, rows, valid, cos_ptr, sin_ptr, positions_ptr, R, HALF_POW2, INTERLEAVE)
    inverse = tl.rsqrt(tl.sum(latent * latent, 1) / C + eps)
    normed = latent * inverse[:, None] * gain[None, :]
    tl.store(target + wide[None, :], normed.to(dtype), mask=kept[:, None] & (wide < C)[None, :])
    pair = tl.arange(0, HALF_POW2)
    mask = kept[:, None] & (pair < R // 2)[None, :]
    tl.store(target + C + pair[None, :], first.to(dtype), mask=mask)
    tl.store(target + C + R // 2 + pair[None, :], second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    kv_b_ptr,
    out_ptr,
    num_rows,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
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
    split_ids = tl.arange(0, SPLITS_POW2)
    lse_mask = valid[:, None] & (split_ids < SPLITS)[None, :]
    lse = tl.load(lse_ptr + base[:, None] + split_ids[None, :] * HEADS, mask=lse_mask, other=float("-inf"))
    top = tl.max(lse, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp(lse - top[:, None])
    total = tl.sum(shares, 1)
    shares = shares / tl.where(total == 0.0, 1.0, total)[:, None]
    dims = tl.arange(0, V_POW2)
    out = tl.zeros((BLOCK_M, V_POW2), tl.float32)
    for start in range(0, C, BLOCK_C):
        wide = start + tl.arange(0, BLOCK_C)
        in_c = (wide < C)[None, :]
        mixed = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for split in tl.static_range(SPLITS):
            share = tl.sum(tl.where(split_ids[None, :] == split, shares, 0.0), 1)
            lines = partial_ptr + (base + split * HEADS)[:, None] * C + wide[None, :]
            # A split without tokens left its result unwritten: it may hold anything, NaN included.
            part = tl.load(lines, mask=(share > 0.0)[:, None] & in_c, other=0.0)
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
    tile: Tile | None = None,
) -> torch.Tensor:
    """q: (N, H * (nope + R)) and kv: (N, C + R), rows may be strided (both may be columns of one product). kv_b:
    (H * (nope + v), C); tables: cos and sin (positions, R/2) float32; cache: (slots, T, C + R), of which row
    `places[n]` (none if negative) of slot `slots[n]` is written. -> out (N, H, C + R)."""
    num_rows, heads, width = out.shape
    c = kv_b.shape[1]
    r = width - c
    v = kv_b.shape[0] // heads - nope
    tile = tile or absorb_tile(num_rows, q.dtype)
    block, block_c = tile.rows, max(16, min(next_power_of_2(c), tile.latent))
    cache_rows = 4
    grid = (cdiv(num_rows, cache_rows) + cdiv(num_rows, block) * heads * (cdiv(c, block_c) + 1),)
    _absorb_kernel[grid](
        q, kv, kv_b, kv_norm, tables[0], tables[1], positions, slots, places, out, cache,
        num_rows, q.stride(0), kv.stride(0), cache.stride(0), eps,
        HEADS=heads, NOPE=nope, NOPE_POW2=max(16, next_power_of_2(nope)), V=v, C=c, R=r,
        C_POW2=next_power_of_2(c), HALF_POW2=next_power_of_2(r // 2), INTERLEAVE=interleave,
        BLOCK_M=block, BLOCK_C=block_c, CACHE_ROWS=cache_rows, PRECISION=dot_precision(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def merge_and_expand(
    partial: torch.Tensor,
    lse: torch.Tensor,
    kv_b: torch.Tensor,
    *,
    nope: int,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """partial: (N, S, H, C), lse: (N, S, H) float32 (-inf: skip), kv_b: (H * (nope + v), C) -> out (N, H * v). A row
    without any cached token gives zeros."""
    num_rows, splits, heads, c = partial.shape
    v = kv_b.shape[0] // heads - nope
    tile = tile or merge_tile(num_rows, partial.dtype)
    _merge_kernel[(cdiv(num_rows, tile.rows), heads)](
        partial, lse, kv_b, out, num_rows,
        SPLITS=splits, SPLITS_POW2=next_power_of_2(splits), HEADS=heads, NOPE=nope,
        V=v, V_POW2=max(16, next_power_of_2(v)), C=c,
        BLOCK_M=tile.rows, BLOCK_C=max(16, min(next_power_of_2(c), tile.latent)),
        PRECISION=dot_precision(partial.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def absorb_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    """The measured best of the first half."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1)
    return Tile(64, 256, 8, 1) if num_rows >= 128 else Tile(16, 128, 4, 1)


def merge_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    """The measured best of the second half; taller blocks read W_UV less often."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 2)
    return Tile(64, 64, 8, 3) if num_rows >= 512 else Tile(16, 64, 4, 3)
