"""Causal flash attention over packed sequences for MLA, forward only: no gradient, no assembled heads (Hopper).

What a forward without gradients attends with (prefill, log-probabilities of the old policy and the reference). In:
the projections as they lie in memory. Queries and keys have two parts, q (T, H, nope + R) and k_nope (T, H, nope)
beside k_rope (T, R), one rotated key shared by the heads; k_nope and v (T, H, V) are views of the `kv_b_proj` output.
The kernel turns the queries itself and sums two products per score, so that no head is assembled, no value padded, and
nothing but the output (T, H, V) is written. Algorithm of FlashAttention-2 (arXiv:2307.08691), softmax in base 2 and
fp32; as in FlashAttention-3 (arXiv:2407.08608) a block's weights meet its values beside the next block's scores.

One program handles 128 queries of one head. Which ones is read from a table on the device (`query_tiles`), made once
per forward: lengths need no host, and short sequences leave no idle programs behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_SECTION = 32768  # tokens whose keys and values of one head (21 MB) stay in the L2 cache while tiles pass over them


@dataclass(frozen=True, slots=True)
class FlashTile:
    """queries, keys: of one inner block. bulk: keys and values come by the bulk copy engine (TMA). unified: blocks on
    the diagonal pass through the same loop as the others, their first load ahead of it, at the price of one product
    with zeros. shared: weights wait in shared memory, not in registers, so that their product is asynchronous."""

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 2
    bulk: bool = True
    unified: bool = False
    shared: bool = False


DEFAULT_TILE = FlashTile()


def applies(q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `flash_mla` takes these: 16-bit numbers on a Hopper GPU, heads that fit its memory, aligned rows."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    widths_fit = max(k_nope.shape[2], v.shape[2]) <= 128 and k_rope.shape[1] in (16, 32, 64)
    strides = (s for x in (k_nope, k_rope, v) for s in (*x.stride()[:-1], x.data_ptr() // 2))
    return q.dtype in (torch.bfloat16, torch.float16) and widths_fit and all(s % 8 == 0 for s in strides)


def query_tiles(
    cu_seqlens: torch.Tensor,
    *,
    num_tokens: int,
    max_seqlen: int,
    queries: int = DEFAULT_TILE.queries,
    section: int = _SECTION,
) -> torch.Tensor:
    """cu_seqlens: (S + 1,) int32 -> (tiles, 3) int32: first query, first and last + 1 token of its sequence, as rows of
    the batch. As many tiles as lengths with this sum can need; a tile too many starts behind the end of its sequence.

    Within a section (the sequences that begin in the same `section` tokens) the tiles with most keys come first. Shapes
    alone are read on the host: cu_seqlens [0, 300, 310], 310 tokens, up to 300 each -> (256, 0, 300), (128, 0, 300),
    (0, 0, 300), (300, 300, 310).
    """
    sequences = cu_seqlens.numel() - 1
    room = min((num_tokens + sequences * (queries - 1)) // queries, sequences * triton.cdiv(max_seqlen, queries))
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    counts = (ends - starts + queries - 1) // queries
    last = counts.cumsum(0)
    index = torch.arange(room, device=cu_seqlens.device)
    sequence = torch.searchsorted(last, index, right=True).clamp_(max=max(sequences - 1, 0))
    block = index - (last - counts)[sequence]
    order = torch.argsort(starts[sequence] // section * 2**24 - block, stable=True)
    table = torch.stack((starts[sequence] + block * queries, starts[sequence], ends[sequence]), dim=1)
    return table[order].to(torch.int32)


def flash_mla(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleave: bool = False,
    tile: FlashTile = DEFAULT_TILE,
) -> torch.Tensor:
    """q: (T, H, nope + R), k_nope: (T, H, nope), k_rope: (T, R) rotated, in halves, v: (T, H, V), each with any strides
    of 16 bytes' multiples but a last one of 1; tiles: `query_tiles`, for tile.queries -> (T, H, V), contiguous:
    softmax((q_nope . k_nope + q_rope . k_rope) * scale, causal, within each sequence) v.

    tables: cos, sin (T, R/2) float32, contiguous: the queries are turned on the way, as `rl.policy.rope.rotate` does
    (without rounding in between: fp32, then the dtype of q). None: they are turned already, in halves. No gradient.
    """
    tokens, heads, width = q.shape
    nope, rope, value = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    assert width == nope + rope and rope >= 16 and rope & (rope - 1) == 0, (width, nope, rope)
    assert all(x.stride(-1) == 1 for x in (q, k_nope, k_rope, v))
    out = torch.empty(tokens, heads, value, device=q.device, dtype=q.dtype)
    if not tokens:
        return out
    nope_pow2, value_pow2 = (max(16, triton.next_power_of_2(n)) for n in (nope, value))
    cos, sin = tables or (None, None)
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in tables or ())
    blocks: list[TensorDescriptor | None] = [None, None, None]
    if tile.bulk:
        widths = ((k_nope, nope_pow2), (k_rope, rope), (v, value_pow2))
        blocks = [_row_blocks(x, tile.keys, columns) for x, columns in widths]
    _flash_kernel[(tiles.shape[0] * heads,)](
        q, cos, sin, k_nope, k_rope, v, *blocks, tiles, out,
        q.stride(0), q.stride(1), k_nope.stride(0), k_nope.stride(1), k_rope.stride(0), v.stride(0), v.stride(1),
        scale * 1.4426950408889634, tiles.shape[0], heads,
        N=nope, R=rope, V=value, N_POW2=nope_pow2, V_POW2=value_pow2, INTERLEAVE=interleave, BLOCK_M=tile.queries,
        BLOCK_N=tile.keys, UNIFIED=tile.unified, SHARED=tile.shared,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _row_blocks(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x: (T, width) or (T, H, width) of any strides, as the matrix of its rows: head h begins at column h * stride."""
    span = x.shape[-1] + (x.shape[1] - 1) * x.stride(1) if x.dim() == 3 else x.shape[-1]
    return TensorDescriptor(x, [x.shape[0], span], [x.stride(0), 1], [rows, columns])


