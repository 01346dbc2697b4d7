"""Small facts that the kernels share: how to divide, how to multiply exactly, how to follow one another closely."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are done in fp32 (Triton's default would be tf32, off by 3e-4); bf16 ones are exact either way."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def follow(CHAINED: tl.constexpr):
    """First statement of every kernel: let the next kernel of the stream be set up already, and wait until the one before
    has written everything (programmatic dependent launch). Without CHAINED the stream's ordinary order holds."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()


def chained(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel that begins with `follow`."""
    return {"CHAINED": True, "launch_pdl": True} if tensor.is_cuda else {"CHAINED": False}
