"""Grouped expert matrices for decode: each expert's weights are streamed once, no host-side counts, no copies.

In: rows x (N, D), the lists of `router.py` (which of the N * K assignments chose expert e), the policy's own expert
tensors. Out: y (N, P, D) with P = K + S slots a row, already times the routing weight; their sum is the layer's output
and is left to the next kernel (`norm.combine_norm`), which has to read the row anyway.

Assignment (row n, choice k) is the number n * P + k. The S parts of the shared expert (its width is S times that of a
routed one) are slots K .. P-1 with weight 1, so that they ride in the same two launches. A dense layer is E = 0, S = 1.

Tiles are found on the device: a program adds up ceil(count / BLOCK_M) over the experts and takes its place in that sum, so
the grid has the size of the worst case, and programs beyond the end leave at once. Weights come through the
bulk copy engine and are the left operand (their rows are the wgmma M dimension): with few rows per expert the right operand may
be as narrow as 16 columns. Measured: 4.4 TB/s of weights at 6 rows an expert on an H200, whose copy engine reads 4.4.

Numerics: fp32 accumulation, one rounding after silu(gate) * up and one after the routing weight. Rows do not depend on
their place in a list, so the order in which the router's atomics filled it does not show in the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rl.rollout.kernels.layout import cdiv, chained, dot_precision, follow


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
    expert = tl.where(pid >= tl.sum(tiles, 0), EXPERTS_POW2, expert)
    here = ids == expert
    first = tl.sum(tl.where(here, ends - tiles, 0), 0)
    count = tl.sum(tl.where(here, counts, 0), 0)
    return expert, pid - first, count


@triton.jit
def _rows_of_tile(
    tile, counts_ptr, lists_ptr, weights_ptr, num_rows, list_stride,
    NUM_EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """-> assignment numbers of the tile's rows (BLOCK_M,), which of them exist, their routing weights, the shared part, the
    expert (EXPERTS_POW2: there is no such tile) and whether the tile is a shared one. Shared tiles come first."""
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    tiles_per_part = (num_rows + BLOCK_M - 1) // BLOCK_M
    shared_tiles = NUM_SHARED * tiles_per_part
    is_shared = tile < shared_tiles
    part = tile // tiles_per_part
    index = (tile % tiles_per_part) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = index < num_rows
    assignment = index * SLOTS + TOP_K + part
    weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    expert = 0
    if NUM_EXPERTS > 0:
        found, place, count = _place(counts_ptr, tile - shared_tiles, NUM_EXPERTS, EXPERTS_POW2, BLOCK_M)
        expert = tl.where(is_shared, 0, found)
        within = place * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = tl.where(is_shared, valid, within < count)
        routed = valid & (tile >= shared_tiles) & (expert < EXPERTS_POW2)
        listed = tl.load(lists_ptr + expert * list_stride + within, mask=routed, other=0)
        assignment = tl.where(is_shared, assignment, listed)
        if weights_ptr is not None:
            choice = (assignment // SLOTS) * TOP_K + assignment % SLOTS
            weight = tl.load(weights_ptr + choice, mask=routed, other=1.0)
    return assignment, valid, weight, part, expert, is_shared


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x_ptr,
    gate_up_desc,
    shared_gate_desc,
    shared_up_desc,
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
    CHAINED: tl.constexpr,
):
    """act[n * P + k, i] = silu(x_n . gate_i) * (x_n . up_i); one program does BLOCK_N columns i of one tile of rows."""
    follow(CHAINED)
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    column = (tl.program_id(0) % n_tiles) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    assignment, valid, weight, part, expert, is_shared = _rows_of_tile(
        tile, counts_ptr, lists_ptr, None, num_rows, list_stride,
        NUM_EXPERTS, EXPERTS_POW2, TOP_K, NUM_SHARED, BLOCK_M,
    )  # fmt: skip
    if expert >= EXPERTS_POW2:
        return
    row_ptrs = x_ptr + (assignment // SLOTS).to(tl.int64)[:, None] * D + inner[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if NUM_EXPERTS == 0:
        gate_desc, up_desc = shared_gate_desc, shared_up_desc
        gate_first = part * WIDTH + column
        up_first = gate_first
    elif NUM_SHARED == 0:
        gate_desc, up_desc = gate_up_desc, gate_up_desc
        gate_first = expert * (2 * WIDTH) + column
        up_first = gate_first + WIDTH
    else:
        if is_shared:
            gate_desc, up_desc = shared_gate_desc, shared_up_desc
        else:
            gate_desc, up_desc = gate_up_desc, gate_up_desc
        gate_first = tl.where(is_shared, part * WIDTH, expert * (2 * WIDTH)) + column
        up_first = gate_first + tl.where(is_shared, 0, WIDTH)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            rows = tl.load(row_ptrs + start, mask=valid[:, None], other=0.0)
        else:
            rows = tl.load(row_ptrs + start, mask=valid[:, None] & (start + inner < D)[None, :], other=0.0)
        rows = tl.trans(rows)
        gate = tl.dot(gate_desc.load([gate_first, start]), rows, gate, input_precision=PRECISION)
        up = tl.dot(up_desc.load([up_first, start]), rows, up, input_precision=PRECISION)
    act = gate / (1.0 + tl.exp(-gate)) * up
    act_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(act_ptrs, tl.trans(act).to(act_ptr.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    act_ptr,
    down_desc,
    shared_down_desc,
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
    CHAINED: tl.constexpr,
):
    """y[n * P + k, d] = weight[n, k] * sum_i act[n * P + k, i] down[d, i]; a program does BLOCK_N of the D columns."""
    follow(CHAINED)
    n_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    column = (tl.program_id(0) % n_tiles) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    assignment, valid, weight, part, expert, is_shared = _rows_of_tile(
        tile, counts_ptr, lists_ptr, weights_ptr, num_rows, list_stride,
        NUM_EXPERTS, EXPERTS_POW2, TOP_K, NUM_SHARED, BLOCK_M,
    )  # fmt: skip
    if expert >= EXPERTS_POW2:
        return
    row_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if NUM_EXPERTS == 0:
        desc = shared_down_desc
        first_row, first_column = column, part * WIDTH
    elif NUM_SHARED == 0:
        desc = down_desc
        first_row, first_column = expert * D + column, 0
    else:
        if is_shared:
            desc = shared_down_desc
        else:
            desc = down_desc
        first_row = tl.where(is_shared, 0, expert * D) + column
        first_column = tl.where(is_shared, part * WIDTH, 0)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            rows = tl.load(row_ptrs + start, mask=valid[:, None], other=0.0)
        else:
            rows = tl.load(row_ptrs + start, mask=valid[:, None] & (start + inner < WIDTH)[None, :], other=0.0)
        matrix = desc.load([first_row, first_column + start])
        out = tl.dot(matrix, tl.trans(rows), out, input_precision=PRECISION)
    out = tl.trans(out) * weight[:, None]
    y_ptrs = y_ptr + assignment.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(y_ptrs, out.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])


def default_tiles(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """-> tiles of the gate_up and down launches, chosen by the rows an expert gets on average (measured on an H200)."""
    if dtype == torch.float32:
        return Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)
    expected = num_rows * top_k / num_experts if num_experts else num_rows
    if expected <= 12:
        return Tile(16, 64, 128, 4, 3), Tile(16, 128, 64, 4, 5)
    if expected <= 28:
        return Tile(32, 64, 64, 4, 5), Tile(32, 128, 64, 4, 5)
    if expected <= 56:
        return Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)
    return Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 4, 3)


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
    num_rows, width = x.shape[0], x.shape[1]
    gate_tile, down_tile = tiles or default_tiles(num_rows, weights.shape[1], experts.num_experts, x.dtype)
    gate_up_rows(x, experts, weights.shape[1], counts, lists, act=act, tile=gate_tile)
    return down_rows(act, experts, weights, counts, lists, out=out.view(num_rows, -1, width), tile=down_tile)


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
    """The first launch: act (N * P, I) = silu(gate) * up of every assignment."""
    num_rows = x.shape[0]
    grid = (_max_tiles(num_rows, top_k, experts, tile.rows) * cdiv(experts.width, tile.out),)
    _gate_up_kernel[grid](
        x, _blocks(experts.gate_up, tile), _blocks(experts.shared_gate, tile), _blocks(experts.shared_up, tile), act,
        counts, lists, num_rows, 0 if lists is None else lists.stride(0),
        **_constants(x.shape[1], x.dtype, experts, top_k, tile), num_warps=tile.warps, num_stages=tile.stages,
        **chained(x),
    )  # fmt: skip
    return act


def down_rows(
    act: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    counts: torch.Tensor,
    lists: torch.Tensor,
    *,
    out: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """The second launch: out (N, P, D) = weight * down(act)."""
    num_rows, _, width = out.shape
    top_k = weights.shape[1]
    grid = (_max_tiles(num_rows, top_k, experts, tile.rows) * cdiv(width, tile.out),)
    _down_kernel[grid](
        act, _blocks(experts.down, tile), _blocks(experts.shared_down, tile), weights, out, counts, lists, num_rows,
        lists.stride(0),
        **_constants(width, act.dtype, experts, top_k, tile), num_warps=tile.warps, num_stages=tile.stages,
        **chained(act),
    )  # fmt: skip
    return out


def _blocks(matrix: torch.Tensor | None, tile: Tile) -> TensorDescriptor | None:
    """A matrix, or a stack of them as one tall matrix, as the bulk copy engine addresses it."""
    if matrix is None:
        return None
    columns = matrix.shape[-1]
    rows = matrix.numel() // columns
    if columns * matrix.element_size() % 16:
        raise ValueError(f"expert matrices need rows of a multiple of 16 bytes, got {columns} x {matrix.dtype}")
    return TensorDescriptor(matrix.detach(), [rows, columns], [columns, 1], [tile.out, tile.depth])


def _constants(width: int, dtype: torch.dtype, experts: ExpertWeights, top_k: int, tile: Tile) -> dict[str, Any]:
    return {
        "D": width,
        "WIDTH": experts.width,
        "NUM_EXPERTS": experts.num_experts,
        "EXPERTS_POW2": triton.next_power_of_2(max(experts.num_experts, 1)),
        "TOP_K": top_k if experts.num_experts else 0,
        "NUM_SHARED": experts.num_shared,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.out,
        "BLOCK_K": tile.depth,
        "PRECISION": dot_precision(dtype),
    }


def _max_tiles(num_rows: int, top_k: int, experts: ExpertWeights, block: int) -> int:
    """Most row tiles that any routing can need: full tiles, plus one begun tile for each expert that can have one."""
    shared = experts.num_shared * cdiv(num_rows, block)
    assignments = num_rows * top_k
    begun = min(experts.num_experts, assignments)
    return shared + (assignments - begun) // block + begun if experts.num_experts else shared
