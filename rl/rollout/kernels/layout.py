"""Small facts that the kernels share: how to divide, how to multiply exactly."""

from __future__ import annotations

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are done in fp32 (Triton's default would be tf32, off by 3e-4); bf16 ones are exact either way."""
    return "ieee" if dtype == torch.float32 else "tf32"
