"""The parts of a decode step in plain torch: the reference that the CUDA kernels are compared with, and the CPU's path.

N rows, H heads, C latent rank, R RoPE dims, E experts, K experts per token.

Two choices make them fast at small sizes on a CPU: attention folds the heads of a row (and for the prompt those of a
whole group) into the rows of one batched matmul, and each expert is one matmul over the tokens that chose it. No
matmul sees fewer than four rows of a larger problem, which keeps results exact: this library's matmuls give a row the
same bits for every row count >= 4 (measured with MKL on AVX-512), but others below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rl.policy.moe import experts_reference, grouped_mm_takes

MIN_MATMUL_ROWS = 4
_LOOP_STEP = 32  # numbers that a vectorised elementwise loop takes at a time; the rest goes through other instructions


def invariant_rows(num_experts: int) -> int:
    """Batches whose row count is a multiple of this give each row the same bits: matmuls need four rows, and the
    router's sigmoid over (N, E) needs N * E to be a whole number of vector steps (its scalar tail rounds
    differently)."""
    return math.lcm(MIN_MATMUL_ROWS, _LOOP_STEP // math.gcd(_LOOP_STEP, num_experts))


@dataclass(slots=True)
class AttentionPlan:
    """Who attends to what in one step; the same for all layers.

    slot (n,): the own slot of each row. own_len (n,): tokens of it to attend to, the one just written included.
    prompt_slot, prompt_len (n,). group_slot (B,), group_rows (B, Gmax): the rows of each prompt in flight, padded by
    repeating a row; cell (n,): where row r stands in the flattened `group_rows`. longest_own, longest_prompt: host-side
    upper bounds of the lengths. own_mask (n, 1, longest_own), prompt_mask (B, 1, longest_prompt): 0 or -inf, read by
    the reference only. regular: row r stands at place r and every prompt slot b holds group b, so nothing is
    gathered.
    """

    slot: torch.Tensor
    own_len: torch.Tensor
    prompt_slot: torch.Tensor
    prompt_len: torch.Tensor
    group_slot: torch.Tensor
    group_rows: torch.Tensor
    cell: torch.Tensor
    longest_own: int
    longest_prompt: int
    regular: bool
    own_mask: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (N, D) -> x / rms(x) * weight, the mean in fp32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Rotate x (N, R) or (N, H, R) in place; (2i, 2i+1) is a pair; turns (N, R/2) complex64, cos + i sin."""
    if x.dim() == 3:
        turns = turns[:, None]
    aligned = x.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
    if x.dtype == torch.float32 and aligned:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
    else:
        pairs = torch.view_as_complex(x.to(torch.float32, copy=True).unflatten(-1, (-1, 2)).contiguous())
        x.copy_(torch.view_as_real(pairs * turns).flatten(-2))


