"""Absorbed-MLA decode attention over latent caches, split over the context (arXiv:2405.04434, section 2.1; the split
and its merge as in Flash-Decoding).

In: queries already mapped into the latent space, q (N, H, C + R), and caches whose rows are [normalised latent C |
rotated key R], which serve as keys (all of it) and as values (the first C). Out: partial results of each split, (N,
S, H, C) in the dtype of q and their log-sum-exp (N, S, H) float32, base e; `projections.merge_and_expand` weighs them
together, so a softmax over the group's prompt and the row's own completion is one softmax.

A program handles one tile: up to `rows_per_tile` rows that attend to the same cached tokens, times their heads, against
one split of these tokens. Own completions: one row a tile. A group's prompt: several rows a tile, so that the
prompt is read once for all of them. Which rows form a tile is a device table, so grids have fixed size for CUDA graphs:

    tiles (tiles, rows_per_tile) int32: row numbers, -1 where there is none; None means tile i holds row i alone
    slots (N,) int32: cache slot of each row (rows of one tile have the same)      lengths (N,) int32: cached tokens

Splits divide each row's own length evenly (in whole blocks), so they are balanced whatever the length; a split beyond
the end writes -inf as its log-sum-exp and leaves its result untouched. With `split_tokens` instead, a split has a
fixed size: results then do not depend on how many splits the batch affords (batch-invariant mode). """

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rl.rollout.kernels.layout import cdiv, dot_precision, next_power_of_2

try:
    from rl.rollout.kernels import hopper_attention
except ImportError:  # a Triton without Gluon, or another one than it was written for
    hopper_attention = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """tokens: cached tokens of one inner block."""

    tokens: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["splits", "first_split", "all_splits"])
