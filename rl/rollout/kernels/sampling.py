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

_LANES, _FOLDS, _CHUNK, _WARPS = 32, 1, 4096, 1  # 8 * _FOLDS ids of a lane at a time; ids of a program


@triton.jit
def _mix(x):
    """SplitMix64's output function on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """FAST: the special-function unit's, good to 2^-22 near 1 and far better than the draw needs."""
    if FAST:
        result = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        result = tl.log2(x)
    return result


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    """FAST: without the three more instructions that would keep results under 2^-126."""
    if FAST:
        result = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def _exponential(bits, FAST: tl.constexpr):
    """Exp(1) draws: -log(1 - u), u = (32 bits + 1/2) / 2^32; by its series where u is small, which keeps all bits."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * (0.25 + u * 0.2))))
    return tl.where(u < 0.02, series, -0.6931471805599453 * _log2(1.0 - u, FAST))


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
    LANES: tl.constexpr,
    FOLDS: tl.constexpr,
    CHUNK: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row's ids of one chunk: the best score with its id and logit, and max and sum of the exponentials.

    An id can win only if its draw e < exp(value - best). As e >= u, u is compared first, with the exponential that the
    sum needs anyway; only a block of ids that holds such a candidate (after n blocks every n-th) takes logarithms."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    inverse = tl.load(how_ptr)
    noisy = tl.load(how_ptr + 1)
    golden: tl.constexpr = 0x9E3779B97F4A7C15
    log2e: tl.constexpr = 1.4426950408889634
    seed = tl.load(seeds_ptr + row).to(tl.uint64)
    step = (tl.load(steps_ptr + row) + step_offset).to(tl.uint64)
    key = _mix(_mix(seed + golden) + step * golden)

    BLOCK: tl.constexpr = FOLDS * LANES * 8
    hop: tl.constexpr = (BLOCK * golden) & 0xFFFFFFFFFFFFFFFF
    shape: tl.constexpr = [LANES, FOLDS, 8]
    lane, fold = tl.arange(0, LANES)[:, None, None], tl.arange(0, FOLDS)[None, :, None]
    one = tl.arange(0, 8)[None, None, :]
    group = fold * (LANES * 8) + lane * 8
    ids = chunk * CHUNK + tl.broadcast_to(group + one, shape)
    noise = key + (chunk * CHUNK + group + 1).to(tl.uint64) * golden
    ahead = one.to(tl.uint64) * golden
    certain = tl.where(noisy == 0.0, 0xFFFFFFFF, 0).to(tl.uint32)  # without noise u = 1
    scale = inverse * log2e
    best = float("-inf")
    token = 0
    logit = float("-inf")
    top = tl.full((LANES,), -1e38, tl.float32)  # in units of ln 2
    total = tl.zeros((LANES,), tl.float32)
    line = logits_ptr + row.to(tl.int64) * stride
    after = tl.load(line + ids, mask=ids < vocab, other=float("-inf"))
    for _ in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, vocab), BLOCK):
        value = after.to(tl.float32)
        after = tl.load(line + ids + BLOCK, mask=ids + BLOCK < vocab, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tl.max(value, 2), 1) * scale)
        share = _exp2(value * scale - higher[:, None, None], FAST)
        total = total * _exp2(top - higher, FAST) + tl.sum(tl.sum(share, 2), 1)
        top = higher

        bits = (_mix(noise + ahead) >> 32).to(tl.uint32)
        # 1.001 and 2^-22 are for rounding; 1 + u is rounded down to 23 bits.
        most = 1.001 * _exp2(tl.minimum(top - best * log2e, 60.0), FAST)
        above = (((bits | certain) >> 9) + 0x3F800000).to(tl.float32, bitcast=True)
        margin = tl.max(tl.max(share * most[:, None, None] - above, 2), 1)
        if tl.max((margin > -1.0000002384185791).to(tl.int32), 0) > 0:
            value = value * inverse
            score = value - (noisy * 0.6931471805599453) * _log2(_exponential(bits, FAST), FAST)
            highest = tl.max(score)
            if highest > best:
                best = highest
                token = tl.min(tl.where(score == highest, ids, 2147483647))
                logit = tl.max(tl.where(ids == token, value, float("-inf")))
        ids += BLOCK
        noise += hop
    place = row * tl.num_programs(1) + chunk
    top_all = tl.max(top, 0)
    tl.store(top_ptr + place, top_all * 0.6931471805599453)
    tl.store(total_ptr + place, tl.sum(total * _exp2(top - top_all, FAST), 0))
    tl.store(best_ptr + place, best)
    tl.store(token_ptr + place, token)
    tl.store(logit_ptr + place, logit)


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
        step_offset, LANES=_LANES, FOLDS=_FOLDS, CHUNK=_CHUNK, FAST=logits.is_cuda, num_warps=_WARPS,
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
