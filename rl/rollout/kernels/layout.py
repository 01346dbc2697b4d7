"""Small facts that the kernels share: how to divide, how to round up, how to multiply exactly."""

from __future__ import annotations

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least n >= 1. Triton's own goes through a wrapper: 9 us of the host, several a launch."""
    return 1 << (n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are done in fp32 (Triton's default would be tf32, off by 3e-4); bf16 ones are exact either way."""
    return "ieee" if dtype == torch.float32 else "tf32"
