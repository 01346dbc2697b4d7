"""A GRPO step, several optimizer steps long, against one that is written out plainly: row by row, without packing,
with every formula and divisor in place and torch's own AdamW.

Launches are compared with each other in tests/integration/test_update_invariance.py; this says that they are right.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rl.config import GRPOSection, OptimizerSection
from rl.policy.hf import init_any
from rl.policy.model import Policy
from rl.train.experience import Experience
from rl.train.learner import Learner, make_accelerator
from rl.train.update import GRPOUpdate
from tests.integration.test_update_invariance import DEEPSEEK
from tests.integration.workers.update_worker import GROUP, PROBLEMS, make_experience

RATE, DECAY, BETA, CAP, CLIP, LONGEST, TEMPERATURE = 1e-2, 0.3, 0.1, 1.2, 0.5, 32, 0.8
MINI_BATCHES, ITERATIONS, STEP = 3, 2, 4
EPSILON, EPSILON_HIGH = 0.05, 0.08
SECTION = OptimizerSection(
    # a large epsilon: Adam would turn rounding errors of gradients near 0 into steps of full size
    learning_rate=RATE, weight_decay=DECAY, adam_epsilon=1e-3, max_grad_norm=CLIP,
    lr_scheduler_type="linear", warmup_steps=0,
)  # fmt: skip
TOTAL_STEPS = 100


def logprobs_of(policy: Policy, prompt: list[int], completion: list[int], routes: Tensor | None) -> Tensor:
    """(T,) of one row, from the whole table of logits."""
    tokens = torch.tensor(prompt + completion)[:-1]
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
    hidden = policy(tokens, borders, len(tokens), routes=None if routes is None else routes.long()).hidden
    table = (policy.lm_head(hidden) / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 :]
    return torch.stack([table[t, token] for t, token in enumerate(completion)])


def row_loss(loss_type: str, new: Tensor, old: Tensor, ref: Tensor, sampling: Tensor, advantage: float) -> Tensor:
    """(T,) losses of one row's tokens."""
    ratio, weight = (new - old).exp(), (old - sampling).exp()
    if loss_type == "gspo":
        ratio = (new - old).mean().exp().expand(len(new))
        weight = (old - sampling).mean().exp().expand(len(new))
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if loss_type == "cispo":
        objective = ratio.detach().clamp(max=1 + EPSILON_HIGH) * advantage * new
    kl = (ref - new).exp() - (ref - new) - 1
    return -(objective * weight.clamp(max=CAP)) + BETA * kl


def plain_step(policy: Policy, experience: Experience, loss_type: str) -> list[float]:
    """The same GRPO step by hand; trains `policy` and returns the loss of each optimizer step."""
    rows = {
        b * GROUP + k: (
            list(group.problem.prompt_ids),
            completion.token_ids,
            torch.cat([group.prompt_routes, completion.routes]),
            completion.logprobs,
            float(experience.advantages[b, k]),
            not completion.truncated and not bool(experience.rewards[b, k].isnan()),
        )
        for b, group in enumerate(experience.groups)
        for k, completion in enumerate(group.completions)
        if group.prompt_routes is not None and completion.routes is not None
    }
    assert len(rows) == PROBLEMS * GROUP and sum(not trained for *_, trained in rows.values()) == 2
    with torch.no_grad():
        old = {i: logprobs_of(policy, prompt, ids, routes) for i, (prompt, ids, routes, *_) in rows.items()}
        ref = {i: logprobs_of(policy, prompt, ids, None) for i, (prompt, ids, *_) in rows.items()}
    order = [b * GROUP + k for k in range(GROUP) for b in range(PROBLEMS)]
    size = len(order) // MINI_BATCHES
    matrices = [parameter for parameter in policy.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in policy.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}], eps=1e-3, weight_decay=DECAY
    )
    losses = []
    for number in range(ITERATIONS * MINI_BATCHES):
        part = order[number % MINI_BATCHES * size :][:size]
        total, tokens = torch.zeros(()), 0
        for i in part:
            prompt, ids, routes, sampling, advantage, trained = rows[i]
            if trained:
                new = logprobs_of(policy, prompt, ids, routes)
                per_token = row_loss(loss_type, new, old[i], ref[i], sampling, advantage)
                total = total + (per_token.mean() if loss_type in ("grpo", "gspo") else per_token.sum())
                tokens += len(ids)
        divisor = {"grpo": size, "gspo": size, "dr_grpo": size * LONGEST}.get(loss_type, tokens)
        loss = total / divisor
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        done = STEP * ITERATIONS * MINI_BATCHES + number
        for group in adam.param_groups:
            group["lr"] = RATE * (1 - done / TOTAL_STEPS)
        adam.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_a_step_is_what_it_says(loss_type: str) -> None:
    experience = make_experience(3)
    policy = init_any(DEEPSEEK, seed=0)
    assert isinstance(policy, Policy)
    plain = copy.deepcopy(policy)
    learner = Learner(
        policy, SECTION, accelerator=make_accelerator(torch.float32), total_steps=TOTAL_STEPS, with_reference=True
    )
    section = GRPOSection(
        steps=10, loss_type=loss_type, epsilon_high=EPSILON_HIGH, beta=BETA, importance_sampling_cap=CAP,
        num_iterations=ITERATIONS, mini_batches=MINI_BATCHES, mask_truncated_completions=True,
        **{} if loss_type == "cispo" else {"epsilon": EPSILON},
    )  # fmt: skip
    update = GRPOUpdate(learner, section, micro_batch_tokens=60, temperature=TEMPERATURE, max_completion_length=LONGEST)
    result = update.run(experience, step=STEP, replay_routes=True, after_each=lambda result: None)
    expected = plain_step(plain, experience, loss_type)
    assert [step.loss for step in result.steps] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    clipped = result.metrics["clip_ratio/region_mean"]
    assert 0.02 < clipped < 0.9 and result.metrics["importance/capped_frac"] > 0.02  # or less would have been compared
    left, right = dict(policy.named_parameters()), dict(plain.named_parameters())
    worst = max(float((left[name] - right[name]).detach().abs().max()) for name in left)
    print(f"{loss_type}: weights differ by at most {worst:.1e} (allowed 2e-6)")
    assert worst < 2e-6
