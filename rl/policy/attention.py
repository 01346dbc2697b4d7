"""Causal attention over packed sequences: the only operation of the policy that knows where sequences begin.

In: q, k (T, H, Q) and v (T, H, V) of all sequences, concatenated without padding. Out: (T, H, V).
On CUDA the variable-length flash kernel reads the packed layout as it is (v is zero-padded to the width of q and k,
which the kernel wants equal); elsewhere, or where a probe finds the kernel missing, sequences are padded on the
right, attended with SDPA and unpadded. Right padding needs no mask: under a causal mask no real token sees a later one.
Forwards without gradients on Hopper do not come here: `rl.policy.mla` gives them to `rl.policy.flash`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's variable-length kernel, or None. Imported late: it loads the compiler, 3 s on a laptop CPU."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast("Callable[..., Any]", varlen_attn)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the sequences of a packed batch lie; computed once per forward and shared by all layers.

    cu_seqlens: (S + 1,) int32. positions: (T,) int64, from 0 in each sequence. padded_rows: (T,) int64, the row of each
    token in a (S * max_seqlen)-row padded grid, or None when all sequences have max_seqlen tokens (packed = padded).
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_sequences: int
    positions: torch.Tensor
    padded_rows: torch.Tensor | None

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, *, num_tokens: int, max_seqlen: int) -> PackedLayout:
        """Reads only shapes on the host: no device synchronisation."""
        sequences = cu_seqlens.numel() - 1
        tokens = torch.arange(num_tokens, device=cu_seqlens.device)
        if num_tokens == sequences * max_seqlen:
            return cls(cu_seqlens, max_seqlen, sequences, tokens % max_seqlen if max_seqlen else tokens, None)
        starts = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(starts[1:], tokens, right=True)
        positions = tokens - starts[sequence]
        return cls(cu_seqlens, max_seqlen, sequences, positions, sequence * max_seqlen + positions)

    @functools.cached_property
    def query_tiles(self) -> torch.Tensor:
        """The schedule of `rl.policy.flash`, made by the first layer that wants it."""
        from rl.policy.flash import query_tiles

        return query_tiles(self.cu_seqlens, num_tokens=self.positions.shape[0], max_seqlen=self.max_seqlen)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, *, scale: float) -> torch.Tensor:
    """q, k: (T, H, Q), v: (T, H, V) -> softmax(q k^T * scale, causal, within each sequence) v: (T, H, V)."""
    width = max(q.shape[-1], v.shape[-1])
    if q.is_cuda and _varlen_works(q.device, q.dtype, width):
        kernel = _varlen_attn()
        assert kernel is not None
        out = kernel(
            _widen(q, width),
            _widen(k, width),
            _widen(v, width),
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            scale=scale,
            window_size=(-1, 0),
        )
        assert isinstance(out, torch.Tensor)
        return out[..., : v.shape[-1]]
    if not q.is_cuda:  # the CPU flash kernel takes one head width only; without it SDPA keeps (S, H, L, L) scores
        q, k, v, v_width = _widen(q, width), _widen(k, width), _widen(v, width), v.shape[-1]
        return _attend_padded(q, k, v, layout, scale)[..., :v_width]
    return _attend_padded(q, k, v, layout, scale)


def _attend_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    grid = (layout.num_sequences, layout.max_seqlen)
    rows = layout.padded_rows
    if rows is not None:
        q, k, v = (_Pad.apply(x, rows, grid[0] * grid[1]) for x in (q, k, v))
    q, k, v = (x.view(*grid, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    out = out.transpose(1, 2).reshape(grid[0] * grid[1], out.shape[1], out.shape[3])
    return out if rows is None else _Unpad.apply(out, rows)


class _Pad(torch.autograd.Function):
    """Rows to their place in a zero-filled grid; the gradient is the reverse gather (no scatter-add)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None


class _Unpad(torch.autograd.Function):
    """The transpose of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, rows, grad), None


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


@functools.cache
def _varlen_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the variable-length kernel runs, forward and backward, for this device, dtype and head width."""
    varlen_attn = _varlen_attn()
    if varlen_attn is None or dtype not in (torch.bfloat16, torch.float16) or width > 256 or width % 8:
        return False
    with torch.inference_mode(False), torch.enable_grad():  # the first caller may be a rollout
        q, k, v = (torch.zeros(16, 1, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        cu = torch.tensor([0, 16], device=device, dtype=torch.int32)
        try:
            out = varlen_attn(q, k, v, cu, cu, 16, 16, scale=1.0, window_size=(-1, 0))
            assert isinstance(out, torch.Tensor)
            out.sum().backward()
        except (RuntimeError, NotImplementedError):
            return False
    return True
