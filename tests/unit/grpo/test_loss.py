"""Every policy loss: hand-computed values, a plain Python reference with finite differences, invariances of the sums.

The reference below is written from the papers' formulas, token by token in Python floats, and returns the mean.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rl.grpo.loss import LossType, loss_divisor, policy_loss, summarize_metrics

LOSS_TYPES: list[LossType] = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
MAX_LENGTH = 9
Rows = list[list[float]]


@dataclass
class Case:
    """lists of rows of different lengths, so that the reference never sees padding or a mask."""

    policy: Rows
    old: Rows
    ref: Rows
    sampling: Rows
    advantages: list[float]


def make_case(seed: int = 0, spread: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 6, 0, 4]

    def draw(base: Rows | None, scale: float) -> Rows:
        noise = [(torch.randn(n, generator=generator, dtype=torch.float64) * scale).tolist() for n in lengths]
        if base is None:
            return [[-1.0 - abs(x) for x in row] for row in noise]
        return [[b + x for b, x in zip(base_row, row, strict=True)] for base_row, row in zip(base, noise, strict=True)]

    policy = draw(None, 1.0)
    old = draw(policy, spread)
    return Case(policy, old, draw(policy, spread), draw(old, spread), [1.3, -0.7, -1.1, 2.0, 0.9])


def reference(case: Case, policy: Rows, loss_type: LossType, weights_at: Rows, **options: Any) -> float:
    """The loss at `policy`; stop-gradients take their value at `weights_at`."""
    eps, high, delta = options["epsilon"], options["epsilon_high"], options["delta"]
    beta, cap, threshold = options["beta"], options["cap"], options["threshold"]
    per_row: list[list[float]] = []
    for i, advantage in enumerate(case.advantages):
        n = len(policy[i])
        log_ratios = [policy[i][t] - case.old[i][t] for t in range(n)]
        drift = sum(case.sampling[i][t] - weights_at[i][t] for t in range(n)) / max(n, 1)
        kept = 0.0 if threshold is not None and advantage < 0 and drift > threshold else 1.0
        sampler_log_ratios = [case.old[i][t] - case.sampling[i][t] for t in range(n)]
        tokens = []
        for t in range(n):
            log_ratio = sum(log_ratios) / n if loss_type == "gspo" else log_ratios[t]
            sampler_log_ratio = sum(sampler_log_ratios) / n if loss_type == "gspo" else sampler_log_ratios[t]
            ratio = math.exp(log_ratio)
            if loss_type == "cispo":
                fixed = math.exp(weights_at[i][t] - case.old[i][t])
                objective = min(fixed, 1 + high) * advantage * policy[i][t]
            else:
                first = ratio if delta is None else min(ratio, delta)
                second = min(max(ratio, 1 - eps), 1 + high)
                objective = min(first * advantage, second * advantage)
            if cap is not None:
                objective *= min(math.exp(sampler_log_ratio), cap)
            difference = case.ref[i][t] - policy[i][t]
            kl = math.exp(difference) - difference - 1
            if options["unbiased"]:
                kl *= math.exp(log_ratios[t])
            tokens.append(-(kept * objective - beta * kl))
        per_row.append(tokens)
    everything = sum(sum(row) for row in per_row)
    if loss_type in ("grpo", "gspo"):
        return sum(sum(row) / len(row) for row in per_row if row) / len(per_row)
    if loss_type == "dr_grpo":
        return everything / (len(per_row) * MAX_LENGTH)
    return everything / sum(len(row) for row in per_row)


def pad(rows: Rows, width: int, filler: float = float("nan")) -> Tensor:
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)


def padded(case: Case, width: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in case.policy])
    return {
        "policy_logprobs": pad(case.policy, width).requires_grad_(),
        "old_logprobs": pad(case.old, width),
        "ref_logprobs": pad(case.ref, width),
        "sampling_logprobs": pad(case.sampling, width),
        "advantages": torch.tensor(case.advantages, dtype=torch.float64),
        "loss_mask": torch.arange(width) < lengths[:, None],
    }


def divisor(case: Case, loss_type: LossType) -> float:
    return loss_divisor(
        loss_type,
        num_sequences=len(case.policy),
        num_tokens=sum(len(row) for row in case.policy),
        max_completion_length=MAX_LENGTH,
    )


OPTIONS = {
    "plain": {"epsilon": 0.2, "epsilon_high": 0.2},
    "clip-higher": {"epsilon": 0.2, "epsilon_high": 0.28},
    "kl": {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.3},
    "unbiased-kl": {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.3, "unbiased": True},
    "two-sided": {"epsilon": 0.2, "epsilon_high": 0.2, "delta": 1.5},
    "importance": {"epsilon": 0.2, "epsilon_high": 0.2, "cap": 1.1},
    "sequence-mask": {"epsilon": 0.2, "epsilon_high": 0.2, "threshold": 0.05, "beta": 0.1},
    "everything": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.6, "beta": 0.2, "cap": 1.5, "threshold": 0.2},
}
DEFAULTS = {"delta": None, "beta": 0.0, "unbiased": False, "cap": None, "threshold": None}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_and_gradient_equal_the_reference(loss_type: LossType, options: dict[str, Any]) -> None:
    options = DEFAULTS | options
    if loss_type == "cispo":
        options["delta"] = None
    case = make_case()
    batch = padded(case, 8)
    sums = policy_loss(
        **batch,
        loss_type=loss_type,
        epsilon=options["epsilon"],
        epsilon_high=options["epsilon_high"],
        delta=options["delta"],
        beta=options["beta"],
        unbiased_kl=options["unbiased"],
        importance_sampling_cap=options["cap"],
        off_policy_mask_threshold=options["threshold"],
    )
    loss = sums.loss / divisor(case, loss_type)
    assert loss.item() == pytest.approx(reference(case, case.policy, loss_type, case.policy, **options), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, batch["policy_logprobs"])
    for i, row in enumerate(case.policy):
        assert gradient[i, len(row) :].eq(0).all()
        for t in range(len(row)):
            step = 1e-6
            values = []
            for sign in (1, -1):
                moved = [list(r) for r in case.policy]
                moved[i][t] += sign * step
                values.append(reference(case, moved, loss_type, case.policy, **options))
            assert gradient[i, t].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-8)


def test_the_case_reaches_every_branch() -> None:
    """Or the comparison above proves less than it looks: both clips, delta, the cap and the mask are hit and missed."""
    case = make_case()
    batch = padded(case, 8)
    ratio = torch.exp(batch["policy_logprobs"] - batch["old_logprobs"])[batch["loss_mask"]]
    advantage = batch["advantages"][:, None].expand(-1, 8)[batch["loss_mask"]]
    for hit in [(ratio < 0.8) & (advantage < 0), (ratio > 1.28) & (advantage > 0), (ratio > 1.6) & (advantage < 0)]:
        assert hit.any() and not hit.all()
    sums = policy_loss(**batch, importance_sampling_cap=1.5, off_policy_mask_threshold=0.2).metrics
    assert 0 < sums["importance_capped"] < sums["loss_tokens"]
    assert 0 < sums["off_policy_rows"] < sum(a < 0 for a in case.advantages)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_by_hand(loss_type: LossType) -> None:
    """Two rows: A = 1 with ratios 1 and 2, and A = -1 with the ratio 1/2; epsilon 0.2."""
    policy = torch.tensor([[0.5, 0.5], [0.25, 1.0]]).log()
    old = torch.tensor([[0.5, 0.25], [0.5, 1.0]]).log()
    sums = policy_loss(
        policy, old, torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]]), loss_type=loss_type, epsilon=0.2
    )
    loss = sums.loss.item() / loss_divisor(loss_type, num_sequences=2, num_tokens=3, max_completion_length=4)
    expected = {
        "grpo": (-(1 + 1.2) / 2 + 0.8) / 2,  # ratio 2 is clipped to 1.2, ratio 1/2 to 0.8
        "dapo": (-(1 + 1.2) + 0.8) / 3,
        "bnpo": (-(1 + 1.2) + 0.8) / 3,
        "dr_grpo": (-(1 + 1.2) + 0.8) / (2 * 4),
        "gspo": (-1.2 + 0.8) / 2,  # sequence ratios sqrt(2) and 1/2
        "cispo": (-(1 * math.log(0.5) + 1.2 * math.log(0.5)) + 0.5 * math.log(0.25)) / 3,
    }
    assert loss == pytest.approx(expected[loss_type], rel=1e-6)
    metrics = summarize_metrics({name: value.item() for name, value in sums.metrics.items()})
    clipped_high = {"gspo": 2 / 3}.get(loss_type, 1 / 3)
    clipped_low = {"cispo": 0.0}.get(loss_type, 1 / 3)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(clipped_high)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(clipped_low)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(clipped_high + clipped_low)
    mean_ratio = (2 * math.sqrt(2) + 0.5) / 3 if loss_type == "gspo" else (1 + 2 + 0.5) / 3
    assert metrics["ratio/mean"] == pytest.approx(mean_ratio)


def test_k3_by_hand() -> None:
    policy, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    sums = policy_loss(policy, policy, torch.tensor([0.0]), torch.ones(1, 1), beta=0.1, ref_logprobs=ref)
    k3 = 0.5 - math.log(0.5) - 1
    assert sums.loss.item() == pytest.approx(0.1 * k3)
    assert summarize_metrics({name: value.item() for name, value in sums.metrics.items()})["kl"] == pytest.approx(k3)


def test_unbiased_kl_has_the_gradient_of_the_kl() -> None:
    """Over the old policy's vocabulary, the gradient of ratio x k3 is that of KL(policy || ref); k3's is not."""
    logits = torch.tensor([0.3, -0.2, 0.9, -1.0], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    old = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log()
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    gradients = {}
    for unbiased in (True, False):
        expectation = torch.zeros((), dtype=torch.float64)
        for v in range(4):
            sums = policy_loss(
                policy[v].reshape(1, 1), old[v].log().reshape(1, 1), torch.zeros(1), torch.ones(1, 1),
                beta=1.0, ref_logprobs=ref[v].reshape(1, 1), unbiased_kl=unbiased,
            )  # fmt: skip
            expectation = expectation + old[v] * sums.loss
        (gradients[unbiased],) = torch.autograd.grad(expectation, logits, retain_graph=True)
    torch.testing.assert_close(gradients[True], wanted, rtol=0, atol=1e-12)
    assert (gradients[False] - wanted).abs().max() > 0.05


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sums_do_not_depend_on_micro_batches_order_or_padding(loss_type: LossType) -> None:
    case = make_case(seed=1)
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.1, "off_policy_mask_threshold": 0.1}
    whole = padded(case, 8)
    total = policy_loss(**whole, **options)
    (gradient,) = torch.autograd.grad(total.loss, whole["policy_logprobs"])
    for pieces, width in [([[4, 2], [0], [3, 1]], 6), ([[0, 1, 2, 3, 4]], 13), ([[3]], 6)]:
        loss, metrics = torch.zeros((), dtype=torch.float64), dict.fromkeys(total.metrics, 0.0)
        batch = padded(case, width)
        for rows in pieces:
            sums = policy_loss(**{name: value[rows] for name, value in batch.items()}, **options)
            loss = loss + sums.loss
            metrics = {name: metrics[name] + value.item() for name, value in sums.metrics.items()}
        (found,) = torch.autograd.grad(loss, batch["policy_logprobs"])
        if pieces == [[3]]:  # the row without tokens
            assert loss.item() == 0.0 and found.eq(0).all()
            continue
        assert loss.item() == pytest.approx(total.loss.item(), abs=1e-12)
        torch.testing.assert_close(found[:, :6], gradient[:, :6], rtol=0, atol=1e-12)
        assert metrics == pytest.approx({name: value.item() for name, value in total.metrics.items()}, abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_first_update_has_the_plain_policy_gradient(loss_type: LossType) -> None:
    """At ratio 1 every loss is REINFORCE with its own normalisation: d(-sum)/d logprob = -A (or -A / n)."""
    case = make_case()
    batch = padded(case, 8)
    batch["old_logprobs"] = batch["policy_logprobs"].detach().clone()
    (gradient,) = torch.autograd.grad(
        policy_loss(**batch, loss_type=loss_type, importance_sampling_cap=None).loss, batch["policy_logprobs"]
    )
    tokens = batch["loss_mask"].sum(-1, keepdim=True).clamp(min=1)
    per_token = -batch["advantages"][:, None] / (tokens if loss_type in ("grpo", "gspo") else 1)
    torch.testing.assert_close(gradient, torch.where(batch["loss_mask"], per_token, 0.0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_ratios_stay_finite(loss_type: LossType) -> None:
    policy = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    old = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])
    sums = policy_loss(policy, old, torch.tensor([0.0, -1.0]), torch.ones(2, 2), loss_type=loss_type)
    sums.loss.backward()
    assert sums.loss.isfinite() and policy.grad is not None and policy.grad.isfinite().all()


def test_bfloat16_logprobs_are_scored_in_float32() -> None:
    policy = torch.full((1, 4), -1.0, dtype=torch.bfloat16)
    assert policy_loss(policy, policy, torch.ones(1), torch.ones(1, 4)).loss.dtype == torch.float32


def test_divisors() -> None:
    numbers = {"num_sequences": 6, "num_tokens": 50, "max_completion_length": 20}
    found = {loss_type: loss_divisor(loss_type, **numbers) for loss_type in LOSS_TYPES}
    assert found == {"grpo": 6, "bnpo": 50, "dr_grpo": 120, "dapo": 50, "gspo": 6, "cispo": 50}
    assert loss_divisor("dapo", num_sequences=0, num_tokens=0) == 1.0
    with pytest.raises(ValueError, match="max_completion_length"):
        loss_divisor("dr_grpo", num_sequences=2, num_tokens=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo': expected one of grpo"),
        ({"epsilon": -0.1}, "negative"),
        ({"delta": 1.1}, "must exceed 1 \\+ epsilon_high"),
        ({"delta": 4.0, "loss_type": "cispo"}, "no second clip"),
        ({"beta": 0.1}, "needs ref_logprobs"),
        ({"sampling_logprobs": torch.zeros(2, 4)}, "expected one"),
    ],
)
def test_user_errors_are_named(options: dict[str, Any], message: str) -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        policy_loss(zeros, zeros, torch.zeros(2), zeros, **options)
    with pytest.raises(ValueError, match="one per row"):
        policy_loss(zeros, zeros, torch.zeros(3), zeros)
