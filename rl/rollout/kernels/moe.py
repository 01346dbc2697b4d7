"""Grouped expert matrices for decode: each expert's weights are streamed once, no host-side counts, no copies.

In: rows x (N, D), the lists of `router.py` (which of the N * K assignments chose expert e), the policy's own expert
tensors. Out: y (N, P, D) with P = K + S slots a row, already times the routing weight; their sum is the layer's output
and is left to the next kernel (`norm.combine_norm`), which has to read the row anyway.

Assignment (row n, choice k) is the number n * P + k. The S parts of the shared expert (its width is S times that of a
routed one) are slots K .. P-1 with weight 1, so that they ride in the same two launches. A dense layer is E = 0, S = 1.

Tiles are found on the device: a program adds up ceil(count / BLOCK_M) over the experts and takes its place in that sum, so
the grid has the size of the worst case, and programs beyond the end leave at once. Weights are the left operand (their
rows are the wgmma M dimension): with few rows per expert the right operand may be as narrow as 16 columns.

Numerics: fp32 accumulation, one rounding after silu(gate) * up and one after the routing weight. Rows do not depend on
their place in a list, so the order in which the router's atomics filled it does not show in the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, dot_precision


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: rows of one expert in a tile (BLOCK_M). out: output columns (BLOCK_N). depth: inner block (BLOCK_K)."""

    rows: int
    out: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One layer's matrices, all views of the policy's parameters. Routed: gate_up (E, 2I, D), down (E, D, I). Shared:
    gate and up (S*I, D), down (D, S*I). Either pair may be missing (not both); width is I."""

    width: int
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    shared_gate: torch.Tensor | None
    shared_up: torch.Tensor | None
    shared_down: torch.Tensor | None

    @property
    def num_experts(self) -> int:
        return 0 if self.gate_up is None else self.gate_up.shape[0]

    @property
    def num_shared(self) -> int:
        return 0 if self.shared_gate is None else self.shared_gate.shape[0] // self.width


@triton.jit
def _place(counts_ptr, pid, NUM_EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> expert, tile within the expert, rows of the expert, of the pid-th tile; expert == EXPERTS_POW2 beyond the last."""
    ids = tl.arange(0, EXPERTS_POW2)
    counts = tl.load(counts_ptr + ids, mask=ids < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= pid).to(tl.int32), 0)
    here = ids == expert
    first = tl.sum(tl.where(here, ends - tiles, 0), 0)
    count = tl.sum(tl.where(here, counts, 0), 0)
    return expert, pid - first, count


