"""Triton kernels of the decode step. `unsupported` says whether a policy can use them; only then import the rest."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def unsupported(policy: Any) -> str | None:
    """Why this policy has to decode with plain torch, or None: the kernels take it."""
    weight = policy.lm_head.weight
    if not weight.is_cuda:
        return f"its parameters are on {weight.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"its dtype is {weight.dtype}"
    config = policy.config
    widths = [config.hidden_size, config.intermediate_size, config.moe_intermediate_size or 0, config.cache_width]
    if any(width * weight.element_size() % 16 for width in widths):
        return f"rows of its matrices are not multiples of 16 bytes ({widths} x {weight.dtype})"
    if any(matrix.data_ptr() % 16 for matrix in policy.parameters() if matrix.dim() >= 2):
        return "a matrix does not begin at a multiple of 16 bytes, as in a flat buffer behind one of odd length"
    if config.kv_lora_rank > 512:
        return f"kv_lora_rank = {config.kv_lora_rank}: their shared memory holds latents of 512"
    if torch.version.hip is not None:
        return "they are written for NVIDIA's GPUs"
    if torch.cuda.get_device_capability(weight.device)[0] not in (9, 10):  # 8 has no bulk copies, 12 too little memory
        return "they use the bulk copies and the 227 KB of shared memory of data-centre GPUs since Hopper"
    return None
