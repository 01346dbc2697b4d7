"""`reasoning_steps`: steps count, bare markers and copies do not."""

from __future__ import annotations

import pytest

from rewards.reasoning_steps import count_steps, reasoning_steps_reward
from tests.clock import assert_takes_less


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: add two and two.\nStep 2: take the square root.\nStep 3: round it down.", 3),
        ("1. add two and two\n2. take the square root\n", 2),
        ("- add two and two\n* take the square root", 2),
        ("First, add two and two. Second, take the root. Finally, we are done.", 3),
        ("<think>First, add two and two.</think>", 1),
        ("**Step 1:** add two and two", 1),
        ("First, Second, Next, Finally,", 0),
        ("Step 1: Step 2: Step 3:", 0),
        ("Step 1:\nStep 2:\nStep 3:", 0),
        ("First, do the thing now. " * 10, 1),
        ("Then . . . . .", 0),
        ("The first thing is to add", 0),
        ("3.14 is about pi and so on", 0),
        ("", 0),
    ],
)
def test_count(text: str, steps: int) -> None:
    assert count_steps(text) == steps


def test_value_and_target() -> None:
    text = "First, add two and two. Next, take the root."
    assert reasoning_steps_reward([], [text])[0].value == pytest.approx(2 / 3)
    assert reasoning_steps_reward([], [text], target_steps=2)[0].value == 1.0
    assert reasoning_steps_reward([], [text], target_steps=1)[0].value == 1.0


def test_hostile_texts_take_little_time() -> None:
    texts = (
        "Step 1: " * 100_000,
        "\n- " * 300_000,
        " " * 10**6,
        "*" * 10**6,
        "Step " + "1" * 10**6,
        "\t> " * 300_000,
    )
    assert_takes_less(5.0, lambda: [count_steps(text) for text in texts])
