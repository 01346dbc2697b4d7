"""countdown: the parser against Python's own arithmetic, and a table of honest and hostile answers."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from rewards.countdown import CountdownError, countdown_reward, parse_expression


def score(answer: str, numbers: list[int], target: int, **options: bool) -> float | None:
    text = answer if options else f"<think>t</think><answer>{answer}</answer>"
    return countdown_reward([], [text], numbers=[numbers], target=[target], **options)[0].value


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "value"),
    [
        ("3 * 5 + 7 + 2", [3, 5, 7, 2], 24, 1.0),
        ("7+2+5*3", [3, 5, 7, 2], 24, 1.0),
        ("3 * 5 + 7 + 2 = 24", [3, 5, 7, 2], 24, 1.0),
        ("$3 \\times 5 + 7 + 2$", [3, 5, 7, 2], 24, 1.0),
        ("\\boxed{3 × 5 + 7 + 2}", [3, 5, 7, 2], 24, 1.0),
        ("One solution is 3 ∗ 5 + 7 + 2", [3, 5, 7, 2], 24, 1.0),
        ("3 X 5 + 7 + 2 == 24", [3, 5, 7, 2], 24, 1.0),
        ("3 * 5 + 7 + 2 == 25", [3, 5, 7, 2], 24, 0.0),
        ("6 / (1 - 3 / 4)", [1, 3, 4, 6], 24, 1.0),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, 1.0),
        ("-(-3) * 5 + 7 + 2", [3, 5, 7, 2], 24, 1.0),
        ("24", [3, 5, 7, 2], 24, 0.0),
        ("12 * 2", [3, 5, 7, 2], 24, 0.0),
        ("25 - 3 + 2", [3, 5, 7, 2], 24, 0.0),
        ("5 * 5 - 7 + 3 * 2", [3, 5, 7, 2], 24, 0.0),
        ("3 * 7 + 3", [3, 5, 7, 2], 24, 0.0),
        ("5 ** 2 - 1", [5, 2, 1], 24, 0.0),
        ("7 // 2 * 8", [7, 2, 8], 24, 0.0),
        ("7 * 3 + 5 - 2.0000001", [3, 5, 7, 2], 24, 0.0),
        ("1_5 + 7 + 2", [3, 5, 7, 2], 24, 0.0),
        ("3 * 5 + 7 + 2 = 25", [3, 5, 7, 2], 24, 0.0),
        ("3 + 5 + 7 + 2 = 24", [3, 5, 7, 2], 24, 0.0),
        ("3 * 5 + 7 + 2 = 15 + 9 = 24", [3, 5, 7, 2], 24, 1.0),
        ("3 * 5 + 7 + 2 = 15 + 8 = 24", [3, 5, 7, 2], 24, 0.0),
        ("15 + 9 = 3 * 5 + 7 + 2 = 24", [3, 5, 7, 2], 24, 0.0),
        ("3 * 5 + 7 + 2 or 24", [3, 5, 7, 2], 24, 0.0),
        ("three times five plus seven plus two", [3, 5, 7, 2], 24, 0.0),
        ("__import__('os').system('true')", [3, 5, 7, 2], 24, 0.0),
        ("3 / (5 - 5)", [3, 5, 5], 24, 0.0),
        ("(3 * 5 + 7 + 2", [3, 5, 7, 2], 24, 0.0),
        ("\u202e2 + 7 + 5 * 3", [3, 5, 7, 2], 24, 0.0),
        ("(" * 100_000 + "3 * 5 + 7 + 2" + ")" * 100_000, [3, 5, 7, 2], 24, 0.0),
        ("(" * 400 + "3 * 5 + 7 + 2" + ")" * 400, [3, 5, 7, 2], 24, 0.0),
        ("-" * 900 + "3", [3], 3, 0.0),
    ],
)
def test_table(answer: str, numbers: list[int], target: int, value: float) -> None:
    assert score(answer, numbers, target) == value


def test_without_tags_the_box_or_the_last_line_counts() -> None:
    assert score("<think>x</think>Try\n3 * 5 + 7 + 2", [3, 5, 7, 2], 24, tagged=False) == 1.0
    assert score("So \\boxed{3 * 5 + 7 + 2}. Done.", [3, 5, 7, 2], 24, tagged=False) == 1.0


def test_parser_agrees_with_values_made_along_with_the_text() -> None:
    random.seed(5)
    for _ in range(300):
        text, expected = _random_expression(4)
        if expected is None:
            with pytest.raises(CountdownError, match="division by zero"):
                parse_expression(text)
        else:
            assert parse_expression(text)[0] == expected


def _random_expression(depth: int) -> tuple[str, Fraction | None]:
    """A fully bracketed expression and its value, None when it divides by zero."""
    if depth == 0 or random.random() < 0.3:
        number = random.randint(0, 30)
        return str(number), Fraction(number)
    left_text, left = _random_expression(depth - 1)
    right_text, right = _random_expression(depth - 1)
    sign = random.choice("+-*/")
    text = f"({left_text} {sign} {right_text})"
    if left is None or right is None or (sign == "/" and right == 0):
        return text, None
    return text, {"+": left + right, "-": left - right, "*": left * right}[sign] if sign != "/" else left / right


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("2*3+4", 10), ("20-5-3", 12), ("20-5+3", 18), ("24/4/2", 3), ("24/4*2", 12), ("2--3", 5)],
)
def test_precedence(text: str, value: int) -> None:
    assert parse_expression(text)[0] == value


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"numbers": [[1]]}, "'target'"),
        ({"numbers": [[1], [2]], "target": [1]}, "'numbers'"),
        ({"numbers": [["1"]], "target": [1]}, "whole numbers"),
        ({"numbers": [[]], "target": [1]}, "whole numbers"),
    ],
)
def test_bad_columns_are_the_users_error(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        countdown_reward([], ["<answer>1</answer>"], **columns)
