"""Router and dispatch in one kernel: scores, group-limited top-k, weights, the record of the choice, and each
expert's list.

In: h (N, D). Out: weights (N, K) float32; the chosen experts in the route record; counts (E,) int32 and lists (E, >=
N) int32 with the assignment numbers n * P + k of each expert, filled by atomic counters (so the order within a list
varies from run to run; `moe.py` does not care). Rows whose place is negative are idle: they join no list, so they
touch no expert.

As `rl.policy.moe.Router`: fp32 scores (bf16 products are exact in the fp32 accumulator), bias for the choice only, a
group counts by its two best biased scores (sigmoid) or its best (softmax). A row of NaN chooses K experts like any
other, and has weights of NaN."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rl.rollout.arena import Zeros
from rl.rollout.kernels.layout import cdiv, next_power_of_2

_ROWS, _PARTS = 16, 4  # rows of a program, parts of D
_MOST_SHARED = 160 * 1024  # bytes that two blocks of the gate matrix may take


@triton.jit(do_not_specialize=["num_rows"])
def _router_kernel(
    h_ptr,
    gate_ptr,
    bias_ptr,
    weights_ptr,
    counts_ptr,
    lists_ptr,
    record_ptr,
    slots_ptr,
    places_ptr,
    partial_ptr,
    tickets_ptr,
    num_rows,
    list_stride,
    record_slot_stride,
    record_place_stride,
    scaling,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, p): the p-th part of D for BLOCK_M rows. Whoever finishes last of a block's parts adds them up and
    routes: one multiprocessor alone would need 3 us just to read the gate matrix."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    expert = tl.arange(0, EXPERTS_POW2)
    real = (expert < EXPERTS)[None, :]
    inner = tl.arange(0, BLOCK_K)
    logits = tl.zeros((BLOCK_M, EXPERTS_POW2), tl.float32)
    part = tl.program_id(1)
    part_depth: tl.constexpr = (D + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    for start in range(0, part_depth, BLOCK_K):
        depth = part * part_depth + start + inner
        h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * D + depth[None, :],
                    mask=valid[:, None] & (depth < D)[None, :], other=0.0)  # fmt: skip
        gate = tl.load(gate_ptr + expert[:, None] * D + depth[None, :],
                       mask=(expert < EXPERTS)[:, None] & (depth < D)[None, :], other=0.0)  # fmt: skip
        if gate_ptr.dtype.element_ty != h_ptr.dtype.element_ty:
            h = h.to(tl.float32)
            gate = gate.to(tl.float32)
        logits = tl.dot(h, tl.trans(gate), logits, input_precision=PRECISION)
    if PARTS > 1:
        block = tl.program_id(0)
        places = rows[:, None] * EXPERTS_POW2 + expert[None, :]
        part_size = num_rows * EXPERTS_POW2
        tl.store(partial_ptr + part * part_size + places, logits, mask=valid[:, None])
        tl.debug_barrier()
        if tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel") < PARTS - 1:
            return
        tl.store(tickets_ptr + block, 0)
        logits = tl.zeros((BLOCK_M, EXPERTS_POW2), tl.float32)
        for other in tl.static_range(PARTS):
            theirs = partial_ptr + other * part_size + places
            logits += tl.load(theirs, mask=valid[:, None], other=0.0, cache_modifier=".cg")
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(real, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    choice = scores
    if bias_ptr is not None:
        choice = scores + tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0)[None, :]
    choice = tl.where(choice == choice, choice, -1e30)  # argmax would name one NaN again and again
    choice = tl.where(real, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        group_of = (expert // (EXPERTS // GROUPS))[None, :]
        group = tl.arange(0, GROUPS_POW2)[None, :]
        worth = tl.full((BLOCK_M, GROUPS_POW2), float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            members = tl.where(group_of == g, choice, float("-inf"))
            best = tl.max(members, 1)
            if SIGMOID:
                at = tl.argmax(members, 1)
                best += tl.max(tl.where(expert[None, :] == at[:, None], float("-inf"), members), 1)
            worth = tl.where(group == g, best[:, None], worth)
        kept = tl.zeros((BLOCK_M, EXPERTS_POW2), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            at = tl.argmax(worth, 1)
            kept = tl.where(group_of == at[:, None], 1, kept)
            worth = tl.where(group == at[:, None], float("-inf"), worth)
        choice = tl.where(kept == 1, choice, float("-inf"))

    slot = tl.load(slots_ptr + rows, mask=valid, other=0).to(tl.int64)
    place = tl.load(places_ptr + rows, mask=valid, other=-1).to(tl.int64)
    busy = valid & (place >= 0)
    rank = tl.arange(0, TOP_K_POW2)[None, :]
    weights = tl.zeros((BLOCK_M, TOP_K_POW2), tl.float32)
    chosen = tl.zeros((BLOCK_M, TOP_K_POW2), tl.int32)
    for k in tl.static_range(TOP_K):
        at = tl.argmax(choice, 1)
        here = expert[None, :] == at[:, None]
        chosen = tl.where(rank == k, at[:, None], chosen)
        weights = tl.where(rank == k, tl.sum(tl.where(here, scores, 0.0), 1)[:, None], weights)
        choice = tl.where(here, float("-inf"), choice)
    listed = busy[:, None] & (rank < TOP_K)
    position = tl.atomic_add(counts_ptr + chosen, 1, mask=listed, sem="relaxed")
    record = record_ptr + (slot * record_slot_stride + place * record_place_stride)[:, None] + rank
    tl.store(record, chosen.to(record_ptr.dtype.element_ty), mask=listed)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    weights = weights * scaling
    tl.store(weights_ptr + rows[:, None] * TOP_K + rank, weights, mask=valid[:, None] & (rank < TOP_K))
    tl.store(lists_ptr + chosen * list_stride + position, rows[:, None] * SLOTS + rank, mask=listed)


def router_scratch(max_rows: int, experts: int, zeros: Zeros) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial scores and, for each block of rows, how many parts are done (0 between calls)."""
    padded = max(16, next_power_of_2(experts))
    partial = zeros((_PARTS * max_rows * padded,), torch.float32)
    return partial, zeros((cdiv(max_rows, _ROWS),), torch.int32)


