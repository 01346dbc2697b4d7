"""`cosine` and `soft_overlong_punishment` against values computed by hand."""

from __future__ import annotations

import math

import pytest

from rewards.length import cosine_reward, soft_overlong_punishment_reward

RIGHT, WRONG = "<think>t</think><answer>4</answer>", "<think>t</think><answer>5</answer>"


@pytest.mark.parametrize(
    ("text", "tokens", "value"),
    [
        (RIGHT, 0, 1.0),
        (RIGHT, 25, 1.0 - 0.5 * (1 - math.sqrt(0.5)) / 2),  # cos(pi/4)
        (RIGHT, 50, 0.75),
        (RIGHT, 100, 0.5),
        (RIGHT, 150, 0.5),  # open-r1's would rise again to 0.75
        (WRONG, 0, -1.0),
        (WRONG, 50, -0.75),
        (WRONG, 100, -0.5),
        (WRONG, 10_000, -0.5),
        ("", 0, -1.0),
    ],
)
def test_cosine(text: str, tokens: int, value: float) -> None:
    (score,) = cosine_reward([""], [text], [[0] * tokens], max_len=100, answer=["4"])
    assert score.value == pytest.approx(value, abs=1e-12)


def test_cosine_does_not_apply_without_a_reference_and_keeps_the_verdicts_reason() -> None:
    unknown, known = cosine_reward(["", ""], [RIGHT, RIGHT], [[0], [0]], answer=[None, "4"])
    assert unknown.value is None
    assert known.extracted == "4" and "correct with 1 of 1000 tokens" in known.reason


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (10**6, -1.0)]
)
def test_soft_overlong_punishment(tokens: int, value: float) -> None:
    (score,) = soft_overlong_punishment_reward(
        [""], [""], [range(tokens)], max_completion_len=100, soft_punish_cache=20
    )
    assert score.value == pytest.approx(value, abs=1e-12)
    assert math.copysign(1, score.value or 0.0) == 1 or value < 0  # no negative zero in the logs
