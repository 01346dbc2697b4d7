"""Advantages against hand-computed values, masks, ties, and every scale."""

import math
import statistics

import pytest
import torch

from rl.grpo.advantages import group_advantages, reward_metrics

NAN = float("nan")


def test_group_scale_by_hand() -> None:
    # mean 0.5, sample std sqrt(4 * 0.25 / 3) = 0.5773503
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), scale="group")
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[expected, -expected, expected, -expected]]))
    assert advantages.dtype == torch.float32


def test_no_scale_by_hand() -> None:
    advantages = group_advantages(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]]), scale="none")
    torch.testing.assert_close(advantages, torch.tensor([[2.0, -1.0, -1.0], [-1.0, 1.0, 0.0]]))


def test_batch_scale_divides_by_the_std_of_all_rewards() -> None:
    rewards = [[3.0, 0.0], [0.0, 1.0], [NAN, 7.0]]
    std = statistics.stdev([3.0, 0.0, 0.0, 1.0, 7.0])
    advantages = group_advantages(torch.tensor(rewards), scale="batch")
    expected = torch.tensor([[1.5, -1.5], [-0.5, 0.5], [0.0, 0.0]]) / (std + 1e-4)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_masked_rewards_change_nothing_but_themselves(scale: str) -> None:
    kept = group_advantages(torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]]), scale=scale)  # type: ignore[arg-type]
    masked = group_advantages(torch.tensor([[1.0, NAN, 0.0, 0.5], [1.0, 1.0, 0.0, NAN]]), scale=scale)  # type: ignore[arg-type]
    torch.testing.assert_close(
        masked,
        torch.stack([kept[0][[0, 0, 1, 2]], kept[1][[0, 1, 2, 0]]])
        * ~torch.tensor([[False, True, False, False], [False, False, False, True]]),
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("row", [[0.1] * 3, [0.7] * 3, [1e8] * 3, [NAN, 0.3, NAN], [NAN] * 3, [0.0] * 3])
def test_groups_without_signal_give_exact_zeros(scale: str, row: list[float]) -> None:
    rewards = torch.tensor([row, [0.0, 1.0, 0.0]])
    advantages = group_advantages(rewards, scale=scale)  # type: ignore[arg-type]
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1].ne(0).all()


def test_equal_float64_rewards_give_exact_zeros() -> None:
    """0.1 + 0.1 + 0.1 divided by 3 is not 0.1 in float64."""
    assert group_advantages(torch.full((1, 3), 0.1, dtype=torch.float64), scale="none").tolist() == [[0.0, 0.0, 0.0]]


def test_group_of_one_gives_zero() -> None:
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.tensor([[1.0], [0.0]]), scale=scale).tolist() == [[0.0], [0.0]]  # type: ignore[arg-type]


def test_rounding_noise_does_not_become_a_signal() -> None:
    advantages = group_advantages(torch.tensor([[0.3, 0.1 + 0.2, 0.30000004]]), scale="group")
    assert advantages.abs().max() < 1e-3


def test_user_errors_are_named() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="completions per problem"):
        group_advantages(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="'group', 'batch' or 'none'"):
        group_advantages(torch.zeros(1, 2), scale="std")  # type: ignore[arg-type]


def test_reward_metrics_by_hand() -> None:
    metrics = reward_metrics(torch.tensor([[1.0, 0.0], [1.0, 1.0], [NAN, 3.0], [NAN, NAN]]))
    assert metrics["reward"] == pytest.approx(6 / 5)
    assert metrics["reward_std"] == pytest.approx((math.sqrt(0.5) + 0.0) / 2)
    assert metrics["frac_reward_zero_std"] == pytest.approx(3 / 4)
    assert metrics["rewards/masked_frac"] == pytest.approx(3 / 8)
