"""Absorbed-MLA decode attention of 64 query rows to one cached context, on Hopper's own instructions, in Gluon.

The same contract as `attention.attend` with `tiles`, for the one case that is arithmetic rather than bandwidth: a tile
of exactly 64 query rows (rows x heads), 16-bit, latent C of 256 or 512, 64 rotated dims. Structure after FlashMLA's
Hopper kernel (github.com/deepseek-ai/FlashMLA), simplified. Triton gives both warpgroups the whole score product, in
instructions (64 x 32) too narrow for shared memory to feed; here nothing is computed twice:

    blocks of 64 cached tokens belong to warpgroups 0 and 1 in turn: the owner computes its scores (64 x 64) and its
    softmax, and publishes weights, running maximum and fade (what earlier results are multiplied by) in shared memory;
    each block then meets both warpgroups, in order: warpgroup w keeps the output's columns w C/2 .. (w + 1) C/2,
    and is alone in reading that half of the values: once done with it, it reloads it (bulk copies, two blocks ahead).

While one warpgroup takes a softmax the other multiplies. No block waits for more than its predecessor's maximum.
Departures from FlashMLA: both warpgroups see the blocks in the same order with the same fades (there, the second
takes each pair in reverse); rotated queries live in registers of both; a copy is half a block, not a ninth.

Measured on an H200, 64 programs' rows of 16 heads, C 512: 256 rows in groups of 16 over 4,096 tokens 69 us (527
TFLOP/s; plain Triton 130 us), 1,024 rows over 256 tokens 39 us (50), 64 rows over 256 tokens 9.2 us (10)."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rl.policy.hopper import is_hopper

# Renamed after Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

ROWS = gl.constexpr(64)
"""Query rows of a program."""
BLOCK = gl.constexpr(64)
"""Cached tokens of a block."""
TURNED = gl.constexpr(64)
"""Rotated dims."""


@gluon.jit
def _load_half(block, half: gl.constexpr, line, num_blocks, latent_desc, turned_desc, shared):
    """Start the copy of one half of a block's latent (and, with the second half, of its rotated keys)."""
    _, latent, turned, _, _, _, _, full, _ = shared
    width: gl.constexpr = latent_desc.block_shape[1]
    buffer = block % 2
    wanted = block < num_blocks
    arrived = full.index(buffer * 2 + half)
    row = line + block * BLOCK
    size: gl.constexpr = BLOCK * (width + half * TURNED) * 2
    mbarrier.expect(arrived, size, pred=wanted)
    _copy(latent_desc, [row, half * width], arrived, latent.index(buffer * 2 + half), pred=wanted)
    if half == 1:
        _copy(turned_desc, [row, 2 * width], arrived, turned.index(buffer), pred=wanted)


@gluon.jit
def _zero(block):
    """0, but not to the compiler, which else keeps the addresses of all operands in registers, and those in memory."""
    return block >> 20


