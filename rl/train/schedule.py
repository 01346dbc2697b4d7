"""The learning rate as a pure function of the step, so that resuming needs no scheduler state and ranks cannot
disagree.

Shapes are those of transformers' schedulers of the same names: linear warm-up from 0 over `warmup_steps`, then
constant, linear to 0 or half a cosine to 0.
"""

from __future__ import annotations

import math

from rl.config import OptimizerSection


def learning_rate_at(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Rate for the optimizer step number `step` (0-based) of `total_steps`.

    With warmup_steps = 4: steps 0..3 take 1/4, 2/4, 3/4, 4/4 of the peak (the first step is not wasted on a rate of
    0)."""
    peak, warmup = section.learning_rate, section.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    kind = section.lr_scheduler_type
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak * (1.0 - progress)
    assert kind == "cosine", kind
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
