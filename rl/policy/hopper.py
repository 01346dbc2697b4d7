"""Which GPUs the kernels written for Hopper run on."""

from __future__ import annotations

import torch


def is_hopper(device: torch.device) -> bool:
    """AMD's GPUs call themselves 9, too."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
