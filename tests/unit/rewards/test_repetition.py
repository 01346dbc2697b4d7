"""`repetition_penalty` by hand, and on texts made to be repetitive, empty, huge or without blanks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.repetition import repetition_penalty_reward
from tests.clock import assert_takes_less

SHARED = Path(__file__).parents[4] / "shared" / "data" / "adversarial_cases.jsonl"


@pytest.mark.parametrize(
    ("text", "size", "value"),
    [
        ("a b c a b c", 3, -0.25),  # abc bca cab abc
        ("a a a a", 2, -2 / 3),  # aa aa aa
        ("A a", 1, -0.5),  # case does not matter
        ("one two three four", 3, 0.0),
        ("a b", 3, 0.0),
        ("", 3, 0.0),
        ("好好好好", 2, -2 / 3),  # characters are words
        ("我们 add them", 1, 0.0),
        ("so. so. so.", 2, -3 / 5),  # "so ." ". so" "so ." ". so" "so ."
    ],
)
def test_by_hand(text: str, size: int, value: float) -> None:
    assert repetition_penalty_reward([], [text], ngram_size=size)[0].value == pytest.approx(value)


def test_max_penalty_scales() -> None:
    assert repetition_penalty_reward([], ["a a a a"], ngram_size=2, max_penalty=-3.0)[0].value == pytest.approx(-2.0)


def test_a_loop_costs_nearly_all_and_a_reasoning_little() -> None:
    loop = "Let me check that again. " * 400
    reasoning = (
        "First we find the price of one apple, which is two dollars. Six apples then cost twelve dollars. "
        "She pays with a twenty dollar bill, so the change is eight dollars."
    )
    looped, honest = (score.value for score in repetition_penalty_reward([], [loop, reasoning]))
    assert looped is not None and honest is not None and looped < -0.98 and honest > -0.05


def test_a_megabyte_takes_little_time() -> None:
    texts = ["<" * 10**6, "word " * 200_000, "好" * 10**6]
    assert_takes_less(8.0, lambda: repetition_penalty_reward([], texts))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not here")
def test_shared_cases_marked_repetitive() -> None:
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    marked = [row for row in rows if row.get("repetitive") is not None]
    texts = [row.get("completion") or "".join(text * times for text, times in row["completion_spec"]) for row in marked]
    values = [score.value for score in repetition_penalty_reward([], texts)]
    assert marked and [value is not None and value < -0.9 for value in values] == [row["repetitive"] for row in marked]
