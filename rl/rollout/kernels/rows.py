"""The two ends of a captured step on the row state: what the rows feed now, and what becomes of the tokens drawn.

`begin` turns the state (lengths, done flags) into the step's int32 indices and clears the experts' counters. `finish`
ends the draw of `sampling.py`: it merges the chunks of each row's vocabulary, writes token and log-probability behind
the row's outputs, counts its length up and decides whether it has ended (a stop token, or `row_limit` tokens). A row
that had ended before stands still; what it draws lands in the spare place behind its end, where its last step put it
too. """

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, next_power_of_2


@dataclass(frozen=True, slots=True)
class Rows:
    """Views of `rl.rollout.state.RowState`, row r in slot r. token, own_len, prompt_slot, prompt_len, seed,
    row_limit: (S,) int64; done: (S,) bool; out_tokens: (S, limit + 1) int64; out_logprobs: (S, limit + 1) float32;
    stops: (any,) int64."""

    token: torch.Tensor
    own_len: torch.Tensor
    prompt_slot: torch.Tensor
    prompt_len: torch.Tensor
    seed: torch.Tensor
    done: torch.Tensor
    out_tokens: torch.Tensor
    out_logprobs: torch.Tensor
    stops: torch.Tensor
    row_limit: torch.Tensor


@triton.jit(do_not_specialize=["num_rows", "num_counts"])
def _begin_kernel(
    own_len_ptr,
    prompt_slot_ptr,
    prompt_len_ptr,
    done_ptr,
    positions_ptr,
    places_ptr,
    own_lengths_ptr,
    prompt_slots_ptr,
    prompt_lengths_ptr,
    counts_ptr,
    num_rows,
    num_counts,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts_ptr + index, tl.zeros((BLOCK,), tl.int32), mask=index < num_counts)
    real = index < num_rows
    own = tl.load(own_len_ptr + index, mask=real, other=0).to(tl.int32)
    prompt = tl.load(prompt_len_ptr + index, mask=real, other=0).to(tl.int32)
    idle = tl.load(done_ptr + index, mask=real, other=1) != 0
    own = tl.maximum(own, 0)
    tl.store(positions_ptr + index, tl.where(idle, 0, prompt + own), mask=real)
    tl.store(places_ptr + index, tl.where(idle, -1, own), mask=real)
    tl.store(own_lengths_ptr + index, tl.where(idle, 0, own + 1), mask=real)
    tl.store(prompt_slots_ptr + index, tl.load(prompt_slot_ptr + index, mask=real, other=0).to(tl.int32), mask=real)
    tl.store(prompt_lengths_ptr + index, prompt, mask=real)


@triton.jit
def _finish_rows_kernel(
    best_ptr,
    winner_ptr,
    logit_ptr,
    top_ptr,
    total_ptr,
    token_ptr,
    own_len_ptr,
    done_ptr,
    out_tokens_ptr,
    out_logprobs_ptr,
    stops_ptr,
    row_limit_ptr,
    limit,
    num_stops,
    CHUNKS: tl.constexpr,
    CHUNKS_POW2: tl.constexpr,
    STOPS_POW2: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS_POW2)
    real = chunk < CHUNKS
    place = row * CHUNKS + chunk
    best = tl.load(best_ptr + place, mask=real, other=float("-inf"))
    winners = tl.load(winner_ptr + place, mask=real, other=2147483647)
    logits = tl.load(logit_ptr + place, mask=real, other=float("-inf"))
    tops = tl.load(top_ptr + place, mask=real, other=float("-inf"))
    totals = tl.load(total_ptr + place, mask=real, other=0.0)
    own = tl.load(own_len_ptr + row)
    done = tl.load(done_ptr + row) != 0
    stop = tl.arange(0, STOPS_POW2)
    stops = tl.load(stops_ptr + stop, mask=stop < num_stops, other=-1)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    token = tl.min(tl.where(best == tl.max(best, 0), winners, 2147483647), 0)
    logit = tl.max(tl.where(winners == token, logits, float("-inf")), 0)
    wide = token.to(tl.int64)
    out = row.to(tl.int64) * (limit + 1) + own + 1
    tl.store(out_tokens_ptr + out, wide)
    tl.store(out_logprobs_ptr + out, logit - top - tl.log(total))
    own = tl.where(done, own, own + 1)
    stopped = tl.sum((stops == wide).to(tl.int32), 0) > 0
    ended = done | stopped | (own + 1 >= tl.load(row_limit_ptr + row))
    tl.store(token_ptr + row, wide, mask=done == 0)
    tl.store(own_len_ptr + row, own)
    tl.store(done_ptr + row, ended.to(tl.int8))


def begin(
    rows: Rows, indices: torch.Tensor, counts: torch.Tensor | None, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """indices: (5, >= N) int32 scratch; counts: int32, zeroed -> positions, places, own_lengths, prompt_slots,
    prompt_lengths, each (N,)."""
    outputs = tuple(line[:num_rows] for line in indices)
    num_counts = 0 if counts is None else counts.numel()
    block = 1024
    _begin_kernel[(cdiv(max(num_rows, num_counts), block),)](
        rows.own_len, rows.prompt_slot, rows.prompt_len, rows.done.view(torch.int8), *outputs,
        indices if counts is None else counts, num_rows, num_counts, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return outputs


def finish(rows: Rows, floats: torch.Tensor, winners: torch.Tensor) -> None:
    """floats: (4, N, chunks) and winners: (N, chunks) as `sampling.race` leaves them."""
    num_rows, chunks = winners.shape
    _finish_rows_kernel[(num_rows,)](
        floats[0], winners, floats[1], floats[2], floats[3], rows.token, rows.own_len, rows.done.view(torch.int8),
        rows.out_tokens, rows.out_logprobs, rows.stops, rows.row_limit,
        rows.out_tokens.shape[1] - 1, rows.stops.numel(),
        CHUNKS=chunks, CHUNKS_POW2=next_power_of_2(chunks),
        STOPS_POW2=next_power_of_2(max(rows.stops.numel(), 1)), num_warps=1,
    )  # fmt: skip