def write_latent(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    turns: torch.Tensor,
    own: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """latent (N, C+R) as projected: normalise its first C = len(weight) columns, rotate the rest, and store it in the
    cache own (S, T, C+R) at slots (N,), positions (N,). `latent` is overwritten."""
    rank = weight.shape[0]
    latent[:, :rank] = rms_norm(latent[:, :rank], weight, eps)
    rotate(latent[:, rank:], turns)
    own.index_put_((slots, positions), latent)


def attention(
    q: torch.Tensor, own: torch.Tensor, prompt: torch.Tensor, plan: AttentionPlan, scale: float, rank: int
) -> torch.Tensor:
    """Absorbed MLA decode: q (N, H, C+R) over prompt (P, Tp, C+R) and own (S, To, C+R) -> (N, H, C).

    One softmax over the row's prompt and its own tokens; the values are the first C = rank columns of the keys. Rows
    stand at the slot of their number (row r in slot r).
    """
    rows, heads, width = q.shape
    keys = own[:rows, : plan.longest_own]
    assert plan.own_mask is not None and plan.prompt_mask is not None
    own_scores = torch.baddbmm(plan.own_mask, q, keys.transpose(1, 2), alpha=scale)
    groups, largest = plan.group_rows.shape
    if plan.regular:
        prompt_keys = prompt[:groups, : plan.longest_prompt]
        grouped = q.reshape(groups, largest * heads, width)
    else:
        prompt_keys = prompt[:, : plan.longest_prompt].index_select(0, plan.group_slot)
        grouped = q.index_select(0, plan.group_rows.view(-1)).view(groups, largest * heads, width)
    prompt_scores = torch.baddbmm(plan.prompt_mask, grouped, prompt_keys.transpose(1, 2), alpha=scale)
    prompt_scores = prompt_scores.view(groups * largest, heads, -1)
    if not plan.regular:
        prompt_scores = prompt_scores.index_select(0, plan.cell)
    probs = torch.cat((prompt_scores, own_scores), dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
    prompt_probs = probs[..., : plan.longest_prompt]
    if not plan.regular:
        prompt_probs = prompt_probs.index_select(0, plan.group_rows.view(-1))
    from_prompt = torch.bmm(prompt_probs.reshape(groups, largest * heads, -1), prompt_keys[..., :rank])
    from_prompt = from_prompt.view(groups * largest, heads, rank)
    if not plan.regular:
        from_prompt = from_prompt.index_select(0, plan.cell)
    return torch.baddbmm(from_prompt, probs[..., plan.longest_prompt :], keys[..., :rank])


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(N, 2I) -> silu(first half) * second half, (N, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def experts_by_rows(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The routed experts' output: x (N, D), experts (N, K) int64, weights (N, K) fp32, gate_up (E, 2I, D), down (E,
    D, I). For CPU: reads the experts' counts on the host."""
    tokens, k = experts.shape
    chosen = experts.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=gate_up.shape[0])
    fewest = int(counts[counts > 0].min())
    offsets = counts.cumsum(0, dtype=torch.int32)
    inputs = F.pad(x.index_select(0, order // k), (0, 0, 0, MIN_MATMUL_ROWS))
    hidden = silu_mul(rows_by_expert(inputs, gate_up, offsets, choices=tokens * k, fewest=fewest))
    outputs = rows_by_expert(hidden, down, offsets, choices=tokens * k, fewest=fewest)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    parts = outputs.index_select(0, back).view(tokens, k, -1)
    return torch.bmm(weights.to(x.dtype)[:, None], parts).squeeze(1)


def rows_by_expert(
    rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor, *, choices: int, fewest: int
) -> torch.Tensor:
    """rows (M + 4, in), the first M = choices sorted by expert, expert e's ending at offsets[e]; matrices (E, out, in)
    -> (at least M, out), each row by its expert's matrix. fewest: rows of the smallest expert that has any.

    grouped_mm is one matmul per expert without Python between. Where it does not take the matrices, or an expert has
    fewer than four rows, the loop is ours and computes at least four (those of the next expert, or the padding); the
    next expert overwrites the surplus.
    """
    if fewest >= MIN_MATMUL_ROWS and grouped_mm_takes(matrices):
        return F.grouped_mm(rows[:choices], matrices.transpose(1, 2), offs=offsets)
    out = rows.new_empty(rows.shape[0], matrices.shape[1])
    out[-MIN_MATMUL_ROWS:] = 0
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            computed = max(stop, start + MIN_MATMUL_ROWS)
            torch.mm(rows[start:computed], matrices[expert].t(), out=out[start:computed])
            start = stop
    return out


def experts_grouped(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """As `experts_by_rows`, through grouped_mm and without any host-side count (for CUDA), where it takes the
    matrices."""
    if not grouped_mm_takes(gate_up, down):
        return experts_reference(x, experts, weights, gate_up, down)
    tokens, k = experts.shape
    ordered, order = experts.view(-1).sort(stable=True)
    bounds = torch.arange(gate_up.shape[0], device=x.device)
    offsets = torch.searchsorted(ordered, bounds, right=True).to(torch.int32)
    inputs = x.index_select(0, order // k)
    hidden = silu_mul(F.grouped_mm(inputs, gate_up.transpose(1, 2), offs=offsets))
    outputs = F.grouped_mm(hidden, down.transpose(1, 2), offs=offsets)
    weighted = outputs.float() * weights.view(-1)[order][:, None]
    result = torch.empty_like(weighted)
    result[order] = weighted
    return result.view(tokens, k, -1).sum(1).to(x.dtype)
