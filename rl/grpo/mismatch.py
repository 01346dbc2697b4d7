"""How far the sampler is from the trainer: KL of their logprobs, and how often they chose other experts.

Both should be one model. They differ by rounding, by kernels, by experts chosen differently in a mixture of experts,
and by weights that are a step old; large values mean that the update is off-policy without knowing it. Everything is
returned as sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def logprob_mismatch(sampling_logprobs: Tensor, trainer_logprobs: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
    """Sums over masked tokens, any one shape: `mismatch_kl_sum`, `mismatch_abs_sum` (nats) and `mismatch_tokens`.

    KL(sampling || trainer) by Schulman's k3, exp(d) - 1 - d with d = trainer - sampling: unbiased on tokens drawn by
    the sampler, and each term is >= 0, so a difference cannot cancel. Values outside the mask may be anything.
    """
    mask = loss_mask.bool()
    difference = torch.where(mask, trainer_logprobs.detach().double() - sampling_logprobs.double(), 0.0)
    return {
        "mismatch_kl_sum": (torch.expm1(difference) - difference).sum(),
        "mismatch_abs_sum": difference.abs().sum(),
        "mismatch_tokens": mask.double().sum(),
    }


def routing_disagreement(recorded: Tensor, live: Tensor) -> dict[str, Tensor]:
    """Compare experts chosen, (T, Lm, K) each, as sets per token and layer (the order inside K means nothing).

    Sums: `routes_differing` (token-layers with another set), `experts_differing` (recorded experts that are not in the
    live set), and their denominators `routes_total` = T * Lm, `experts_total` = T * Lm * K.
    """
    if recorded.shape != live.shape or recorded.dim() != 3:
        raise ValueError(f"routes of shapes {tuple(recorded.shape)} and {tuple(live.shape)}: expected one (T, Lm, K)")
    common = (recorded.long().unsqueeze(-1) == live.long().unsqueeze(-2)).any(-1)
    return {
        "routes_differing": (~common).any(-1).double().sum(),
        "experts_differing": (~common).double().sum(),
        "routes_total": torch.tensor(float(common[..., 0].numel()), dtype=torch.float64, device=common.device),
        "experts_total": torch.tensor(float(common.numel()), dtype=torch.float64, device=common.device),
    }


def summarize_mismatch(sums: Mapping[str, float]) -> dict[str, float]:
    """Totals of the sums above -> `mismatch_kl`, `mismatch_abs` (nats per token), `routing/disagreement_frac` (of
    token-layers), `routing/experts_differing_frac`; only those whose sums are there, NaN where nothing was compared."""
    names = {
        "mismatch_kl": ("mismatch_kl_sum", "mismatch_tokens"),
        "mismatch_abs": ("mismatch_abs_sum", "mismatch_tokens"),
        "routing/disagreement_frac": ("routes_differing", "routes_total"),
        "routing/experts_differing_frac": ("experts_differing", "experts_total"),
    }
    present = {name: pair for name, pair in names.items() if pair[0] in sums}
    return {name: float(sums[top]) / (float(sums[bottom]) or math.nan) for name, (top, bottom) in present.items()}
