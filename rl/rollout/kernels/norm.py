"""Residual sum and RMSNorm in one pass: x += sum of the parts of the last block's output; h = x / rms(x) * weight.

`embed_norm` begins with x = the tokens' embeddings instead.

In: residual x (N, D), parts (N, P, D) (those of `moe.grouped_experts`, or one: an attention block's output) and
optionally extra (N, D), summed in fp32. Out: x in place (rounded once to its dtype, and normalised as rounded, like
the trainer's) and h (N, D). """

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rl.rollout.kernels.layout import next_power_of_2


@triton.jit
def _combine_norm_kernel(
    x_ptr,
    tokens_ptr,
    table_ptr,
    parts_ptr,
    extra_ptr,
    weight_ptr,
    h_ptr,
    eps,
    D: tl.constexpr,
    D_POW2: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_POW2)
    inside = column < D
    dtype = x_ptr.dtype.element_ty
    if tokens_ptr is None:
        x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0)
    else:
        x = tl.load(table_ptr + tl.load(tokens_ptr + row).to(tl.int64) * D + column, mask=inside, other=0.0)
        tl.store(x_ptr + row * D + column, x, mask=inside)
    if PARTS > 0:
        total = tl.zeros((D_POW2,), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(parts_ptr + (row * PARTS + part) * D + column, mask=inside, other=0.0).to(tl.float32)
        if extra_ptr is not None:
            total += tl.load(extra_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + total).to(dtype)
        tl.store(x_ptr + row * D + column, x, mask=inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * D + column, (x * inverse * weight).to(h_ptr.dtype.element_ty), mask=inside)


def combine_norm(
    x: torch.Tensor,
    parts: torch.Tensor | None,
    extra: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """x: (N, D), updated in place; parts: (N, P, D) contiguous and extra: (N, D), or None for none -> out (N, D)."""
    num_rows, width = x.shape
    _combine_norm_kernel[(num_rows,)](
        x, None, None, parts, extra, weight, out, eps, D=width, D_POW2=next_power_of_2(width),
        PARTS=0 if parts is None else parts.shape[1], num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return out


def embed_norm(
    tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float, *, x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """tokens: (N,) integers; table: (V, D), contiguous -> x (N, D), their embeddings; out (N, D), normalised."""
    num_rows, width = x.shape
    _combine_norm_kernel[(num_rows,)](
        x, tokens, table, None, None, weight, out, eps, D=width, D_POW2=next_power_of_2(width),
        PARTS=0, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return out
