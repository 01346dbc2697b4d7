"""The sections that move the weights: `grpo` (the objective), `optimizer` (the step), `sft` (the cold start).

Defaults follow what practitioners settled on: no KL term, token-level clipping at 0.2, one update per rollout, lr 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rl.config.section import Contradiction, Flag, Natural, Number, Positive, Section
from rl.config.sections import DataSource


class GRPOSection(Section):
    """The objective: from rewards to a loss."""

    steps: Positive
    """Rollout passes; each makes mini_batches x num_iterations optimizer steps."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """Formula and divisor of the loss (see rl/grpo/loss.py)."""
    epsilon: Annotated[Number, Field(gt=0)] = 0.2
    """Clip range of the ratio below 1, and above 1 where epsilon_high is left out."""
    epsilon_high: Annotated[Number, Field(gt=0)] | None = None
    """Clip range of the ratio above 1 (DAPO: 0.28)."""
    delta: Annotated[Number, Field(gt=1)] | None = None
    """Upper bound of the ratio where the advantage is negative (two-sided clipping); left out: none."""
    beta: Annotated[Number, Field(ge=0)] = 0.0
    """Coefficient of the KL to the reference policy; 0: no reference is kept."""
    ref_update_steps: Positive | None = None
    """Steps after which the current policy becomes the reference (R1-Zero: 400); left out: never."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all."""
    num_iterations: Positive = 1
    """Times each rollout is used."""
    mini_batches: Positive = 1
    """Optimizer steps in one pass over a rollout (R1-Zero: 16)."""
    mask_truncated_completions: Flag = False
    """Leave completions that were cut off out of the loss."""
    routing_replay: Literal[True, False, "auto"] = "auto"
    """Use the experts recorded while sampling in the update; auto: whenever the policy has experts and they are
    recorded."""
    unbiased_kl: Flag = False
    """Weight the KL term by the ratio, which makes its gradient unbiased off-policy (DeepSeek-V3.2)."""
    off_policy_mask_threshold: Annotated[Number, Field(gt=0)] | None = None
    """Rows with a negative advantage whose mean log ratio from sampler to policy exceeds this many nats per token lose
    their policy term (DeepSeek-V3.2); null: none do."""
    importance_sampling_cap: Annotated[Number, Field(ge=1)] | None = 2.0
    """Cap of the weight exp(old_logprobs - sampling_logprobs) that corrects sampler against trainer; null: no
    weight."""

    def contradictions(self) -> Iterator[Contradiction]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":
            for key in ("epsilon", "delta"):
                if self.changed(key):
                    yield Contradiction(key, "has no effect with loss_type: cispo, which caps at 1 + epsilon_high")
        elif high < self.epsilon:
            yield Contradiction("epsilon_high", f"must be at least epsilon ({self.epsilon})")
        elif self.delta is not None and self.delta <= 1 + high:
            yield Contradiction("delta", f"must be above 1 + epsilon_high ({1 + high:g}), or it replaces that clip")
        if self.beta == 0 and self.ref_update_steps is not None:
            yield Contradiction("ref_update_steps", "has no effect while beta is 0: there is no reference to update")
        if self.beta == 0 and self.unbiased_kl:
            yield Contradiction("unbiased_kl", "has no effect while beta is 0: there is no KL term")


class OptimizerSection(Section):
    """AdamW, its schedule, and what one forward pass may hold."""

    learning_rate: Annotated[Number, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Gradients with a larger norm are scaled down to it; null: never."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine reach 0 after the last optimizer step."""
    warmup_steps: Natural = 0
    """Optimizer steps in which the learning rate rises from 0, with every schedule."""
    micro_batch_tokens: Positive = 16384
    """Tokens packed into one forward and backward pass on a process: the knob against running out of memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step and count it."""


class SFTSection(OptimizerSection):
    """The cold start: supervised training on (prompt, completion) rows before GRPO. Optimizer keys as in
    `optimizer`."""

    data: DataSource
    """Rows with the columns prompt and completion; worded with data.template."""
    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 32
    """Rows in an optimizer step, over all processes."""
    max_length: Positive = 2048
    """Tokens a row may have, prompt and completion together."""
    overlong_rows: Literal["drop", "refuse"] = "drop"
    """Longer rows: drop and count them, or refuse to start."""
    logging_steps: Positive = 10
    """Optimizer steps between lines on the screen and records of the cold start."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.warmup_steps > self.steps:
            yield Contradiction("warmup_steps", f"must be at most steps ({self.steps})")
        if self.micro_batch_tokens < self.max_length:
            yield Contradiction("micro_batch_tokens", f"must hold the longest row, max_length ({self.max_length})")