@gluon.jit
def _start_scores(me: gl.constexpr, block, shared, layout: gl.constexpr):
    """Start the score product of a block of this warpgroup, with the half that arrives first: one group of asynchronous
    products."""
    q, latent, _, _, _, _, _, full, _ = shared
    which = (me + _zero(block)) * 2 + me
    mbarrier.wait(full.index(which), (block // 2) & 1)
    score = gl.zeros((ROWS, BLOCK), gl.float32, layout)
    keys = latent.index(which).permute((1, 0))
    return warpgroup_mma(q.index(me + _zero(block)), keys, score, use_acc=False, is_async=True)


@gluon.jit
def _start_other_scores(me: gl.constexpr, block, score, q_turned, shared):
    """Add the other half of the score product, and the rotated dims: two groups."""
    q, latent, turned, _, _, _, _, full, _ = shared
    which = (me + _zero(block)) * 2 + 1 - me
    mbarrier.wait(full.index(which), (block // 2) & 1)
    keys = latent.index(which).permute((1, 0))
    score = warpgroup_mma(q.index(1 - me + _zero(block)), keys, score, is_async=True)
    return warpgroup_mma(q_turned, turned.index(me + _zero(block)).permute((1, 0)), score, is_async=True)


@gluon.jit
def _soften(score, top, total, left, scale_log2, layout: gl.constexpr):
    """score: (64, 64) raw, of which the first `left` columns count -> weights, fade (64,), new top, new total."""
    if left < BLOCK:
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        score = gl.where((column < left)[None, :], score, float("-inf"))
    new_top = gl.maximum(top, gl.max(score, 1) * scale_log2)
    weight = gl.exp2(score * scale_log2 - new_top[:, None])
    fade = gl.exp2(top - new_top)
    return weight, fade, new_top, total * fade + gl.sum(weight, 1)


@gluon.jit
def _start_follow(me: gl.constexpr, block, acc, total, shared, row_layout: gl.constexpr, acc_layout: gl.constexpr):
    """Start adding a block of the other warpgroup to this one's columns, once its weights are published."""
    _, latent, _, weights, fades, tops, _, full, ready = shared
    other, phase = 1 - me + _zero(block), (block // 2) & 1
    mbarrier.wait(ready.index(other), phase)
    mbarrier.wait(full.index(other * 2 + me), phase)
    fade = fades.index(other).load(row_layout)
    top = tops.index(other).load(row_layout)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(weights.index(other), latent.index(other * 2 + me), acc, is_async=True)
    return acc, top, total * fade


@gluon.jit
def _publish(me: gl.constexpr, block, weight, fade, top, shared):
    """Tell the other warpgroup what this one found for its block."""
    _, _, _, weights, fades, tops, _, _, ready = shared
    mine = me + _zero(block)
    weights.index(mine).store(weight)
    fades.index(mine).store(fade)
    tops.index(mine).store(top)
    fence_async_shared()
    _barrier()
    mbarrier.arrive(ready.index(mine), count=1)


@gluon.jit
def _add_own(me: gl.constexpr, block, acc, weight, fade, shared, acc_layout: gl.constexpr):
    """Add this warpgroup's block to its own columns."""
    latent = shared[1]
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
    operand = gl.convert_layout(weight, gl.DotOperandLayout(0, acc_layout, 2))
    acc = warpgroup_mma(operand, latent.index((me + _zero(block)) * 2 + me), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _barrier()
    return acc


@gluon.jit
def _step(
    me: gl.constexpr,
    follows: gl.constexpr,
    block,
    acc,
    top,
    total,
    common,
    row_layout: gl.constexpr,
    acc_layout: gl.constexpr,
):
    """A block of this warpgroup, and before it (unless it is the first of all) the other's -> acc, top, total."""
    latent_desc, turned_desc, shared, q_turned, line, num_tokens, scale_log2 = common
    latent = shared[1]
    num_blocks = (num_tokens + BLOCK - 1) // BLOCK
    layout: gl.constexpr = row_layout.parent
    # Products finish in the order in which they start. The other's block comes before what may have to wait for a copy,
    # so that its half of the buffer is soon free.
    score = _start_scores(me, block, shared, layout)
    if follows:
        product, top, total = _start_follow(me, block - 1, acc, total, shared, row_layout, acc_layout)
    score = _start_other_scores(me, block, score, q_turned, shared)
    if follows:
        acc = warpgroup_mma_wait(2, deps=[product])
        _barrier()
        _load_half(block + 1, me, line, num_blocks, latent_desc, turned_desc, shared)
    score = warpgroup_mma_wait(0, deps=[score])
    left = num_tokens - block * BLOCK
    weight, fade, top, total = _soften(score, top, total, left, scale_log2, layout)
    weight = weight.to(latent.dtype)
    _publish(me, block, weight, fade, top, shared)
    acc = _add_own(me, block, acc, weight, fade, shared, acc_layout)
    _load_half(block + 2, me, line, num_blocks, latent_desc, turned_desc, shared)
    return acc, top, total


@gluon.jit
def _warpgroup(
    me: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    latent_desc,
    turned_desc,
    shared,
    line,
    num_tokens,
    scale_log2,
    out_ptr,
    lse_ptr,
    tile_ptr,
    first_head,
    split,
    all_splits,
):
    """What one of the two does. shared: (q, latent, turned, weights, fades, tops, totals, full, ready), all in shared
    memory, allocated and described in `_attend_kernel`."""
    _, latent, _, weights, _, _, totals, _, ready = shared
    width: gl.constexpr = latent_desc.block_shape[1]
    other: gl.constexpr = 1 - me
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    num_blocks = (num_tokens + BLOCK - 1) // BLOCK
    # The rotated queries arrive in the buffer of this warpgroup's weights: shared memory holds nothing more.
    q_turned = weights.index(me).load(gl.DotOperandLayout(0, score_layout, 2))
    acc = gl.zeros((ROWS, width), gl.float32, acc_layout)
    top = gl.full((ROWS,), float("-inf"), gl.float32, row_layout)
    total = gl.zeros((ROWS,), gl.float32, row_layout)
    common = (latent_desc, turned_desc, shared, q_turned, line, num_tokens, scale_log2)
    if num_blocks > me:  # apart from the loop: else ptxas has the loop's products wait for each other
        acc, top, total = _step(me, me, me, acc, top, total, common, row_layout, acc_layout)
    for block in range(2 + me, num_blocks, 2):
        acc, top, total = _step(me, 1, block, acc, top, total, common, row_layout, acc_layout)
    if (num_blocks > 0) & ((num_blocks - 1) % 2 == other):
        acc_started, top, total = _start_follow(me, num_blocks - 1, acc, total, shared, row_layout, acc_layout)
        acc = warpgroup_mma_wait(0, deps=[acc_started])
    totals.index(me).store(total)
    _barrier()
    mbarrier.arrive(ready.index(2 + me), count=1)
    mbarrier.wait(ready.index(2 + other), 0)
    total += totals.index(other).load(row_layout)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
    # Through shared memory, so that whole lines are written; nobody reads this half any more.
    staged = latent.index(me)
    staged.store(acc.to(latent.dtype))
    _barrier()
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    result, present = _results(tile_ptr, first_head, split, all_splits, HEADS, BLOCK_H, gl.SliceLayout(1, store_layout))
    column = me * width + gl.arange(0, width, gl.SliceLayout(0, store_layout))
    out_ptrs = out_ptr + result[:, None] * (2 * width) + column[None, :]
    gl.store(out_ptrs, staged.load(store_layout), mask=(present & (num_tokens > 0))[:, None])
    if me == 0:
        result, present = _results(tile_ptr, first_head, split, all_splits, HEADS, BLOCK_H, row_layout)
        gl.store(lse_ptr + result, (top + gl.log2(total)) * 0.6931471805599453, mask=present)


@gluon.jit
def _members(tile_ptr, first_head, HEADS: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """Row and head of each of the 64 query rows, and whether it is there."""
    member = gl.arange(0, ROWS, layout)
    rows = gl.load(tile_ptr + member // BLOCK_H)
    heads = first_head + member % BLOCK_H
    return rows.to(gl.int64), heads, (rows >= 0) & (heads < HEADS)


@gluon.jit
def _results(
    tile_ptr, first_head, split, all_splits, HEADS: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr
):
    rows, heads, present = _members(tile_ptr, first_head, HEADS, BLOCK_H, layout)
    return (rows * all_splits + split) * HEADS + heads, present


@gluon.jit(do_not_specialize=["splits", "first_split", "all_splits"])
def _attend_kernel(
    q_ptr,
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
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
):
    dtype: gl.constexpr = latent_desc.dtype
    width: gl.constexpr = latent_desc.block_shape[1]
    tile_ptr = tiles_ptr + gl.program_id(0) * (ROWS // BLOCK_H)
    split = gl.program_id(1)
    first_head = gl.program_id(2) * BLOCK_H
    first_row = gl.load(tile_ptr)
    if first_row < 0:
        return
    length = gl.load(lengths_ptr + first_row)
    slot = gl.load(slots_ptr + first_row)
    if split_tokens == 0:  # noqa: SIM108
        per_split = ((length + splits - 1) // splits + BLOCK - 1) // BLOCK * BLOCK
    else:
        per_split = split_tokens
    begin = split * per_split
    end = gl.minimum(begin + per_split, length)
    if (split == splits - 1) & (split_tokens > 0):
        end = length
    num_tokens = gl.maximum(end - begin, 0)
    num_blocks = (num_tokens + BLOCK - 1) // BLOCK
    line = slot * slot_tokens + begin

    q = gl.allocate_shared_memory(dtype, [2, ROWS, width], latent_desc.layout)
    latent = gl.allocate_shared_memory(dtype, [4, BLOCK, width], latent_desc.layout)  # block % 2 * 2 + half
    turned = gl.allocate_shared_memory(dtype, [2, BLOCK, TURNED], turned_desc.layout)  # block % 2, as all that follow
    weights = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK], turned_desc.layout)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    fades = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    tops = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    totals = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # as latent: the copy has arrived
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # 2 weights are written, 2 totals
    shared = (q, latent, turned, weights, fades, tops, totals, full, ready)
    for i in gl.static_range(4):  # one arrival completes any of them
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    _barrier()
    for block in gl.static_range(2):
        for half in gl.static_range(2):
            _load_half(block, half, line, num_blocks, latent_desc, turned_desc, shared)

    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    rows, heads, present = _members(tile_ptr, first_head, HEADS, BLOCK_H, gl.SliceLayout(1, wide))
    column = gl.arange(0, width, gl.SliceLayout(0, wide))
    q_ptrs = q_ptr + (rows * HEADS + heads)[:, None] * (2 * width + TURNED) + column[None, :]
    for half in gl.static_range(2):
        q.index(half).store(gl.load(q_ptrs + half * width, mask=present[:, None], other=0.0))
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows, heads, present = _members(tile_ptr, first_head, HEADS, BLOCK_H, gl.SliceLayout(1, narrow))
    column = 2 * width + gl.arange(0, TURNED, gl.SliceLayout(0, narrow))
    q_ptrs = q_ptr + (rows * HEADS + heads)[:, None] * (2 * width + TURNED) + column[None, :]
    q_turned = gl.load(q_ptrs, mask=present[:, None], other=0.0)
    weights.index(0).store(q_turned)
    weights.index(1).store(q_turned)
    fence_async_shared()
    _barrier()

    # Constants stand in the call itself: a tuple that has a name holds them as tensors.
    work = (latent_desc, turned_desc, shared, line, num_tokens, scale_log2)
    result = (out_ptr, lse_ptr, tile_ptr, first_head, first_split + split, all_splits)
    gl.warp_specialize(
        [
            (_warpgroup, (0, HEADS, BLOCK_H) + work + result),  # noqa: RUF005
            (_warpgroup, (1, HEADS, BLOCK_H) + work + result),  # noqa: RUF005
        ],
        [4],
        [240],
    )


def fits(q: torch.Tensor, latent_width: int, query_rows: int) -> bool:
    """Whether `attend_tiles` takes q (N, H, C + R) in tiles of so many query rows (rows x heads)."""
    shape = query_rows == ROWS.value and latent_width in (256, 512) and q.shape[-1] - latent_width == TURNED.value
    return is_hopper(q.device) and shape and q.element_size() == 2


def attend_tiles(
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
    split_tokens: int,
    block_h: int,
) -> None:
    """As `attention.attend`, which see; block_h: heads of a program."""
    heads, width = q.shape[1:]
    half = out.shape[-1] // 2
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    lines = cache.view(-1, width)
    latent_blocks, turned_blocks = (
        TensorDescriptor.from_tensor(lines, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))
        for shape in ([BLOCK.value, half], [BLOCK.value, TURNED.value])
    )
    grid = (tiles.shape[0], splits, -(-heads // block_h))
    _attend_kernel[grid](
        q, latent_blocks, turned_blocks, tiles, slots, lengths, out, lse, scale * 1.4426950408889634, cache.shape[1],
        split_tokens, splits, first_split, lse.shape[1], HEADS=heads, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip
