"""Experts of many rows, on Hopper's own instructions, in Gluon: persistent programs that copy while they multiply.

The same contract as `moe.grouped_experts`, for steps with so many rows an expert that tiles of 64 or 128 of them are
nearly full. What is different: bulk copies cannot gather, so rows are first sorted by expert (`sorting.py`), and
results of the first product stay sorted; only the second product's rows go back to where they belong. Three launches:

    sort      x by expert, and for each sorted place its assignment number and its routing weight; the table of tiles
    gate_up   act[place] = silu(x . gate) * (x . up) * weight          128 columns of ROWS places a tile
    down      y[assignment] = act[place] . down                        256 columns of ROWS places a tile

A place is a sorted row: 0 .. N * K - 1 for the routed ones (experts in order, each at the running sum of counts), then
N for each part of the shared expert, in natural order (x itself is read for them, not a copy).

Both products are one kernel. A program has three parts: one warp keeps copies into a ring of shared memory stages
going (two blocks of 128 rows of weights, ROWS sorted rows, 64 deep), across the ends of tiles; two warpgroups multiply,
each 64 rows of both weight blocks, so that gate and up of a column meet in one thread. Weights are the left operand:
rows that a tile reads beyond its expert's own are columns of the result which are not stored.

Tiles of the shared expert are spread evenly among the others. They find their weights in the L2 cache, the others
theirs in memory: one kind after the other would leave one of the two idle."""

from __future__ import annotations

import functools

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
from rl.rollout.kernels.moe import ExpertWeights
from rl.rollout.kernels.sorting import SortedRows, sort_rows

# Renamed after Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

DEPTH = gl.constexpr(64)
"""Inner block."""
HALF = gl.constexpr(64)
"""Weight rows of one product of a warpgroup."""
BLOCK = gl.constexpr(128)
"""Weight rows of one copy: a half for each warpgroup."""


