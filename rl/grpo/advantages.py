"""Rewards of a group of completions -> one advantage per completion.

In: rewards (B, G) float32, B problems with G completions each, NaN where no reward applies. Out: advantages (B, G)
float32.

    scale="group"  A = (r - mean_group) / (std_group + eps)    DeepSeekMath (arXiv 2402.03300), section 4.1.2
    scale="batch"  A = (r - mean_group) / (std_batch + eps)    std over every reward of the step (TRL's "batch")
    scale="none"   A = r - mean_group                          Dr. GRPO (arXiv 2503.20783), section 3.2

The standard deviation is the sample one (divisor n - 1) with eps = 1e-4, as in TRL; the paper does not say which.
Where it departs: completions without a reward take no part in mean or std, and groups of equal rewards give exact zeros
(the mean of three times 0.1 is not 0.1 in floating point, and dividing the rounding error by a small std would make it
a signal).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, *, scale: ScaleRewards = "group", eps: float = 1e-4) -> Tensor:
    """How much better each completion did than its group: (B, G) float -> (B, G) float32.

    NaN rewards are masked: they count in no mean or std and get advantage 0. Groups whose rewards are all equal, or
    that have fewer than two rewards (G = 1 too: there is nothing to compare with), give exactly 0. For scale="batch"
    pass the rewards of all ranks: the std is taken over everything given here.
    Raises ValueError for a shape other than (B, G), an infinite reward or an unknown scale.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), scale="none")
    tensor([[ 0.5000, -0.5000,  0.5000, -0.5000]])
    """
    valid, values = _split_mask(rewards)
    centered = values - _group_mean(values, valid).unsqueeze(-1)
    if scale == "group":
        centered = centered / (_group_std(values, valid).unsqueeze(-1) + eps)
    elif scale == "batch":
        flat_valid, flat = valid.reshape(1, -1), values.reshape(1, -1)
        centered = centered / (_group_std(flat, flat_valid) + eps)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}: expected 'group', 'batch' or 'none'")
    keep = valid & ~_no_signal(values, valid).unsqueeze(-1)
    return torch.where(keep, centered, 0.0).to(torch.float32)


def reward_metrics(rewards: Tensor) -> dict[str, float]:
    """Metrics of a step from the rewards of all ranks, (B, G) with NaN = masked, under TRL's names.

    `reward`: mean over completions with a reward. `reward_std`: mean over groups of the std inside the group (groups
    with two rewards or more). `frac_reward_zero_std`: share of groups that give no gradient, because their rewards are
    equal or fewer than two. `rewards/masked_frac`: share of completions without a reward. A mean over nothing is NaN.
    """
    valid, values = _split_mask(rewards)
    count = valid.sum()
    several = valid.sum(-1) >= 2
    stds = _group_std(values, valid)[several]
    return {
        "reward": (values.sum() / count).item(),
        "reward_std": stds.mean().item(),
        "frac_reward_zero_std": _no_signal(values, valid).double().mean().item(),
        "rewards/masked_frac": (1.0 - valid.double().mean()).item(),
    }


def _split_mask(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(valid (B, G) bool, values (B, G) float64 with 0 where not valid). float64: 0/1 rewards must not depend on G's
    rounding."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: expected (problems, completions per problem)")
    if torch.isinf(rewards).any():
        raise ValueError("a reward is infinite: rewards must be finite, or NaN where none applies")
    valid = ~torch.isnan(rewards)
    return valid, torch.where(valid, rewards, 0.0).double()


def _group_mean(values: Tensor, valid: Tensor) -> Tensor:
    return values.sum(-1) / valid.sum(-1).clamp(min=1)


def _group_std(values: Tensor, valid: Tensor) -> Tensor:
    """Sample standard deviation along the last dimension over valid entries; 0 for fewer than two."""
    deviation = torch.where(valid, values - _group_mean(values, valid).unsqueeze(-1), 0.0)
    return (deviation.square().sum(-1) / (valid.sum(-1) - 1).clamp(min=1)).sqrt()


def _no_signal(values: Tensor, valid: Tensor) -> Tensor:
    """(B,) bool: the valid rewards of the group are all equal (or there are none)."""
    highest = torch.where(valid, values, float("-inf")).amax(-1)
    lowest = torch.where(valid, values, float("inf")).amin(-1)
    return highest <= lowest