def route(
    h: torch.Tensor,
    router: Any,
    *,
    num_shared: int,
    slots: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    lists: torch.Tensor,
    record: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """router: `rl.policy.moe.Router`. counts must be 0 on entry. record: (slots, T, K) view of the route record of this
    layer, last axis contiguous; row n writes record[slots[n], places[n]]. weights, lists: see the
    module. scratch: see `router_scratch`; calls that share it must not overlap."""
    num_rows, width = h.shape
    partial, tickets = scratch
    experts, top_k = router.num_experts, router.top_k
    exact = torch.float32 in (h.dtype, router.weight.dtype)
    groups = router.num_groups if router.limit_groups else 1
    padded, block_k = max(16, next_power_of_2(experts)), 32 if exact else 128
    while block_k > 16 and 2 * (padded + _ROWS) * block_k * (4 if exact else 2) > _MOST_SHARED:
        block_k //= 2
    _router_kernel[(cdiv(num_rows, _ROWS), _PARTS)](
        h, router.weight, router.e_score_correction_bias, weights, counts, lists, record, slots, places,
        partial, tickets, num_rows, lists.stride(0), record.stride(0), record.stride(1), router.scaling,
        D=width, EXPERTS=experts, EXPERTS_POW2=padded,
        TOP_K=top_k, TOP_K_POW2=next_power_of_2(top_k), SLOTS=top_k + num_shared,
        GROUPS=groups, GROUPS_POW2=next_power_of_2(groups), TOP_GROUPS=router.top_groups if groups > 1 else 1,
        SIGMOID=router.sigmoid, NORMALISE=router.normalise,
        PARTS=_PARTS, BLOCK_M=_ROWS, BLOCK_K=block_k, PRECISION="ieee" if exact else "tf32",
        num_warps=4, num_stages=3,
    )  # fmt: skip
