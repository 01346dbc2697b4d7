"""Router load balance without an auxiliary loss: the selection bias of each expert follows its load (DeepSeek-V3, arXiv
2412.19437, section 2.1.2). Off by default: practice in RL differs, and a frozen bias keeps routing comparable between
steps.

The load is counted where the loss is computed, from the experts that the policy used there: replayed ones or its own
choice, in the cold start as in GRPO.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rl.distributed import sum_tensor_over_ranks
from rl.policy.moe import Router, balanced_bias, expert_load
from rl.train.batching import MicroBatch
from rl.train.learner import LossFunction, Scored


class ExpertLoad:
    """Tokens that each expert of each MoE layer of `policy` got in the forward passes of a step. A row that several
    optimizer steps use counts in each; what a rank idles with does not count."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._counts: torch.Tensor | None = None

    def counting(self, loss_function: LossFunction) -> LossFunction:
        """The same loss function, which also counts the experts of every micro-batch that it is called with."""

        def counted(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if scored.routes is not None:
                self._add(scored.routes[:0] if batch.idle else scored.routes)
            return loss_function(scored, batch)

        return counted

    def over_ranks(self, device: torch.device) -> torch.Tensor | None:
        """(Lm, E) int64 over all ranks, the same on each; None for a policy whose experts cannot be seen."""
        return None if self._counts is None else sum_tensor_over_ranks(self._counts, device)

    def _add(self, routes: torch.Tensor) -> None:
        """routes: (S, Lm, K)"""
        experts = self._policy.config.n_routed_experts
        load = torch.stack([expert_load(routes[:, layer], experts) for layer in range(routes.shape[1])]).long()
        self._counts = load if self._counts is None else self._counts + load


def update_router_biases(policy: nn.Module, load: torch.Tensor, *, rate: float) -> None:
    """load: (Lm, E) tokens per expert and MoE layer over the whole step and all ranks. Changes the biases in place,
    equally on all ranks. Every router has one: `policy_check` refuses a rate for policies without."""
    routers = [module for module in policy.modules() if isinstance(module, Router)]
    for router, layer_load in zip(routers, load, strict=True):
        bias = router.e_score_correction_bias
        assert bias is not None, "a rate for a policy whose routers have no selection bias"
        bias.copy_(balanced_bias(bias, layer_load.to(bias.device), rate=rate))
