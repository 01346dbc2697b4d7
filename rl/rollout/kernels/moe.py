"""Grouped expert matrices for decode: each expert's weights are streamed once, no host-side counts, no copies.

In: rows x (N, D), the lists of `router.py` (which of the N * K assignments chose expert e), the policy's own expert
tensors. Out: y (N, P, D) with P = K + S parts a row; their sum, the layer's output, is left to the next kernel
(`norm.combine_norm`), which has to read the row anyway.

Assignment (row n, choice k) is the number n * P + k. The S parts of the shared expert (its width is S times that of a
routed one) are slots K .. P-1 of every row, so that they ride in the same two launches. A dense layer's first half is
`gated_rows`: no experts, one part.

Tiles are found on the device: a program adds up ceil(count / BLOCK_M) over the experts and takes its place in that
sum, so the grid has the size of the worst case, and programs beyond the end leave at once. Weights come through the
bulk copy engine and are the left operand (their rows are the wgmma M dimension): with few rows per expert the right
operand may be as narrow as 16 columns. Measured on an H200: 4.4 TB/s of weights at 6 rows an expert, as fast as a plain
read; torch's grouped_mm with its gathers takes 2.0 to 2.7 times as long at 24 to 96 rows.

Many rows an expert are arithmetic as much as bandwidth: `hopper_experts` is quicker there, where it is to be had.

Rounding is the trainer's (`rl.policy.moe`): gate and up rounded to the dtype, the routing weight multiplied into the
activation, then one rounding. Rows do not depend on their place in a list, so the order in which the router's atomics
filled it does not show in the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rl.policy.hopper import is_hopper
from rl.rollout.kernels.layout import cdiv, dot_precision, next_power_of_2
from rl.rollout.kernels.sorting import SortedRows


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: rows of one expert in a tile (BLOCK_M). out: output columns (BLOCK_N). depth: inner block (BLOCK_K)."""

    rows: int
    out: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # most a thread may have, where one more would cost a resident program


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One layer's matrices, all views of the policy's parameters: gate_up (E, 2I, D), down (E, D, I); of the shared
    experts gate and up (S*I, D) and down (D, S*I), or None. Descriptors are kept for who launches with it again."""

    gate_up: torch.Tensor
    down: torch.Tensor
    shared_gate: torch.Tensor | None = None
    shared_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, moe: Any) -> ExpertWeights:
        """moe: `rl.policy.moe.MoE`."""
        shared = moe.shared_experts
        if shared is None:
            return cls(moe.experts.gate_up_proj, moe.experts.down_proj)
        return cls(
            moe.experts.gate_up_proj,
            moe.experts.down_proj,
            shared.gate_proj.weight,
            shared.up_proj.weight,
            shared.down_proj.weight,
        )

    @property
    def parts(self) -> int:
        """S, how many routed experts wide the shared one is."""
        return 0 if self.shared_gate is None else self.shared_gate.shape[0] // self.down.shape[2]

    def blocks(self, name: str, tile: Tile) -> TensorDescriptor | None:
        """The matrix of that name in blocks of `tile`, made once (5 us of the host; a layer has five)."""
        return self.kept((name, tile.out, tile.depth), lambda: _blocks(getattr(self, name), tile))

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returned the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@triton.jit
def _rows_of_tile(
    tile,
    counts_ptr,
    lists_ptr,
    num_rows,
    list_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """-> expert of the tile-th tile (NUM_EXPERTS: there is none), part of the shared expert and whether the tile is
    one of those (they come first), assignment numbers of its rows, which of them exist."""
    tiles_per_part = (num_rows + BLOCK_M - 1) // BLOCK_M
    shared_tiles = PARTS * tiles_per_part
    is_shared = tile < shared_tiles
    part = tile // tiles_per_part
    row = (tile % tiles_per_part) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.arange(0, EXPERTS_POW2)
    counts = tl.load(counts_ptr + ids, mask=ids < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    expert = tl.minimum(tl.sum((ends <= tile - shared_tiles).to(tl.int32), 0), NUM_EXPERTS)
    expert = tl.where(is_shared, 0, expert)
    here = ids == expert
    first = tl.sum(tl.where(here, ends - tiles, 0), 0)
    count = tl.sum(tl.where(here, counts, 0), 0)
    index = (tile - shared_tiles - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    routed = (index >= 0) & (index < count)  # a shared tile's index is negative; no expert has no count
    listed = tl.load(lists_ptr + expert * list_stride + index, mask=routed, other=0)
    assignment = tl.where(is_shared, row * (TOP_K + PARTS) + TOP_K + part, listed)
    return expert, part, is_shared, assignment, tl.where(is_shared, row < num_rows, routed)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x_ptr,
    gate_up_desc,
    shared_gate_desc,
    shared_up_desc,
    weights_ptr,
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
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act[a, i] = silu(x . gate_i) * (x . up_i) * weight of assignment a; one program does BLOCK_N columns i of one
    tile of rows. NUM_EXPERTS = 0: an ordinary MLP, row n is assignment n."""
    SLOTS: tl.constexpr = TOP_K + PARTS
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    column = (tl.program_id(0) % n_tiles) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    if NUM_EXPERTS == 0:
        assignment = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = assignment < num_rows
        gate_desc, up_desc = shared_gate_desc, shared_up_desc
        gate_first = column
        up_first = column
    else:
        expert, part, is_shared, assignment, valid = _rows_of_tile(
            tile, counts_ptr, lists_ptr, num_rows, list_stride, NUM_EXPERTS, EXPERTS_POW2, TOP_K, PARTS, BLOCK_M
        )
        if expert >= NUM_EXPERTS:
            return
        gate_first = tl.where(is_shared, part * WIDTH, expert * (2 * WIDTH)) + column
        up_first = gate_first + tl.where(is_shared, 0, WIDTH)
        if PARTS == 0:
            gate_desc, up_desc = gate_up_desc, gate_up_desc
        else:  # a choice of descriptors, not two loops: those would take twice the shared memory
            if is_shared:
                gate_desc, up_desc = shared_gate_desc, shared_up_desc
            else:
                gate_desc, up_desc = gate_up_desc, gate_up_desc
    row_ptrs = x_ptr + (assignment // SLOTS).to(tl.int64)[:, None] * D + inner[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            rows = tl.load(row_ptrs + start, mask=valid[:, None], other=0.0)
        else:
            rows = tl.load(row_ptrs + start, mask=valid[:, None] & (start + inner < D)[None, :], other=0.0)
        rows = tl.trans(rows)
        gate = tl.dot(gate_desc.load([gate_first, start]), rows, gate, input_precision=PRECISION)
        up = tl.dot(up_desc.load([up_first, start]), rows, up, input_precision=PRECISION)
    dtype = act_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    if NUM_EXPERTS > 0:
        choice = assignment % SLOTS
        weighted = valid & (choice < TOP_K)
        weight = tl.load(weights_ptr + (assignment // SLOTS) * TOP_K + choice, mask=weighted, other=1.0)
        act = act * weight[None, :]
    act = tl.trans(act.to(dtype))
    act_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(act_ptrs, act, mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    act_ptr,
    down_desc,
    shared_down_desc,
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
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[a, d] = sum_i act[a, i] down[d, i] with the matrix of assignment a's expert; a program does BLOCK_N columns."""
    n_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // n_tiles
    column = (tl.program_id(0) % n_tiles) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    expert, part, is_shared, assignment, valid = _rows_of_tile(
        tile, counts_ptr, lists_ptr, num_rows, list_stride, NUM_EXPERTS, EXPERTS_POW2, TOP_K, PARTS, BLOCK_M
    )
    if expert >= NUM_EXPERTS:
        return
    first_row = tl.where(is_shared, 0, expert * D) + column
    first_column = tl.where(is_shared, part * WIDTH, 0)
    if PARTS == 0:
        desc = down_desc
    else:
        if is_shared:  # noqa: SIM108 (Triton has no conditional expression of descriptors)
            desc = shared_down_desc
        else:
            desc = down_desc
    row_ptrs = act_ptr + assignment.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            rows = tl.load(row_ptrs + start, mask=valid[:, None], other=0.0)
        else:
            rows = tl.load(row_ptrs + start, mask=valid[:, None] & (start + inner < WIDTH)[None, :], other=0.0)
        matrix = desc.load([first_row, first_column + start])
        out = tl.dot(matrix, tl.trans(rows), out, input_precision=PRECISION)
    y_ptrs = y_ptr + assignment.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(y_ptrs, tl.trans(out.to(y_ptr.dtype.element_ty)), mask=valid[:, None] & (columns < D)[None, :])


def default_tiles(rows_per_expert: float, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """-> tiles of the two launches for so many rows an expert on average; the best of about ten each on an H200 (no
    gain: a fixed number of programs that share the tiles out, with or without loading the next tile while one ends)."""
    if dtype == torch.float32:
        return Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)
    if rows_per_expert <= 12:
        return Tile(16, 64, 128, 4, 3), Tile(16, 128, 64, 4, 5)
    if rows_per_expert <= 28:
        return Tile(32, 64, 64, 4, 3), Tile(32, 128, 64, 4, 5)
    if rows_per_expert <= 64:
        return Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)
    # 143 registers a thread let one program of 8 warps reside where 128 let two: 347 us instead of 244.
    return Tile(128, 64, 64, 8, 3, registers=128), Tile(128, 128, 64, 4, 3)


# Rows an expert on average, and numbers in a matrix of it, from which `hopper_experts` is used where it can be. On an
# H200, Moonlight's experts (2,048 x 1,408), its three launches against two here: 96 rows 388 us (424), 48 rows 323
# (333), 24 rows 290 (275); matrices of 1,024 x 640, 96 rows: 112 (107).
SORT_FROM, SORT_MATRIX = 40, 2**21


@functools.cache
def _hopper_experts() -> Any:
    try:
        from rl.rollout.kernels import hopper_experts
    except ImportError:  # a Triton without Gluon, or another one than it was written for
        return None
    return hopper_experts


def sorts_rows(rows_per_expert: float, matrix: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped_experts` makes use of `SortedRows` with so many rows an expert on average; matrix: D * I."""
    if rows_per_expert <= SORT_FROM or matrix < SORT_MATRIX or dtype.itemsize != 2:
        return False
    return is_hopper(device) and _hopper_experts() is not None


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
    sorted_rows: SortedRows | None = None,
) -> torch.Tensor:
    """x: (N, D); weights: (N, K) float32; counts: (E,) int32; lists: (E, >= N) int32 assignment numbers; act: scratch
    (N * P, I) -> out (N, P, D), whose sum over P is the layer's output. x and the expert tensors share one dtype and
    are contiguous; routed parts of rows that are in no list keep what `out` held. sorted_rows: scratch for another
    way, which is taken with many rows (`sorts_rows`) unless tiles are given."""
    num_rows, width = x.shape
    top_k, (num_experts, _, inner) = weights.shape[1], experts.down.shape
    rows_per_expert = num_rows * top_k / num_experts
    if sorted_rows is not None and tiles is None and sorts_rows(rows_per_expert, width * inner, x.dtype, x.device):
        hopper = _hopper_experts()
        if hopper.fits(x, experts):
            return hopper.grouped_experts(x, experts, weights, counts, lists, sorted_rows, act=act, out=out)
    first, second = tiles or default_tiles(rows_per_expert, x.dtype)
    common = {
        "D": width, "WIDTH": inner, "NUM_EXPERTS": num_experts, "TOP_K": top_k, "PARTS": experts.parts,
        "EXPERTS_POW2": next_power_of_2(num_experts + 1), "PRECISION": dot_precision(x.dtype),
    }  # fmt: skip
    _gate_up_kernel[(_most_tiles(num_rows, top_k, experts, first.rows) * cdiv(inner, first.out),)](
        x, experts.blocks("gate_up", first), experts.blocks("shared_gate", first), experts.blocks("shared_up", first),
        weights, act, counts, lists, num_rows, lists.stride(0), **common,
        BLOCK_M=first.rows, BLOCK_N=first.out, BLOCK_K=first.depth,
        num_warps=first.warps, num_stages=first.stages, maxnreg=first.registers,
    )  # fmt: skip
    _down_kernel[(_most_tiles(num_rows, top_k, experts, second.rows) * cdiv(width, second.out),)](
        act, experts.blocks("down", second), experts.blocks("shared_down", second), out, counts, lists, num_rows,
        lists.stride(0), **common,
        BLOCK_M=second.rows, BLOCK_N=second.out, BLOCK_K=second.depth,
        num_warps=second.warps, num_stages=second.stages,
    )  # fmt: skip
    return out


def gated_rows(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, act: torch.Tensor) -> torch.Tensor:
    """The first half of an ordinary MLP: act (N, I) = silu(x gate^T) * (x
    up^T)."""
    num_rows, width = x.shape
    tile = default_tiles(num_rows, x.dtype)[0]
    _gate_up_kernel[(cdiv(num_rows, tile.rows) * cdiv(gate.shape[0], tile.out),)](
        x, None, _blocks(gate, tile), _blocks(up, tile), None, act, None, None, num_rows, 0,
        D=width, WIDTH=gate.shape[0], NUM_EXPERTS=0, EXPERTS_POW2=1, TOP_K=0, PARTS=1, PRECISION=dot_precision(x.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.out, BLOCK_K=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return act


def _blocks(matrix: torch.Tensor | None, tile: Tile) -> TensorDescriptor | None:
    """A matrix, or a stack of them as one tall matrix, as the bulk copy engine addresses it."""
    if matrix is None:
        return None
    columns = matrix.shape[-1]
    rows = matrix.numel() // columns
    return TensorDescriptor(matrix.detach(), [rows, columns], [columns, 1], [tile.out, tile.depth])


def _most_tiles(num_rows: int, top_k: int, experts: ExpertWeights, block: int) -> int:
    """Most row tiles that any routing can need: full tiles, plus one begun tile for each expert that can have one."""
    assignments = num_rows * top_k
    begun = min(experts.down.shape[0], assignments)
    return experts.parts * cdiv(num_rows, block) + (assignments - begun) // block + begun