@triton.jit
def _gate_up_kernel(
    x_ptr,
    gate_up_ptr,
    shared_gate_ptr,
    shared_up_ptr,
    act_ptr,
    counts_ptr,
    lists_ptr,
    num_rows,
    list_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act[n * P + k, i] = silu(x_n . gate_i) * (x_n . up_i); one program does BLOCK_N columns i of one tile of rows."""
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    columns = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    tiles_per_shared = (num_rows + BLOCK_M - 1) // BLOCK_M
    shared_tiles = NUM_SHARED * tiles_per_shared
    is_shared = tile < shared_tiles
    part = tile // tiles_per_shared
    if NUM_EXPERTS > 0:
        expert, place, count = _place(counts_ptr, tile - shared_tiles, NUM_EXPERTS, EXPERTS_POW2, BLOCK_M)
        if (tile >= shared_tiles) & (expert >= NUM_EXPERTS):
            return
        expert = tl.where(is_shared, 0, expert)
        index = tl.where(is_shared, tile % tiles_per_shared, place) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = index < tl.where(is_shared, num_rows, count)
        listed = tl.load(lists_ptr + expert * list_stride + index, mask=valid & (tile >= shared_tiles), other=0)
        assignment = tl.where(is_shared, index * SLOTS + TOP_K + part, listed)
        gate_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * WIDTH * D)
        up_ptr = gate_ptr + WIDTH * D
        if NUM_SHARED > 0:
            offset = part.to(tl.int64) * (WIDTH * D)
            gate_ptr = tl.where(is_shared, shared_gate_ptr + offset, gate_ptr)
            up_ptr = tl.where(is_shared, shared_up_ptr + offset, up_ptr)
    else:
        index = (tile % tiles_per_shared) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = index < num_rows
        assignment = index * SLOTS + TOP_K + part
        gate_ptr = shared_gate_ptr + part.to(tl.int64) * (WIDTH * D)
        up_ptr = shared_up_ptr + part.to(tl.int64) * (WIDTH * D)
    gate_ptr = tl.multiple_of(gate_ptr, 16)
    up_ptr = tl.multiple_of(up_ptr, 16)

    inner = tl.arange(0, BLOCK_K)
    row_ptrs = x_ptr + (assignment // SLOTS).to(tl.int64)[:, None] * D + inner[None, :]
    weight_offsets = columns[:, None] * D + inner[None, :]
    in_width = (columns < WIDTH)[:, None]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0 and WIDTH % BLOCK_N == 0:
            x = tl.load(row_ptrs + start, mask=valid[:, None], other=0.0)
            g = tl.load(gate_ptr + weight_offsets + start, eviction_policy="evict_first")
            u = tl.load(up_ptr + weight_offsets + start, eviction_policy="evict_first")
        else:
            in_depth = (start + inner < D)[None, :]
            x = tl.load(row_ptrs + start, mask=valid[:, None] & in_depth, other=0.0)
            g = tl.load(gate_ptr + weight_offsets + start, mask=in_width & in_depth, other=0.0)
            u = tl.load(up_ptr + weight_offsets + start, mask=in_width & in_depth, other=0.0)
        x = tl.trans(x)
        gate = tl.dot(g, x, gate, input_precision=PRECISION)
        up = tl.dot(u, x, up, input_precision=PRECISION)
    act = gate / (1.0 + tl.exp(-gate)) * up
    act_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(act_ptrs, tl.trans(act).to(act_ptr.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _down_kernel(
    act_ptr,
    down_ptr,
    shared_down_ptr,
    weights_ptr,
    y_ptr,
    counts_ptr,
    lists_ptr,
    num_rows,
    list_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[n * P + k, d] = weight[n, k] * sum_i act[n * P + k, i] down[d, i]; a program does BLOCK_N of the D columns."""
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    SHARED_WIDTH: tl.constexpr = WIDTH * NUM_SHARED
    n_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    columns = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    tiles_per_shared = (num_rows + BLOCK_M - 1) // BLOCK_M
    shared_tiles = NUM_SHARED * tiles_per_shared
    is_shared = tile < shared_tiles
    part = tile // tiles_per_shared
    if NUM_EXPERTS > 0:
        expert, place, count = _place(counts_ptr, tile - shared_tiles, NUM_EXPERTS, EXPERTS_POW2, BLOCK_M)
        if (tile >= shared_tiles) & (expert >= NUM_EXPERTS):
            return
        expert = tl.where(is_shared, 0, expert)
        index = tl.where(is_shared, tile % tiles_per_shared, place) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = index < tl.where(is_shared, num_rows, count)
        listed = tl.load(lists_ptr + expert * list_stride + index, mask=valid & (tile >= shared_tiles), other=0)
        assignment = tl.where(is_shared, index * SLOTS + TOP_K + part, listed)
        routed = valid & (tile >= shared_tiles)
        choice = (assignment // SLOTS) * TOP_K + assignment % SLOTS
        weight = tl.load(weights_ptr + choice, mask=routed, other=1.0)
        matrix_ptr = down_ptr + expert.to(tl.int64) * (D * WIDTH)
        stride = tl.full((), WIDTH, tl.int32)
        if NUM_SHARED > 0:
            matrix_ptr = tl.where(is_shared, shared_down_ptr + part * WIDTH, matrix_ptr)
            stride = tl.where(is_shared, SHARED_WIDTH, WIDTH)
    else:
        index = (tile % tiles_per_shared) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = index < num_rows
        assignment = index * SLOTS + TOP_K + part
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        matrix_ptr = shared_down_ptr + part * WIDTH
        stride = tl.full((), SHARED_WIDTH, tl.int32)
    matrix_ptr = tl.multiple_of(matrix_ptr, 16)
    stride = tl.multiple_of(stride, 16)

    inner = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    weight_ptrs = matrix_ptr + columns[:, None] * stride + inner[None, :]
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0 and D % BLOCK_N == 0:
            a = tl.load(act_ptrs + start, mask=valid[:, None], other=0.0)
            w = tl.load(weight_ptrs + start, eviction_policy="evict_first")
        else:
            in_depth = (start + inner < WIDTH)[None, :]
            a = tl.load(act_ptrs + start, mask=valid[:, None] & in_depth, other=0.0)
            w = tl.load(weight_ptrs + start, mask=(columns < D)[:, None] & in_depth, other=0.0)
        out = tl.dot(w, tl.trans(a), out, input_precision=PRECISION)
    out = tl.trans(out) * weight[:, None]
    y_ptrs = y_ptr + assignment.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(y_ptrs, out.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])


def default_tiles(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """-> tiles of the gate_up and down launches, chosen by the rows an expert gets on average (measured on an H200)."""
    if dtype == torch.float32:
        return Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)
    expected = num_rows * top_k / max(num_experts, 1) if num_experts else num_rows
    if expected <= 12:
        return Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 4)
    if expected <= 28:
        return Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4)
    if expected <= 56:
        return Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3)
    return Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)


