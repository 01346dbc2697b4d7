"""Logprobs and advantages of N completions -> the SUM of the policy loss and of its metrics.

The loss of an optimizer step is the total of these sums over every micro-batch and rank, divided once by
`loss_divisor`; so it does not depend on how rows are split or padded. With r_t = exp(policy - old logprob), A the row's
advantage, n its loss tokens:

    token objective: min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) - beta KL_t
        grpo     mean over rows of (sum_t / n). DeepSeekMath (arXiv 2402.03300), eq. 3.
        dapo     sum over tokens / tokens of the step. DAPO (2503.14476), eq. 8, clip-higher in eq. 10.
        bnpo     the same as dapo here. TRL divides bnpo by the tokens of the local micro-batch, so that the loss
                 depends on how rows fall into micro-batches and ranks; not to depend on that is worth more to us.
        dr_grpo  sum over tokens / (rows * max_completion_length). Dr. GRPO (2503.20783), section 3.2.
    gspo: one ratio per row, s = exp(mean_t log r_t), in the place of r; mean over rows. GSPO (2507.18071), eq. 5 and 7.
        GSPO-token (eq. 13) has the same value and gradient when, as here, a row has one advantage.
    cispo: stop_gradient(min(r, 1 + epsilon_high)) A log pi - beta KL_t; sum over tokens / tokens of the step.
        MiniMax-M1 (2506.13585), eq. 4 and 5, without the lower bound (as in the paper's runs), so `epsilon` plays no
        part. TRL's `epsilon_high` is the cap itself for cispo; here, as in the paper, the cap is 1 + epsilon_high.

KL_t is Schulman's k3 (2020, "Approximating KL divergence"): exp(ref - policy) - (ref - policy) - 1; `unbiased_kl`
multiplies it by r_t, gradient included (DeepSeek-V3.2, 2512.02556, eq. 7). delta, the two-sided clip, bounds the ratio
where A < 0 (INTELLECT-2, 2505.07291, two-sided clipping; the value of dual-clip PPO, 1912.09729).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]

# exp(20) = 5e8: far beyond any ratio of use, and keeps 0 advantage x infinite ratio from being NaN
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossSums:
    """loss: () tensor with gradient, to be divided by `loss_divisor`. metrics: 0-d float tensors without gradient, all
    sums over loss tokens or rows of this call: add them over micro-batches and ranks, then `summarize_metrics`."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    loss_type: LossType = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    unbiased_kl: bool = False,
    sampling_logprobs: Tensor | None = None,
    importance_sampling_cap: float | None = 2.0,
    off_policy_mask_threshold: float | None = None,
) -> LossSums:
    """Sum of the loss over (N, T) completion tokens; N rows, padded to T positions, loss_mask (N, T) bool or 0/1.

    advantages: (N,). Values under a 0 of the mask may be anything, NaN included. epsilon_high None means epsilon.
    ref_logprobs: needed when beta > 0. sampling_logprobs: what the engine drew from; when given and a cap is set, the
    policy term (not the KL) of each token is weighted by min(exp(old - sampling), cap), truncated importance sampling
    as in https://fengyao.notion.site/off-policy-rl; gspo uses the row's geometric mean, as for its ratio.
    off_policy_mask_threshold: rows with A < 0 whose mean of (sampling, or else old, minus policy logprob) exceeds it
    lose their policy term (V3.2, section 3.1); divisors stay. A row without loss tokens gives 0. Raises ValueError for
    options or shapes that do not fit together.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check_options(loss_type, epsilon, high, delta, beta, ref_logprobs)
    _check_shapes(policy_logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, sampling_logprobs)
    mask = loss_mask.bool()
    weight = mask.to(torch.promote_types(policy_logprobs.dtype, torch.float32))
    row_tokens = weight.sum(-1, keepdim=True).clamp(min=1)
    adv = advantages.to(weight.dtype).unsqueeze(-1)
    sequence_level = loss_type == "gspo"

    policy = torch.where(mask, policy_logprobs, 0.0).to(weight.dtype)
    ratio = _ratio(policy, old_logprobs, mask, row_tokens, sequence_level=sequence_level)
    if loss_type == "cispo":
        objective = ratio.detach().clamp(max=1 + high) * adv * policy
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        objective = torch.minimum(bounded * adv, ratio.clamp(1 - epsilon, 1 + high) * adv)

    metrics = _ratio_metrics(ratio.detach(), adv, weight, 0.0 if loss_type == "cispo" else 1 - epsilon, 1 + high)
    if sampling_logprobs is not None and importance_sampling_cap is not None:
        correction = _ratio(old_logprobs, sampling_logprobs, mask, row_tokens, sequence_level=sequence_level).detach()
        objective = objective * correction.clamp(max=importance_sampling_cap)
        metrics["importance_sum"] = (correction.clamp(max=importance_sampling_cap) * weight).sum()
        metrics["importance_capped"] = ((correction > importance_sampling_cap) * weight).sum()
    if off_policy_mask_threshold is not None:
        behaviour = old_logprobs if sampling_logprobs is None else sampling_logprobs
        drift = torch.where(mask, behaviour - policy.detach(), 0.0).sum(-1, keepdim=True) / row_tokens
        dropped = (drift > off_policy_mask_threshold) & (adv < 0)
        objective = torch.where(dropped, 0.0, objective)
        metrics["off_policy_rows"] = dropped.to(weight.dtype).sum()

    per_token = -objective
    if beta > 0 and ref_logprobs is not None:
        kl = _k3(policy, torch.where(mask, ref_logprobs, 0.0).to(weight.dtype))
        if unbiased_kl:
            kl = kl * _ratio(policy, old_logprobs, mask, row_tokens, sequence_level=False)
        per_token = per_token + beta * kl
        metrics["kl_sum"] = (kl.detach() * weight).sum()
    if loss_type in ("grpo", "gspo"):
        weight = weight / row_tokens
    return LossSums((per_token * weight).sum(), metrics)


def loss_divisor(
    loss_type: LossType, *, num_sequences: int, num_tokens: int, max_completion_length: int | None = None
) -> float:
    """What the total of the loss sums of one optimizer step is divided by.

    num_sequences: all rows of the step, those without loss tokens included; num_tokens: all its loss tokens; both over
    every micro-batch and rank. grpo, gspo: num_sequences. dapo, bnpo, cispo: num_tokens. dr_grpo: num_sequences *
    max_completion_length. At least 1, so that a step in which everything is masked has loss 0.
    """
    if loss_type in ("grpo", "gspo"):
        return float(max(1, num_sequences))
    if loss_type in ("dapo", "bnpo", "cispo"):
        return float(max(1, num_tokens))
    if loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(f"dr_grpo divides by max_completion_length, got {max_completion_length}")
        return float(max(1, num_sequences) * max_completion_length)
    raise ValueError(f"loss_type={loss_type!r}: expected one of {', '.join(get_args(LossType))}")


def summarize_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Totals of `LossSums.metrics` -> means per loss token (per row for the off-policy mask), under TRL's names.

    With no loss token at all there is nothing to take a mean of: NaN.
    """
    tokens, rows = sums["loss_tokens"] or math.nan, sums["loss_rows"] or math.nan
    names = {
        "clip_ratio/low_mean": ("clip_low", tokens),
        "clip_ratio/high_mean": ("clip_high", tokens),
        "clip_ratio/region_mean": ("clip_region", tokens),
        "ratio/mean": ("ratio_sum", tokens),
        "kl": ("kl_sum", tokens),
        "importance/mean": ("importance_sum", tokens),
        "importance/capped_frac": ("importance_capped", tokens),
        "off_policy_masked_frac": ("off_policy_rows", rows),
    }
    return {name: float(sums[key]) / count for name, (key, count) in names.items() if key in sums}