@gluon.jit
def _pieces(listing, ROWS: gl.constexpr, PARTS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """How many there are, a piece being COLUMNS columns of one tile. listing: (table_ptr, num_rows, num_routed)."""
    table_ptr, num_rows, _ = listing
    across: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    return (gl.load(table_ptr) + PARTS * ((num_rows + ROWS - 1) // ROWS)) * across


@gluon.jit
def _piece(work, pieces, listing, ROWS: gl.constexpr, PARTS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """-> of the work-th piece: expert or -1 - part, first place, places, first column. All columns of an expert's tile
    are neighbours; so are all tiles of a shared column."""
    table_ptr, num_rows, num_routed = listing
    across: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    if PARTS == 0:
        entry = table_ptr + (work // across + 1) * 4
        return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), work % across * COLUMNS
    tiles = (num_rows + ROWS - 1) // ROWS
    shared = (PARTS * tiles * across).to(gl.int64)
    before = (work * shared // pieces).to(gl.int32)  # shared ones before this
    is_shared = ((work + 1) * shared // pieces).to(gl.int32) > before
    index = work - before
    entry = table_ptr + (index // across + 1) * 4
    owner = gl.load(entry, mask=is_shared == 0, other=0)
    first = gl.load(entry + 1, mask=is_shared == 0, other=0)
    count = gl.load(entry + 2, mask=is_shared == 0, other=0)
    part, row = before // tiles // across, before % tiles * ROWS
    owner = gl.where(is_shared, -1 - part, owner)
    first = gl.where(is_shared, num_routed + part * num_rows + row, first)
    count = gl.where(is_shared, gl.minimum(num_rows - row, ROWS), count)
    return owner, first, count, gl.where(is_shared, before // tiles, index) % across * COLUMNS


@gluon.jit
def _copy_rows(desc, row, depth, count, arrived, buffer):
    """Blocks of rows, as many as `count` rows need."""
    block: gl.constexpr = desc.block_shape[0]
    for i in gl.static_range(buffer.shape[0] // block):
        _copy(desc, [row + i * block, depth], arrived, buffer.slice(i * block, block), pred=count > i * block)


@gluon.jit
def _feed(
    INNER: gl.constexpr,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    GATED: gl.constexpr,
    descriptors,
    buffers,
    listing,
):
    """The copying warp."""
    rows_desc, shared_rows_desc, matrix_desc, shared_first_desc, shared_second_desc = descriptors
    matrices, rows, full, empty = buffers
    stages: gl.constexpr = rows.shape[0]
    block: gl.constexpr = rows_desc.block_shape[0]
    blocks: gl.constexpr = rows.shape[1] // block
    columns: gl.constexpr = BLOCK if GATED else 2 * BLOCK
    pieces = _pieces(listing, rows.shape[1], PARTS, columns, WIDTH)
    stage = gl.program_id(0) * 0
    phase = stage + 1
    for work in range(gl.program_id(0), pieces, gl.num_programs(0)):
        owner, first, count, column = _piece(work, pieces, listing, rows.shape[1], PARTS, columns, WIDTH)
        if GATED:
            matrix, second = owner * (2 * WIDTH) + column, owner * (2 * WIDTH) + WIDTH + column
        else:
            matrix, second = owner * WIDTH + column, owner * WIDTH + BLOCK + column
        for depth in range(0, INNER, DEPTH):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (2 * BLOCK + block) * DEPTH * 2)
            for i in gl.static_range(1, blocks):
                mbarrier.expect(arrived, block * DEPTH * 2, pred=count > i * block)
                mbarrier.arrive(arrived, count=1, pred=count <= i * block)
            if owner >= 0:
                _copy(matrix_desc, [matrix, depth], arrived, matrices.index(2 * stage))
                _copy(matrix_desc, [second, depth], arrived, matrices.index(2 * stage + 1))
                _copy_rows(rows_desc, first, depth, count, arrived, rows.index(stage))
            elif PARTS > 0 and GATED:
                part = -1 - owner
                row = part * WIDTH + column
                own_row = first - listing[2] - part * listing[1]
                _copy(shared_first_desc, [row, depth], arrived, matrices.index(2 * stage))
                _copy(shared_second_desc, [row, depth], arrived, matrices.index(2 * stage + 1))
                _copy_rows(shared_rows_desc, own_row, depth, count, arrived, rows.index(stage))
            elif PARTS > 0:
                inner = (-1 - owner) * INNER + depth
                _copy(shared_first_desc, [column, inner], arrived, matrices.index(2 * stage))
                _copy(shared_second_desc, [column + BLOCK, inner], arrived, matrices.index(2 * stage + 1))
                _copy_rows(shared_rows_desc, first, depth, count, arrived, rows.index(stage))
            stage += 1
            if stage == stages:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply(me: gl.constexpr, first, second, buffers, stage, phase, use: gl.constexpr):
    """Start both products of a stage as soon as it is there; the two before are done when this returns."""
    matrices, rows, full, _ = buffers
    mbarrier.wait(full.index(stage), phase)
    right = rows.index(stage).permute((1, 0))
    left = matrices.index(2 * stage).slice(me * HALF, HALF)
    first_started = warpgroup_mma(left, right, first, use_acc=use, is_async=True)
    left = matrices.index(2 * stage + 1).slice(me * HALF, HALF)
    second_started = warpgroup_mma(left, right, second, use_acc=use, is_async=True)
    return warpgroup_mma_wait(2, deps=[first_started, second_started])


@gluon.jit
def _next(stage, phase, stages: gl.constexpr):
    wrapped = stage == stages - 1
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _store(value, staged, out_ptr, places, count, column, WIDTH: gl.constexpr):
    """value: (64, ROWS) in the layout of a product; staged (ROWS, 64): where it is turned; places: () int32, the first
    one's row of the result, or a pointer to their numbers."""
    rows: gl.constexpr = staged.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    staged.permute((1, 0)).store(value.to(staged.dtype))
    _barrier()
    place = gl.arange(0, rows, gl.SliceLayout(1, layout))
    present = place < count
    row = gl.load(places + place, mask=present, other=0) if places.dtype.is_ptr() else places + place
    columns = column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + row.to(gl.int64)[:, None] * WIDTH + columns[None, :]
    gl.store(out_ptrs, staged.load(layout), mask=present[:, None] & (columns < WIDTH)[None, :])
    _barrier()


@gluon.jit
def _warpgroup(
    me: gl.constexpr,
    INNER: gl.constexpr,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    GATED: gl.constexpr,
    buffers,
    listing,
    staging,
    order_ptr,
    scales_ptr,
    out_ptr,
):
    """One of the two that multiply."""
    rows, empty = buffers[1], buffers[3]
    stages: gl.constexpr = rows.shape[0]
    places: gl.constexpr = rows.shape[1]
    columns: gl.constexpr = BLOCK if GATED else 2 * BLOCK
    pieces = _pieces(listing, places, PARTS, columns, WIDTH)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, places, 16])
    staged = staging.index(me)
    stage = gl.program_id(0) * 0
    phase = gl.program_id(0) * 0
    for work in range(gl.program_id(0), pieces, gl.num_programs(0)):
        _, begin, count, column = _piece(work, pieces, listing, places, PARTS, columns, WIDTH)
        column += me * HALF
        place = gl.arange(0, places, gl.SliceLayout(0, layout))
        if GATED:  # here, so that nobody waits for it
            scale = gl.load(scales_ptr + begin + place, mask=place < count, other=0.0)
        first = gl.zeros((HALF, places), gl.float32, layout)
        second = gl.zeros((HALF, places), gl.float32, layout)
        first, second = _multiply(me, first, second, buffers, stage, phase, False)
        before = stage
        stage, phase = _next(stage, phase, stages)
        for _depth in range(DEPTH, INNER, DEPTH):
            first, second = _multiply(me, first, second, buffers, stage, phase, True)
            _barrier()
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = _next(stage, phase, stages)
        first, second = warpgroup_mma_wait(0, deps=[first, second])
        _barrier()
        mbarrier.arrive(empty.index(before), count=1)
        if GATED:
            gate = first.to(staged.dtype).to(gl.float32)
            up = second.to(staged.dtype).to(gl.float32)
            act = gate / (1.0 + gl.exp(-gate)) * up
            _store(act * scale[None, :], staged, out_ptr, begin, count, column, WIDTH)
        else:
            _store(first, staged, out_ptr, order_ptr + begin, count, column, WIDTH)
            _store(second, staged, out_ptr, order_ptr + begin, count, column + BLOCK, WIDTH)


@gluon.jit(do_not_specialize=["num_rows", "num_routed"])
def _experts_kernel(
    rows_desc,
    shared_rows_desc,
    matrix_desc,
    shared_first_desc,
    shared_second_desc,
    table_ptr,
    order_ptr,
    scales_ptr,
    out_ptr,
    num_rows,
    num_routed,
    INNER: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """GATED: the second launch, with gate and up (or both in one stack of matrices); else the third, with down twice.
    INNER: depth of the product, WIDTH: columns of the result."""
    dtype: gl.constexpr = rows_desc.dtype
    matrices = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK, DEPTH], matrix_desc.layout)  # stage * 2 + which
    rows = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], rows_desc.layout)
    staging = gl.allocate_shared_memory(dtype, [2, ROWS, HALF], rows_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())  # copies have arrived
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())  # both warpgroups have read
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ROWS // rows_desc.block_shape[0])
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    _barrier()
    buffers = (matrices, rows, full, empty)
    listing = (table_ptr, num_rows, num_routed)
    descriptors = (rows_desc, shared_rows_desc, matrix_desc, shared_first_desc, shared_second_desc)
    # Constants stand in the call itself: a tuple that has a name holds them as tensors.
    gl.warp_specialize(
        [
            (_warpgroup, (0, INNER, WIDTH, PARTS, GATED, buffers, listing, staging, order_ptr, scales_ptr, out_ptr)),
            (_warpgroup, (1, INNER, WIDTH, PARTS, GATED, buffers, listing, staging, order_ptr, scales_ptr, out_ptr)),
            (_feed, (INNER, WIDTH, PARTS, GATED, descriptors, buffers, listing)),
        ],
        [4, 1],
        [232, 40],
    )


def fits(x: torch.Tensor, experts: ExpertWeights) -> bool:
    """Whether `grouped_experts` takes x (N, D) with these matrices."""
    whole = all(size % DEPTH.value == 0 for size in experts.down.shape[1:])
    return is_hopper(x.device) and whole and x.element_size() == 2 and x.dtype == experts.down.dtype


def default_rows(rows_per_expert: float) -> int:
    """ROWS, places of a tile, for so many rows an expert on average: a number that few experts exceed."""
    return 64 if rows_per_expert <= 56 else 128


def grouped_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    counts: torch.Tensor,
    lists: torch.Tensor,
    scratch: SortedRows,
    *,
    act: torch.Tensor,
    out: torch.Tensor,
    rows: int | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """As `moe.grouped_experts`, except that act holds places, not assignments. rows: 32, 64 or 128 places a tile.
    block: rows of one copy, of which a tile that is not full has fewer."""
    rows = rows or default_rows(x.shape[0] * weights.shape[1] / experts.down.shape[0])
    block = block or min(rows, 32)
    sort_rows(x, experts, weights, counts, lists, scratch, rows=rows)
    multiply(x, experts, weights.shape[1], scratch, rows=rows, block=block, act=act)
    return multiply_back(experts, weights.shape, scratch, rows=rows, block=block, act=act, out=out)


def multiply(
    x: torch.Tensor,
    experts: ExpertWeights,
    top_k: int,
    scratch: SortedRows,
    *,
    rows: int,
    block: int,
    act: torch.Tensor,
) -> None:
    """The second launch: act (N * P, I), at places."""
    num_rows, width = x.shape
    routed = num_rows * top_k
    matrix = _matrix(experts, "gate_up")
    shared = (_matrix(experts, "shared_gate"), _matrix(experts, "shared_up")) if experts.parts else (matrix, matrix)
    sorted_rows = scratch.rows.view(-1)[: routed * width].view(routed, width)
    _launch(
        _described(sorted_rows, block), _described(x, block), matrix, *shared, scratch, act, num_rows, routed,
        inner=width, width=act.shape[-1], rows=rows, parts=experts.parts, gated=True,
    )  # fmt: skip


def multiply_back(
    experts: ExpertWeights,
    weights_shape: torch.Size,
    scratch: SortedRows,
    *,
    rows: int,
    block: int,
    act: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The third launch: out (N, P, D), at assignments. weights_shape: (N, K)."""
    num_rows, top_k = weights_shape
    inner = act.shape[-1]
    places = num_rows * (top_k + experts.parts)
    matrix = _matrix(experts, "down")
    shared = _matrix(experts, "shared_down") if experts.parts else matrix
    acts = _described(act.view(-1)[: places * inner].view(places, inner), block)
    _launch(
        acts, acts, matrix, shared, shared, scratch, out, num_rows, num_rows * top_k,
        inner=inner, width=out.shape[-1], rows=rows, parts=experts.parts, gated=False,
    )  # fmt: skip
    return out


def _launch(
    row_blocks: TensorDescriptor,
    shared_row_blocks: TensorDescriptor,
    matrix: TensorDescriptor,
    shared_first: TensorDescriptor,
    shared_second: TensorDescriptor,
    scratch: SortedRows,
    out: torch.Tensor,
    num_rows: int,
    routed: int,
    *,
    inner: int,
    width: int,
    rows: int,
    parts: int,
    gated: bool,
) -> None:
    stages = (_SHARED_BYTES - 2 * rows * HALF.value * 2) // ((2 * BLOCK.value + rows) * DEPTH.value * 2)
    _experts_kernel[(_multiprocessors(out.device),)](
        row_blocks, shared_row_blocks, matrix, shared_first, shared_second, scratch.table, scratch.order,
        scratch.scales, out, num_rows, routed, INNER=inner, WIDTH=width, ROWS=rows, PARTS=parts, GATED=gated,
        STAGES=stages, num_warps=4,
    )  # fmt: skip


_SHARED_BYTES = 226 * 1024
"""Shared memory of a program on Hopper, less 1 KiB for what is not tiles."""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _matrix(experts: ExpertWeights, name: str) -> TensorDescriptor:
    """A matrix of the layer, or a stack of them as one tall one, made once."""
    return experts.kept((name, "hopper"), lambda: _described(getattr(experts, name).detach(), BLOCK.value))


def _described(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """In blocks of so many rows, 64 columns wide."""
    columns = matrix.shape[-1]
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    block = [rows, DEPTH.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(matrix, [matrix.numel() // columns, columns], [columns, 1], block, layout)
