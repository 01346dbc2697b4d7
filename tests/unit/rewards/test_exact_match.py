"""exact_match: a table of answers, and the errors of a wrong column."""

from __future__ import annotations

import pytest

from rewards.exact_match import exact_match_reward


@pytest.mark.parametrize(
    ("answer", "gold", "options", "value"),
    [
        ("Paris", "Paris", {}, 1.0),
        ("  Paris\n", "Paris", {}, 1.0),
        ("New   York", "New York", {}, 1.0),
        ("paris", "Paris", {}, 0.0),
        ("paris", "Paris", {"ignore_case": True}, 1.0),
        ("Paris or Rome", "Paris", {}, 0.0),
        ("Paris.", "Paris", {}, 0.0),
        ("Rome", ["Paris", "Rome"], {}, 1.0),
        ("42", 42, {}, 1.0),
        ("x", "", {}, 0.0),
        ("x", None, {}, None),
    ],
)
def test_table(answer: str, gold: object, options: dict[str, bool], value: float | None) -> None:
    completion = f"<think>t</think><answer>{answer}</answer>"
    assert exact_match_reward([], [completion], answer=[gold], **options)[0].value == value


def test_needs_the_block_unless_told_otherwise() -> None:
    assert exact_match_reward([], ["Paris"], answer=["Paris"])[0].value == 0.0
    assert exact_match_reward([], ["Paris"], answer=["Paris"], tagged=False)[0].value == 1.0


def test_another_column() -> None:
    assert exact_match_reward([], ["Paris"], city=["Paris"], gold_column="city", tagged=False)[0].value == 1.0
    with pytest.raises(ValueError, match="'answer'"):
        exact_match_reward([], ["Paris"], city=["Paris"])