def _attend_kernel(
    q_ptr,
    cache_ptr,
    latent_desc,
    turned_desc,
    tiles_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    slot_tokens,
    split_tokens,
    splits,
    first_split,
    all_splits,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    C_POW2: tl.constexpr,
    R_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    BLOCK_M: tl.constexpr = ROWS * BLOCK_H
    member = tl.arange(0, BLOCK_M)
    heads = tl.program_id(2) * BLOCK_H + member % BLOCK_H
    if tiles_ptr is None:
        first_row = tile
        rows = tile + member // BLOCK_H
        present = member // BLOCK_H == 0
    else:
        first_row = tl.load(tiles_ptr + tile * ROWS)
        if first_row < 0:
            return
        rows = tl.load(tiles_ptr + tile * ROWS + member // BLOCK_H)
        present = rows >= 0
    present = present & (heads < HEADS)
    # Every load that the next one does not need is issued before the first branch: at short contexts latency is all.
    length = tl.load(lengths_ptr + first_row)
    slot = tl.load(slots_ptr + first_row)
    wide = tl.arange(0, C_POW2)
    turn = tl.arange(0, R_POW2)
    q_base = q_ptr + (rows.to(tl.int64) * HEADS + heads)[:, None] * (C + R)
    in_c = (wide < C)[None, :]
    in_r = (turn < R)[None, :]
    q_latent = tl.load(q_base + wide[None, :], mask=present[:, None] & in_c, other=0.0)
    q_turned = tl.load(q_base + C + turn[None, :], mask=present[:, None] & in_r, other=0.0)
    if split_tokens == 0:
        per_split = ((length + splits - 1) // splits + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    else:
        per_split = split_tokens
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    if (split == splits - 1) & (split_tokens > 0):
        end = length
    result = (rows.to(tl.int64) * all_splits + first_split + split) * HEADS + heads
    if begin >= end:
        tl.store(lse_ptr + result, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=present)
        return
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, C_POW2), tl.float32)
    token = tl.arange(0, BLOCK_T)
    for start in range(begin, end, BLOCK_T):
        if latent_desc is None:
            cached = (start + token < end)[:, None]
            lines = cache_ptr + (slot.to(tl.int64) * slot_tokens + start + token)[:, None] * (C + R)
            latent = tl.load(lines + wide[None, :], mask=cached & in_c, other=0.0)
            turned = tl.load(lines + C + turn[None, :], mask=cached & in_r, other=0.0)
        else:
            # Tokens beyond the end, and columns beyond C or R, hold other (finite) cache rows or zeros: they meet
            # weight 0, a query of 0, or are not stored.
            latent = latent_desc.load([slot * slot_tokens + start, 0])
            turned = turned_desc.load([slot * slot_tokens + start, C])
        score = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        score = tl.dot(q_turned, tl.trans(turned), score, input_precision=PRECISION)
        score = tl.where((start + token < end)[None, :], score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(latent.dtype), latent, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    acc = acc / total[:, None]
    out_ptrs = out_ptr + result[:, None] * C + wide[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=present[:, None] & in_c)
    tl.store(lse_ptr + result, (top + tl.log2(total)) * 0.6931471805599453, mask=present)


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    first_split: int,
    splits: int,
    tiles: torch.Tensor | None = None,
    split_tokens: int = 0,
    tile: AttentionTile | None = None,
) -> None:
    """q: (N, H, C + R); cache: (slots, T, C + R), contiguous; out: (N, S, H, C) and lse: (N, S, H), of which
    splits first_split .. first_split + splits - 1 are written for every row that a tile names."""
    num_rows, heads, width = q.shape
    latent_width = out.shape[-1]
    per_tile = 1 if tiles is None else tiles.shape[1]
    block_h = head_block(heads, per_tile)
    block_m = block_h * per_tile
    hopper = hopper_attention if tiles is not None and tile is None else None
    if tiles is not None and hopper is not None and hopper.fits(q, latent_width, block_m):
        hopper.attend_tiles(
            q, cache, slots, lengths, tiles, scale=scale, out=out, lse=lse, first_split=first_split, splits=splits,
            split_tokens=split_tokens, block_h=block_h,
        )  # fmt: skip
        return
    tile = tile or default_tile(block_m, num_rows, cache.shape[1], q.dtype)
    grid = (num_rows if tiles is None else tiles.shape[0], splits, cdiv(heads, block_h))
    c_pow2, r_pow2 = (max(16, next_power_of_2(n)) for n in (latent_width, width - latent_width))
    latent_blocks = turned_blocks = None
    if tiles is not None:  # wide tiles gain from the bulk copy engine (136 to 125 us at 4,096 tokens), single rows lose
        lines = cache.view(-1, width)
        latent_blocks = TensorDescriptor.from_tensor(lines, [tile.tokens, c_pow2])
        turned_blocks = TensorDescriptor.from_tensor(lines, [tile.tokens, r_pow2])
    _attend_kernel[grid](
        q, cache, latent_blocks, turned_blocks, tiles, slots, lengths, out, lse, scale * 1.4426950408889634,
        cache.shape[1], split_tokens, splits, first_split, lse.shape[1], HEADS=heads,
        C=latent_width, R=width - latent_width,
        C_POW2=c_pow2, R_POW2=r_pow2,
        ROWS=per_tile, BLOCK_H=block_h, BLOCK_T=tile.tokens, PRECISION=dot_precision(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def head_block(heads: int, rows_per_tile: int) -> int:
    """Heads of one program: a power of two; at least 16 query rows in a tile (the smallest matrix tile), at most 64."""
    block = next_power_of_2(heads)
    block = min(block, max(1, 64 // rows_per_tile))
    return max(block, cdiv(16, rows_per_tile))


def default_tile(query_rows: int, num_rows: int, capacity: int, dtype: torch.dtype) -> AttentionTile:
    """Block of cached tokens for programs of so many query rows (rows x heads) over slots of `capacity` tokens, as
    measured on an H200."""
    if dtype == torch.float32:
        return AttentionTile(16, 8 if query_rows > 16 else 4, 1)
    if query_rows <= 16:
        # Many short contexts: small programs (1,024 rows of 16 / 128 / 256 tokens: 22 / 56 / 93 us, else 29 / 62 / 91).
        return AttentionTile(16, 2, 4) if num_rows >= 512 and capacity <= 256 else AttentionTile(32, 4, 3)
    if query_rows <= 32:
        return AttentionTile(32, 4, 2)
    return AttentionTile(64, 8, 2)