def _ratio(numerator: Tensor, denominator: Tensor, mask: Tensor, row_tokens: Tensor, *, sequence_level: bool) -> Tensor:
    """exp(numerator - denominator) of logprobs: (N, T), or the rows' geometric means (N, 1); 1 where masked."""
    log_ratio = torch.where(mask, numerator - denominator, 0.0).to(row_tokens.dtype)
    if sequence_level:
        log_ratio = log_ratio.sum(-1, keepdim=True) / row_tokens
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _k3(policy: Tensor, ref: Tensor) -> Tensor:
    """Schulman's k3 of KL(policy || ref) per token, >= 0. Its mean over tokens drawn from the policy is unbiased."""
    log_ratio = (ref - policy).clamp(max=_MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def _ratio_metrics(ratio: Tensor, adv: Tensor, weight: Tensor, lowest: float, highest: float) -> dict[str, Tensor]:
    """Counts in loss tokens; for a sequence ratio, the tokens of the rows concerned (as GSPO, section 5.1, counts)."""
    low = (ratio < lowest) & (adv < 0)
    high = (ratio > highest) & (adv > 0)
    return {
        "loss_tokens": weight.sum(),
        "loss_rows": (weight.sum(-1) > 0).to(weight.dtype).sum(),
        "clip_low": (low * weight).sum(),
        "clip_high": (high * weight).sum(),
        "clip_region": ((low | high) * weight).sum(),
        "ratio_sum": (ratio * weight).sum(),
    }


def _check_options(
    loss_type: str, epsilon: float, high: float, delta: float | None, beta: float, ref_logprobs: Tensor | None
) -> None:
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type={loss_type!r}: expected one of {', '.join(get_args(LossType))}")
    if epsilon < 0 or high < 0 or beta < 0:
        raise ValueError(f"epsilon={epsilon}, epsilon_high={high}, beta={beta}: none may be negative")
    if delta is not None and loss_type == "cispo":
        raise ValueError(f"delta={delta}: cispo has no second clip, leave delta out")
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"delta={delta}: must exceed 1 + epsilon_high = {1 + high}")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs")


def _check_shapes(policy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *optional: Tensor | None) -> None:
    shapes = [tuple(tensor.shape) for tensor in (policy, old, mask, *optional) if tensor is not None]
    if policy.dim() != 2 or len(set(shapes)) != 1:
        raise ValueError(f"logprobs and mask have shapes {shapes}: expected one (N, T)")
    if advantages.shape != policy.shape[:1]:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}: expected ({policy.shape[0]},), one per row")