@triton.jit
def _rows(desc, ptr, stride, start, end, column, KEYS: tl.constexpr, WIDTH: tl.constexpr, POW2: tl.constexpr):
    """Rows start .. start + KEYS - 1, (KEYS, POW2). Bulk copies bring rows of other sequences beyond `end` and other
    columns beyond WIDTH, which must be finite: both meet weights or queries of 0, or are not stored."""
    if desc is not None:
        return desc.load([start, column])
    rows = start + tl.arange(0, KEYS)
    columns = tl.arange(0, POW2)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + column + columns[None, :]
    if POW2 == WIDTH:
        return tl.load(ptrs, mask=(rows < end)[:, None], other=0.0)
    return tl.load(ptrs, mask=(rows < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _turned(q_ptrs, cos_ptr, sin_ptr, rows, live, R: tl.constexpr, INTERLEAVE: tl.constexpr):
    """q_ptrs: (M,), where the rotated part of each query begins -> (M, R), turned (if there are tables), in halves."""
    column = tl.arange(0, R)
    if cos_ptr is None:
        return tl.load(q_ptrs[:, None] + column[None, :], mask=live[:, None], other=0.0)
    HALF: tl.constexpr = R // 2
    pair = tl.arange(0, HALF)
    angle = rows.to(tl.int64)[:, None] * HALF + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=live[:, None], other=0.0)
    sin = tl.load(sin_ptr + angle, mask=live[:, None], other=0.0)
    first = q_ptrs[:, None] + (2 * pair if INTERLEAVE else pair)[None, :]
    a = tl.load(first, mask=live[:, None], other=0.0).to(tl.float32)
    b = tl.load(first + (1 if INTERLEAVE else HALF), mask=live[:, None], other=0.0).to(tl.float32)
    turned = tl.join(a * cos - b * sin, b * cos + a * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (rows.shape[0], R)).to(q_ptrs.dtype.element_ty)


@triton.jit(do_not_specialize=["num_tiles"])
def _flash_kernel(
    q_ptr, cos_ptr, sin_ptr, key_ptr, turn_ptr, value_ptr, key_desc, turn_desc, value_desc, tiles_ptr, out_ptr,
    q_stride, q_head, key_stride, key_head, turn_stride, value_stride, value_head, scale_log2, num_tiles, heads,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, N_POW2: tl.constexpr, V_POW2: tl.constexpr,
    INTERLEAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIFIED: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads are the slow index: programs that run together read the same keys and values.
    head = tl.program_id(0) // num_tiles
    tile = tiles_ptr + tl.program_id(0) % num_tiles * 3
    first = tl.load(tile)
    begin = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < end
    wide = tl.arange(0, N_POW2)
    q_rows = q_ptr + rows.to(tl.int64) * q_stride + head * q_head
    q_plain = tl.load(q_rows[:, None] + wide[None, :], mask=live[:, None] & (wide < N)[None, :], other=0.0)
    q_turned = _turned(q_rows + N, cos_ptr, sin_ptr, rows, live, R, INTERLEAVE)
    key_column, value_column = head * key_head, head * value_head

    # From the last block back to the first: those that the diagonal crosses come first and alone need a mask. `top` is
    # finite from the start: a row that sees nothing of the last block then has weights of 0 and no NaN.
    # A block's weights meet its values one step later, beside the next block's scores. Between steps they are integers:
    # only so does the compiler keep them in registers and not in shared memory.
    kind = q_ptr.dtype.element_ty
    BITS: tl.constexpr = kind if SHARED else (tl.int32 if kind == tl.float32 else tl.int16)
    token = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_POW2), tl.float32)
    weight = tl.zeros((BLOCK_M, BLOCK_N), BITS)
    CROSSED: tl.constexpr = 0 if UNIFIED else BLOCK_M // BLOCK_N
    for step in tl.static_range(CROSSED):
        start = first + (CROSSED - 1 - step) * BLOCK_N
        plain = _rows(key_desc, key_ptr, key_stride, start, end, key_column, BLOCK_N, N, N_POW2)
        turned = _rows(turn_desc, turn_ptr, turn_stride, start, end, 0, BLOCK_N, R, R)
        score = tl.dot(q_plain, plain.T, input_precision=PRECISION)
        score = tl.dot(q_turned, turned.T, score, input_precision=PRECISION)
        if step > 0:
            value = _rows(value_desc, value_ptr, value_stride, start + BLOCK_N, end, value_column, BLOCK_N, V, V_POW2)
            acc = tl.dot(weight.to(kind, bitcast=True), value, acc, input_precision=PRECISION)
        score = tl.where(rows[:, None] >= (start + token)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        fade = tl.exp2(top - new_top)
        new_weight = tl.exp2(score * scale_log2 - new_top[:, None])
        total = total * fade + tl.sum(new_weight, 1)
        top = new_top
        if step > 0:
            acc *= fade[:, None]
        weight = new_weight.to(kind).to(BITS, bitcast=True)
    fade = tl.full((BLOCK_M,), 1.0, tl.float32)
    last = first + (BLOCK_M if UNIFIED else 0) - BLOCK_N
    for back in tl.range(0, last + BLOCK_N - begin, BLOCK_N):
        start = last - back
        plain = _rows(key_desc, key_ptr, key_stride, start, end, key_column, BLOCK_N, N, N_POW2)
        turned = _rows(turn_desc, turn_ptr, turn_stride, start, end, 0, BLOCK_N, R, R)
        score = tl.dot(q_plain, plain.T, input_precision=PRECISION)
        score = tl.dot(q_turned, turned.T, score, input_precision=PRECISION)
        if UNIFIED and start >= first:
            score = tl.where(rows[:, None] >= (start + token)[None, :], score, float("-inf"))
        value = _rows(value_desc, value_ptr, value_stride, start + BLOCK_N, end, value_column, BLOCK_N, V, V_POW2)
        if SHARED:
            acc *= fade[:, None]
        acc = tl.dot(weight.to(kind, bitcast=True), value, acc, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        fade = tl.exp2(top - new_top)
        new_weight = tl.exp2(score * scale_log2 - new_top[:, None])
        total = total * fade + tl.sum(new_weight, 1)
        top = new_top
        if not SHARED:
            acc *= fade[:, None]
        weight = new_weight.to(kind).to(BITS, bitcast=True)
    if SHARED:
        acc *= fade[:, None]
    value = _rows(value_desc, value_ptr, value_stride, begin, end, value_column, BLOCK_N, V, V_POW2)
    acc = tl.dot(weight.to(kind, bitcast=True), value, acc, input_precision=PRECISION)
    acc = acc / total[:, None]
    column = tl.arange(0, V_POW2)
    out = out_ptr + (rows.to(tl.int64) * heads + head)[:, None] * V + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < V)[None, :])
