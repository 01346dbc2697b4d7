"""`majority`: votes within a group, equal answers in different writing, ties, abstentions."""

from __future__ import annotations

import pytest

from rewards.majority import majority_reward


def answers(*texts: str | None) -> list[str]:
    return ["nothing stated" if text is None else f"<think>t</think><answer>{text}</answer>" for text in texts]


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (answers("4", "4", "5"), [1.0, 1.0, 0.0]),
        (answers("0.5", "1/2", "\\frac{2}{4}", "3"), [1.0, 1.0, 1.0, 0.0]),
        (answers("1", "2"), [0.5, 0.5]),
        (answers("1", "1", "2", "2", "3"), [0.5, 0.5, 0.5, 0.5, 0.0]),
        (answers("1", None, None, None), [1.0, 0.0, 0.0, 0.0]),  # not stating an answer is no vote
        (answers(None, None), [0.0, 0.0]),
        (answers("x" * 10_000, "4"), [0.0, 1.0]),
    ],
)
def test_one_group(texts: list[str], values: list[float]) -> None:
    scores = majority_reward([], texts, group_ids=[0] * len(texts))
    assert [score.value for score in scores] == values


def test_groups_do_not_mix_whatever_their_order() -> None:
    scores = majority_reward([], answers("1", "2", "1", "2", "2", "1"), group_ids=[5, 3, 5, 3, 5, 3])
    assert [score.value for score in scores] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_min_share_leaves_undecided_groups_out() -> None:
    texts = answers("1", "2", "3", "3")
    assert [score.value for score in majority_reward([], texts, group_ids=[0] * 4, min_share=0.5)] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]
    assert [score.value for score in majority_reward([], texts, group_ids=[0] * 4, min_share=0.6)] == [None] * 4
