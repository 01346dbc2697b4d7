"""Causal flash attention over packed sequences for MLA, forward only: no gradient, no assembled heads (Hopper).

What prefill attends with (log-probabilities that are compared with the update's use the update's kernel). In: the
projections as they lie in memory. Queries and keys have two parts, q (T, H, nope + R) and k_nope (T, H, nope)
beside k_rope (T, R), one rotated key shared by the heads; k_nope and v (T, H, V) are views of the `kv_b_proj` output.
The kernel turns the queries itself and sums two products per score, so that no head is assembled, no value padded, and
nothing but the output (T, H, V) is written. Algorithm of FlashAttention-2 (arXiv:2307.08691), softmax in base 2 and
fp32; as in FlashAttention-3 (arXiv:2407.08608) a block's weights meet its values beside the next block's scores.

One program handles 64 queries of one head. Which ones is read from a table on the device (`query_tiles`), made once
per forward: lengths need no host, and short sequences leave no idle programs behind.

Measured on an H200, 16 heads of 128 + 64 and 128, bf16: 8 x 4,096 tokens 1.67 ms (assembled heads through torch's
varlen_attn 3.19), 128 x 256 tokens 0.44 ms (0.80).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rl.policy.hopper import is_hopper

_SECTION = 32768  # tokens whose keys and values of one head (21 MB) stay in the L2 cache while tiles pass over them
# Queries of a program, keys of an inner block, warps, stages; two programs a multiprocessor. Of fourteen choices on an
# H200 the best for ragged and short sequences, and within 3 % of the best for long ones.
_QUERIES, _KEYS, _WARPS, _STAGES = 64, 64, 4, 2


def applies(q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `flash_mla` takes these: 16-bit numbers on a Hopper GPU, heads that fit its memory, aligned rows."""
    if not is_hopper(q.device):
        return False
    widths_fit = max(k_nope.shape[2], v.shape[2]) <= 128 and k_rope.shape[1] in (16, 32, 64)
    strides = (s for x in (k_nope, k_rope, v) for s in (*x.stride()[:-1], x.data_ptr() // 2))
    return q.dtype in (torch.bfloat16, torch.float16) and widths_fit and all(s % 8 == 0 for s in strides)


def query_tiles(
    cu_seqlens: torch.Tensor,
    *,
    num_tokens: int,
    max_seqlen: int,
    queries: int = _QUERIES,
    section: int = _SECTION,
) -> torch.Tensor:
    """cu_seqlens: (S + 1,) int32 -> (tiles, 3) int32: first query, first and last + 1 token of its sequence, as rows of
    the batch. As many tiles as lengths with this sum can need; a tile too many starts behind the end of its sequence.

    Within a section (the sequences that begin in the same `section` tokens) the tiles with most keys come first. Shapes
    alone are read on the host: cu_seqlens [0, 300, 310], 310 tokens, up to 300 each -> (256, 0, 300), (128, 0, 300),
    (0, 0, 300), (300, 300, 310).
    """
    sequences = cu_seqlens.numel() - 1
    room = min((num_tokens + sequences * (queries - 1)) // queries, sequences * -(-max_seqlen // queries))
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
) -> torch.Tensor:
    """q: (T, H, nope + R), k_nope: (T, H, nope), k_rope: (T, R) rotated, in halves, v: (T, H, V), each with any strides
    of 16 bytes' multiples but a last one of 1; tiles: `query_tiles` -> (T, H, V), contiguous:
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
    nope_pow2, value_pow2 = (max(16, 1 << (n - 1).bit_length()) for n in (nope, value))
    cos, sin = tables or (None, None)
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in tables or ())
    widths = ((k_nope, nope_pow2), (k_rope, rope), (v, value_pow2))
    _flash_kernel[(tiles.shape[0] * heads,)](
        q, cos, sin, *(_row_blocks(x, _KEYS, columns) for x, columns in widths), tiles, out,
        q.stride(0), q.stride(1), k_nope.stride(1), v.stride(1),
        scale * 1.4426950408889634, tiles.shape[0], heads,
        N=nope, R=rope, V=value, N_POW2=nope_pow2, V_POW2=value_pow2, INTERLEAVE=interleave, BLOCK_M=_QUERIES,
        BLOCK_N=_KEYS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out


def _row_blocks(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x: (T, width) or (T, H, width) of any strides, as the matrix of its rows: head h begins at column h * stride."""
    span = x.shape[-1] + (x.shape[1] - 1) * x.stride(1) if x.dim() == 3 else x.shape[-1]
    return TensorDescriptor(x, [x.shape[0], span], [x.stride(0), 1], [rows, columns])


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
    q_ptr, cos_ptr, sin_ptr, key_desc, turn_desc, value_desc, tiles_ptr, out_ptr,
    q_stride, q_head, key_head, value_head, scale_log2, num_tiles, heads,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, N_POW2: tl.constexpr, V_POW2: tl.constexpr,
    INTERLEAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bulk copies bring rows of other sequences and columns beyond a head too, which must be finite: they meet weights
    or queries of 0, or are not stored."""
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
    # A block's weights meet its values one step later, beside the next block's scores (the first step's are zeros).
    # Between steps they are integers: only so does the compiler keep them in registers and not in shared memory.
    kind = q_ptr.dtype.element_ty
    BITS: tl.constexpr = tl.int32 if kind == tl.float32 else tl.int16
    token = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_POW2), tl.float32)
    weight = tl.zeros((BLOCK_M, BLOCK_N), BITS)
    last = first + BLOCK_M - BLOCK_N
    for back in tl.range(0, last + BLOCK_N - begin, BLOCK_N):
        start = last - back
        score = tl.dot(q_plain, key_desc.load([start, key_column]).T, input_precision=PRECISION)
        score = tl.dot(q_turned, turn_desc.load([start, 0]).T, score, input_precision=PRECISION)
        if start >= first:
            score = tl.where(rows[:, None] >= (start + token)[None, :], score, float("-inf"))
        value = value_desc.load([start + BLOCK_N, value_column])
        acc = tl.dot(weight.to(kind, bitcast=True), value, acc, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        fade = tl.exp2(top - new_top)
        new_weight = tl.exp2(score * scale_log2 - new_top[:, None])
        total = total * fade + tl.sum(new_weight, 1)
        top = new_top
        acc *= fade[:, None]
        weight = new_weight.to(kind).to(BITS, bitcast=True)
    value = value_desc.load([begin, value_column])
    acc = tl.dot(weight.to(kind, bitcast=True), value, acc, input_precision=PRECISION)
    acc = acc / total[:, None]
    column = tl.arange(0, V_POW2)
    out = out_ptr + (rows.to(tl.int64) * heads + head)[:, None] * V + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < V)[None, :])