def grouped_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    counts: torch.Tensor,
    lists: torch.Tensor,
    *,
    act: torch.Tensor,
    out: torch.Tensor,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """x: (N, D); weights: (N, K) float32; counts: (E,) int32; lists: (E, >= N) int32 assignment numbers; act: scratch
    (N * P, I); out: (N, P, D), written and returned. x and the expert tensors share one dtype and are contiguous."""
    num_rows, width = x.shape[0], experts.width
    top_k = weights.shape[1] if experts.num_experts else 0
    gate_tile, down_tile = tiles or default_tiles(num_rows, top_k, experts.num_experts, x.dtype)
    gate_up_rows(x, experts, top_k, counts, lists, act=act, tile=gate_tile)
    slots = top_k + experts.num_shared
    constants = _constants(x, experts, top_k, down_tile)
    grid = (_max_tiles(num_rows, top_k, experts, down_tile.rows) * cdiv(x.shape[1], down_tile.out),)
    _down_kernel[grid](
        act, experts.down, experts.shared_down, weights, out, counts, lists, num_rows, lists.stride(0),
        **constants, num_warps=down_tile.warps, num_stages=down_tile.stages,
    )  # fmt: skip
    assert act.shape == (num_rows * slots, width) and out.shape == (num_rows, slots, x.shape[1])
    return out


def gate_up_rows(
    x: torch.Tensor,
    experts: ExpertWeights,
    top_k: int,
    counts: torch.Tensor | None,
    lists: torch.Tensor | None,
    *,
    act: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """The first of the two launches: act (N * P, I) = silu(gate) * up of every assignment."""
    num_rows = x.shape[0]
    grid = (_max_tiles(num_rows, top_k, experts, tile.rows) * cdiv(experts.width, tile.out),)
    _gate_up_kernel[grid](
        x, experts.gate_up, experts.shared_gate, experts.shared_up, act, counts, lists, num_rows,
        0 if lists is None else lists.stride(0),
        **_constants(x, experts, top_k, tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return act


def _constants(x: torch.Tensor, experts: ExpertWeights, top_k: int, tile: Tile) -> dict[str, Any]:
    return {
        "D": x.shape[1],
        "WIDTH": experts.width,
        "NUM_EXPERTS": experts.num_experts,
        "EXPERTS_POW2": triton.next_power_of_2(max(experts.num_experts, 1)),
        "TOP_K": top_k,
        "NUM_SHARED": experts.num_shared,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.out,
        "BLOCK_K": tile.depth,
        "PRECISION": dot_precision(x.dtype),
    }


def _max_tiles(num_rows: int, top_k: int, experts: ExpertWeights, block: int) -> int:
    """Most row tiles that any routing can need: full tiles, plus one begun tile for each expert that can have one."""
    shared = experts.num_shared * cdiv(num_rows, block)
    assignments = num_rows * top_k
    begun = min(experts.num_experts, assignments)
    return shared + (assignments - begun) // block + begun if experts.num_experts else shared
