"""Router load balance without an auxiliary loss: the selection bias of each expert follows its load (DeepSeek-V3, arXiv
2412.19437, section 2.1.2). Off by default: practice in RL differs, and a frozen bias keeps routing comparable between
steps."""

from __future__ import annotations

import torch
from torch import nn

from rl.policy.moe import Router, balanced_bias


def update_router_biases(policy: nn.Module, load: torch.Tensor, *, rate: float) -> None:
    """load: (Lm, E) tokens per expert and MoE layer over the whole step and all ranks. Changes the biases in place,
    equally on all ranks."""
    routers = [module for module in policy.modules() if isinstance(module, Router)]
    for router, layer_load in zip(routers, load, strict=True):
        bias = router.e_score_correction_bias
        if bias is None:
            raise ValueError(
                "model.router_bias_update_rate: this policy's router has no selection bias (topk_method noaux_tc has)"
            )
        bias.copy_(balanced_bias(bias, layer_load.to(bias.device), rate=rate))
