"""Rows of an MoE layer sorted by the experts they chose, for kernels whose bulk copies cannot gather.

In: rows x (N, D) and the lists of `router.py`. Out, in `SortedRows`: a place for each assignment that is in a list,
experts in order, each at the running sum of counts, then N places for each part of the shared expert in natural order
(rows are not copied for these); and a table of the routed tiles. Everything is found on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from rl.rollout.arena import Zeros
from rl.rollout.kernels.layout import cdiv, next_power_of_2

if TYPE_CHECKING:
    from rl.rollout.kernels.moe import ExpertWeights


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Scratch of `hopper_experts`: rows (N * K, D), the routed ones by expert; of each place order (N * P,) int32, its
    assignment number, and scales (N * P,) float32, its routing weight; table, int32: the tiles. Fewer rows use less."""

    rows: torch.Tensor
    order: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(
        cls, zeros: Zeros, num_rows: int, *, top_k: int, parts: int, experts: int, width: int, dtype: torch.dtype
    ) -> SortedRows:
        """For at most so many rows of `width` elements; parts: S or more."""
        places, smallest = num_rows * (top_k + parts), 32
        tiles = num_rows * top_k // smallest + experts
        return cls(
            zeros((num_rows * top_k, width), dtype),
            zeros((places,), torch.int32),
            zeros((places,), torch.float32),
            zeros((4 * (1 + tiles),), torch.int32),
        )


@triton.jit
def _experts_ends(
    counts_ptr, NUM_EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """-> (EXPERTS_POW2,) each: rows of every expert, and how many row tiles it and those before it have."""
    ids = tl.arange(0, EXPERTS_POW2)
    counts = tl.load(counts_ptr + ids, mask=ids < NUM_EXPERTS, other=0)
    return counts, tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _sort_kernel(
    x_ptr,
    weights_ptr,
    counts_ptr,
    lists_ptr,
    sorted_ptr,
    order_ptr,
    scales_ptr,
    table_ptr,
    num_rows,
    list_stride,
    D: tl.constexpr,
    D_POW2: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Program 0: the table, which is (tiles, -, -, -), then (expert, first place, places, -) of each routed tile.
    The others: PLACES places each."""
    SLOTS: tl.constexpr = TOP_K + PARTS
    num_routed = num_rows * TOP_K
    ids = tl.arange(0, EXPERTS_POW2)
    counts, tile_ends = _experts_ends(counts_ptr, NUM_EXPERTS, EXPERTS_POW2, ROWS)
    ends = tl.cumsum(counts, 0)
    if tl.program_id(0) == 0:
        tiles = tl.max(tile_ends, 0)
        tl.store(table_ptr, tiles)
        firsts = tile_ends - (counts + ROWS - 1) // ROWS  # an expert's first tile
        for start in range(0, tiles, 64):
            tile = start + tl.arange(0, 64)
            expert = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
            here = ids[None, :] == expert[:, None]
            done = (tile - tl.sum(tl.where(here, firsts[None, :], 0), 1)) * ROWS
            count = tl.sum(tl.where(here, counts[None, :], 0), 1)
            begin = tl.sum(tl.where(here, (ends - counts)[None, :], 0), 1)
            entry = table_ptr + (tile + 1) * 4
            tl.store(entry, expert, mask=tile < tiles)
            tl.store(entry + 1, begin + done, mask=tile < tiles)
            tl.store(entry + 2, tl.minimum(count - done, ROWS), mask=tile < tiles)
        return
    place = (tl.program_id(0) - 1) * PLACES + tl.arange(0, PLACES)
    expert = tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), 1)
    here = ids[None, :] == expert[:, None]
    index = place - tl.sum(tl.where(here, (ends - counts)[None, :], 0), 1)
    routed = place < tl.max(ends, 0)
    beyond = place - num_routed
    shared = (beyond >= 0) & (beyond < PARTS * num_rows)
    listed = tl.load(lists_ptr + expert * list_stride + index, mask=routed, other=0)
    row, choice = listed // SLOTS, listed % SLOTS
    assignment = tl.where(shared, beyond % num_rows * SLOTS + TOP_K + beyond // num_rows, listed)
    scale = tl.load(weights_ptr + row * TOP_K + choice, mask=routed, other=1.0)
    tl.store(order_ptr + place, assignment, mask=routed | shared)
    tl.store(scales_ptr + place, scale, mask=routed | shared)
    column = tl.arange(0, D_POW2)[None, :]
    mask = routed[:, None] & (column < D)
    values = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + column, mask=mask, other=0.0)
    tl.store(sorted_ptr + place.to(tl.int64)[:, None] * D + column, values, mask=mask)


def sort_rows(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    counts: torch.Tensor,
    lists: torch.Tensor,
    scratch: SortedRows,
    *,
    rows: int,
) -> None:
    """The first launch: fills `scratch`, for tiles of so many rows."""
    (num_rows, width), top_k, num_experts, places = x.shape, weights.shape[1], experts.down.shape[0], 4
    _sort_kernel[(1 + cdiv(num_rows * (top_k + experts.parts), places),)](
        x, weights, counts, lists, scratch.rows, scratch.order, scratch.scales, scratch.table, num_rows,
        lists.stride(0), D=width, D_POW2=next_power_of_2(width), NUM_EXPERTS=num_experts,
        EXPERTS_POW2=next_power_of_2(num_experts + 1), TOP_K=top_k, PARTS=experts.parts, ROWS=rows, PLACES=places,
        num_warps=4,
    )  # fmt: skip
