"""The metrics of one GRPO step, under TRL's names where the meaning is TRL's; new ones are `stage/quantity` with the
unit in the name.

All numbers are over all ranks: experience records are shared, update sums are reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl.distributed import gather_objects
from rl.grpo.advantages import reward_metrics
from rl.train.experience import Experience
from rl.train.update import UpdateResult


def stage_seconds(stages: dict[str, float], step_s: float) -> dict[str, float]:
    """How long a step took, the same on every rank. In: this rank's seconds in each stage and in the whole step. Out:
    each stage as long as on its slowest rank, "step", and "rest", what the stages leave of it: gathering weights,
    waiting for slower ranks, and whatever has no stage."""
    everyone = gather_objects({**stages, "step": step_s})
    slowest = {name: max(seconds[name] for seconds in everyone) for name in everyone[0]}
    return {**slowest, "rest": max(0.0, slowest["step"] - sum(slowest[name] for name in stages))}


def step_metrics(
    experience: Experience, result: UpdateResult, seconds: dict[str, float], *, epoch: float, rightness: Sequence[str]
) -> dict[str, float]:
    """seconds: of `stage_seconds`. epoch: passes over the training problems so far. rightness: the
    reward functions whose 1 means a right answer, of which the first with a value judges a row; without any there is no
    accuracy."""
    lengths = [record.tokens for record in experience.records]
    ended = [record.tokens for record in experience.records if not record.truncated]
    metrics = {
        **reward_metrics(experience.rewards),
        **experience.scored.metrics,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended) if ended else 0.0,
        "num_tokens": float(sum(lengths)),
        "epoch": epoch,
        **result.metrics,
        **{f"time/{stage}_s": value for stage, value in seconds.items()},
        "rollout/tokens_per_s": sum(lengths) / max(seconds["rollout"], 1e-9),
        "train/tokens_per_s": sum(lengths) / max(seconds["step"], 1e-9),
    }
    given = zip(*(experience.scored.by_function[name] for name in rightness), strict=True)
    judged = [next((value for value in row if value is not None), None) for row in given]
    values = [value for value in judged if value is not None]
    if values:
        metrics["accuracy"] = sum(value >= 1.0 for value in values) / len(values)
    if result.expert_load is not None:
        load = result.expert_load.double()
        # 1: every expert of every layer got the same number of tokens
        metrics["routing/max_load_over_mean"] = float((load.amax(1) / load.mean(1)).mean())
    return metrics
