"""Attention of a group's rows to their shared prompt as two matrix products, for bf16.

The single pass of `attention.py` holds 64 query rows against C = 512 output columns, all that a multiprocessor's registers
take, and alternates between products and softmax. Here the two are apart, each a plain tiled product of 128 rows:

    scores: P = exp2(q . k - block maximum) for blocks of 128 tokens, with each block's maximum and sum
    values: sum over blocks of exp2(block maximum - maximum) * P, times the latents; a program does part of the C columns

P is stored in the dtype of q, (N * H, prompt tokens): it mostly stays in the L2 cache. Results and log-sum-exp go to the same
place as those of `attention.attend`, whose tables (tiles, slots, lengths) it shares. The weights are rounded twice (P, and P times
its block's factor) instead of once. Measured on an H200, 256 rows x 16 heads: see `decoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, chained, dot_precision, follow

BLOCKS_PER_SPLIT = 32


@dataclass(frozen=True, slots=True)
class PromptTile:
    """tokens: of a score block. depth: inner block of the scores. inner, columns: tokens of an inner block and columns of C
    of the value product. Stages and warps of the two launches."""

    tokens: int
    depth: int
    inner: int
    columns: int
    score_warps: int
    score_stages: int
    value_warps: int
    value_stages: int


@triton.jit
def _tile_rows(tiles_ptr, tile, head_block, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """-> first row (-1: no such tile), numbers of the tile's queries (row * H + head), which of them exist."""
    member = tl.arange(0, ROWS * BLOCK_H)
    heads = head_block * BLOCK_H + member % BLOCK_H
    rows = tl.load(tiles_ptr + tile * ROWS + member // BLOCK_H)
    first_row = tl.load(tiles_ptr + tile * ROWS)
    return first_row, rows.to(tl.int64) * HEADS + heads, (rows >= 0) & (heads < HEADS)


@triton.jit
def _scores_kernel(
    q_ptr,
    cache_ptr,
    tiles_ptr,
    slots_ptr,
    lengths_ptr,
    weights_ptr,
    tops_ptr,
    sums_ptr,
    scale_log2,
    slot_stride,
    token_stride,
    block_stride,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    block = tl.program_id(0)
    first_row, query, present = _tile_rows(tiles_ptr, tl.program_id(1), tl.program_id(2), HEADS, ROWS, BLOCK_H)
    if first_row < 0:
        return
    length = tl.load(lengths_ptr + first_row)
    slot = tl.load(slots_ptr + first_row)
    if block * BLOCK_T >= length:
        return
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inner = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + query[:, None] * WIDTH + inner[None, :]
    k_ptrs = cache_ptr + slot.to(tl.int64) * slot_stride + token[:, None] * WIDTH + inner[None, :]
    cached = (token < length)[:, None]
    scores = tl.zeros((ROWS * BLOCK_H, BLOCK_T), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            q = tl.load(q_ptrs + start, mask=present[:, None], other=0.0)
            k = tl.load(k_ptrs + start, mask=cached, other=0.0)
        else:
            in_width = (start + inner < WIDTH)[None, :]
            q = tl.load(q_ptrs + start, mask=present[:, None] & in_width, other=0.0)
            k = tl.load(k_ptrs + start, mask=cached & in_width, other=0.0)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    scores = tl.where((token < length)[None, :], scores * scale_log2, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - top[:, None]).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + query[:, None] * token_stride + token[None, :], weights, mask=present[:, None])
    tl.store(tops_ptr + query * block_stride + block, top, mask=present)
    tl.store(sums_ptr + query * block_stride + block, tl.sum(weights.to(tl.float32), 1), mask=present)


@triton.jit(do_not_specialize=["splits", "first_split", "all_splits"])
def _values_kernel(
    weights_ptr,
    tops_ptr,
    sums_ptr,
    cache_ptr,
    tiles_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    slot_stride,
    token_stride,
    block_stride,
    splits,
    first_split,
    all_splits,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    column_block = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2) // HEAD_BLOCKS
    first_row, query, present = _tile_rows(tiles_ptr, tile, tl.program_id(2) % HEAD_BLOCKS, HEADS, ROWS, BLOCK_H)
    if first_row < 0:
        return
    length = tl.load(lengths_ptr + first_row)
    slot = tl.load(slots_ptr + first_row)
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    per_split = (blocks + splits - 1) // splits
    first = split * per_split
    last = tl.minimum(first + per_split, blocks)
    result = (query // HEADS * all_splits + first_split + split) * HEADS + query % HEADS
    if first >= last:
        if column_block == 0:
            tl.store(lse_ptr + result, tl.full((ROWS * BLOCK_H,), float("-inf"), tl.float32), mask=present)
        return
    ids = tl.arange(0, BLOCKS)
    block_mask = present[:, None] & (first + ids < last)[None, :]
    block_ptrs = query[:, None] * block_stride + first + ids[None, :]
    tops = tl.load(tops_ptr + block_ptrs, mask=block_mask, other=float("-inf"))
    sums = tl.load(sums_ptr + block_ptrs, mask=block_mask, other=0.0)
    top = tl.max(tops, 1)
    top = tl.where(present, top, 0.0)
    factors = tl.exp2(tops - top[:, None])
    total = tl.sum(factors * sums, 1)
    total = tl.where(present, total, 1.0)

    wide = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.arange(0, INNER)
    weight_ptrs = weights_ptr + query[:, None] * token_stride + token[None, :]
    value_ptrs = cache_ptr + slot.to(tl.int64) * slot_stride + token[:, None] * WIDTH + wide[None, :]
    acc = tl.zeros((ROWS * BLOCK_H, BLOCK_C), tl.float32)
    for start in range(first * BLOCK_T, tl.minimum(last * BLOCK_T, length), INNER):
        factor = tl.sum(tl.where(ids[None, :] == start // BLOCK_T - first, factors, 0.0), 1)
        weights = tl.load(weight_ptrs + start, mask=present[:, None], other=0.0)
        cached = (start + token < length)[:, None]
        if C % BLOCK_C == 0:
            values = tl.load(value_ptrs + start * WIDTH, mask=cached, other=0.0)
        else:
            values = tl.load(value_ptrs + start * WIDTH, mask=cached & (wide < C)[None, :], other=0.0)
        weights = (weights.to(tl.float32) * factor[:, None]).to(values.dtype)
        acc = tl.dot(weights, values, acc, input_precision=PRECISION)
    acc = acc / total[:, None]
    out_mask = present[:, None] & (wide < C)[None, :]
    tl.store(out_ptr + result[:, None] * C + wide[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    if column_block == 0:
        tl.store(lse_ptr + result, (top + tl.log2(total)) * 0.6931471805599453, mask=present)


@dataclass(frozen=True, slots=True)
class PromptScratch:
    """weights: (N * H, T) in the dtype of q, T prompt tokens rounded up to score blocks; tops, sums: (N * H, blocks) fp32."""

    weights: torch.Tensor
    tops: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def make(cls, queries: int, tokens: int, dtype: torch.dtype, device: torch.device) -> PromptScratch:
        blocks = cdiv(tokens, default_tile(dtype).tokens)
        return cls(
            torch.empty(queries, blocks * default_tile(dtype).tokens, dtype=dtype, device=device),
            torch.empty(queries, blocks, dtype=torch.float32, device=device),
            torch.empty(queries, blocks, dtype=torch.float32, device=device),
        )


def default_tile(dtype: torch.dtype) -> PromptTile:
    if dtype == torch.float32:
        return PromptTile(32, 16, 16, 32, 4, 2, 4, 2)
    return PromptTile(128, 64, 64, 256, 8, 3, 8, 3)


def attend_prompt(
    q: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    first_split: int,
    splits: int,
    block_h: int,
    scratch: PromptScratch,
    tile: PromptTile | None = None,
) -> None:
    """As `attention.attend` for tiles of rows that share a prompt; a split covers at most BLOCKS_PER_SPLIT score blocks."""
    tile = tile or default_tile(q.dtype)
    heads, width = q.shape[1:]
    latent, blocks, head_blocks = out.shape[-1], scratch.tops.shape[1], cdiv(heads, block_h)
    assert cdiv(blocks, splits) <= BLOCKS_PER_SPLIT and scratch.weights.shape[1] == blocks * tile.tokens
    common = {"HEADS": heads, "ROWS": tiles.shape[1], "BLOCK_H": block_h, "PRECISION": dot_precision(q.dtype)}
    _scores_kernel[(blocks, tiles.shape[0], head_blocks)](
        q, cache, tiles, slots, lengths, scratch.weights, scratch.tops, scratch.sums,
        scale * 1.4426950408889634, cache.stride(0), scratch.weights.stride(0), scratch.tops.stride(0),
        WIDTH=width, BLOCK_T=tile.tokens, BLOCK_K=tile.depth, **common,
        num_warps=tile.score_warps, num_stages=tile.score_stages, **chained(q),
    )  # fmt: skip
    _values_kernel[(cdiv(latent, tile.columns), splits, tiles.shape[0] * head_blocks)](
        scratch.weights, scratch.tops, scratch.sums, cache, tiles, slots, lengths, out, lse,
        cache.stride(0), scratch.weights.stride(0), scratch.tops.stride(0), splits, first_split, lse.shape[1],
        WIDTH=width, C=latent, BLOCK_T=tile.tokens,
        BLOCKS=triton.next_power_of_2(cdiv(blocks, splits)), INNER=tile.inner, BLOCK_C=tile.columns,
        HEAD_BLOCKS=head_blocks, **common, num_warps=tile.value_warps, num_stages=tile.value_stages,
        **chained(q),
    )  # fmt: skip
