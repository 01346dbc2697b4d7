"""Temperature, log-sum-exp and the Gumbel-max draw in one pass over the logits.

In: logits (N, V), seeds and steps (N,) int64, and a two-number device tensor [1 / temperature, noise] (greedy: [1,
0]), so that one captured graph serves every temperature. Out: token (N,) int64 and its log-probability (N,) float32.
The noise is that of `rl.rollout.sampling` (SplitMix64 of row key and vocabulary id), so torch draws the same tokens
but where two candidates tie within rounding. Truncated sampling (top-p, top-k, min-p) sorts, and stays with torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import cdiv, next_power_of_2

_BLOCK = 1024
_CHUNK = 8 * _BLOCK


@triton.jit
def _mix(x):
    """SplitMix64's output function on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _log(x, FAST: tl.constexpr):
    """ln x; FAST: the special-function unit's log2, good to 2^-22 near 1 and far better than the draw needs."""
    if FAST:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        result = log2 * 0.6931471805599453
    else:
        result = tl.log(x)
    return result


@triton.jit
def _exponential(key, ids, FAST: tl.constexpr):
    """Exp(1) draws: -log(1 - u), u = (32 bits + 1/2) / 2^32; by its series where u is small, which keeps all bits."""
    bits = (_mix(key + (ids + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32).to(tl.uint32)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * (0.25 + u * 0.2))))
    return tl.where(u < 0.02, series, -_log(1.0 - u, FAST))


@triton.jit
def _race_kernel(
    logits_ptr,
    seeds_ptr,
    steps_ptr,
    how_ptr,
    best_ptr,
    token_ptr,
    logit_ptr,
    top_ptr,
    total_ptr,
    vocab,
    stride,
    step_offset,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row's ids of one chunk: the best score with its id and logit, and max and sum of the exponentials."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    inverse = tl.load(how_ptr)
    noisy = tl.load(how_ptr + 1)
    golden = 0x9E3779B97F4A7C15
    seed = tl.load(seeds_ptr + row).to(tl.uint64)
    step = (tl.load(steps_ptr + row) + step_offset).to(tl.uint64)
    key = _mix(_mix(seed + golden) + step * golden)

    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    logit = tl.zeros((BLOCK,), tl.float32)
    line = logits_ptr + row.to(tl.int64) * stride
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, vocab), BLOCK):
        ids = start + lane
        inside = ids < vocab
        value = tl.load(line + ids, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        # One exponential a number: exp(-|difference|) fades either the sum so far or the newcomer.
        fade = tl.where(value == top, 1.0, tl.exp(-tl.abs(value - top)))
        total = tl.where(value > top, total * fade + 1.0, tl.where(inside, total + fade, total))
        top = tl.maximum(top, value)
        score = value - noisy * _log(_exponential(key, ids, FAST), FAST)
        better = score > best
        best = tl.where(better, score, best)
        token = tl.where(better, ids, token)
        logit = tl.where(better, value, logit)
    place = row * tl.num_programs(1) + chunk
    top_all = tl.max(top, 0)
    anchor = tl.where(top_all == float("-inf"), 0.0, top_all)
    tl.store(top_ptr + place, top_all)
    tl.store(total_ptr + place, tl.sum(total * tl.exp(top - anchor), 0))
    best_all = tl.max(best, 0)
    winner = tl.min(tl.where(best == best_all, token, 2147483647), 0)
    tl.store(best_ptr + place, best_all)
    tl.store(token_ptr + place, winner)
    tl.store(logit_ptr + place, tl.max(tl.where((best == best_all) & (token == winner), logit, float("-inf")), 0))


@triton.jit
def _finish_kernel(
    best_ptr, token_ptr, logit_ptr, top_ptr, total_ptr, tokens_ptr, logprobs_ptr,
    CHUNKS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.arange(0, POW2)
    real = chunk < CHUNKS
    place = row * CHUNKS + chunk
    best = tl.load(best_ptr + place, mask=real, other=float("-inf"))
    tokens = tl.load(token_ptr + place, mask=real, other=2147483647)
    logits = tl.load(logit_ptr + place, mask=real, other=float("-inf"))
    tops = tl.load(top_ptr + place, mask=real, other=float("-inf"))
    totals = tl.load(total_ptr + place, mask=real, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    token = tl.min(tl.where(best == tl.max(best, 0), tokens, 2147483647), 0)
    logit = tl.max(tl.where(tokens == token, logits, float("-inf")), 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logit - top - tl.log(total))


def race(
    logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, how: torch.Tensor, *, step_offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass over the logits: -> floats (4, N, chunks): best score, its logit, top logit, sum of exponentials;
    winning ids (N, chunks) int32. Randomness is that of step `steps[n] + step_offset`."""
    num_rows, vocab = logits.shape
    chunks = cdiv(vocab, _CHUNK)
    floats = torch.empty(4, num_rows, chunks, dtype=torch.float32, device=logits.device)
    winners = torch.empty(num_rows, chunks, dtype=torch.int32, device=logits.device)
    _race_kernel[(num_rows, chunks)](
        logits, seeds, steps, how, floats[0], winners, floats[1], floats[2], floats[3], vocab, logits.stride(0),
        step_offset, BLOCK=_BLOCK, CHUNK=_CHUNK, FAST=logits.is_cuda, num_warps=4,
    )  # fmt: skip
    return floats, winners


def draw(
    logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, how: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V), last axis contiguous; seeds, steps (N,) int64; how (2,) float32 -> token int64, logprob
    float32."""
    num_rows = logits.shape[0]
    floats, winners = race(logits, seeds, steps, how)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    chunks = winners.shape[1]
    _finish_kernel[(num_rows,)](
        floats[0], winners, floats[1], floats[2], floats[3], tokens, logprobs,
        CHUNKS=chunks, POW2=next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return tokens, logprobs
