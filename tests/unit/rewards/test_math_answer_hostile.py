"""Answer blocks written for these tests, hostile ones and honest controls of every form (tests/data/*_blocks.jsonl): no
hedge, list, bound, withdrawn text or formula around the reference is paid, no honest dressing is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.countdown import score_countdown
from rewards.math_answer import accuracy_reward
from rewards.multiple_choice import multiple_choice_reward
from rewards.strict_answer import block_answer
from tests.clock import assert_takes_less

DATA = Path(__file__).parents[2] / "data"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def tagged(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


def test_answers() -> None:
    cases = rows("answer_blocks.jsonl")
    scores = accuracy_reward([], [tagged(row["answer"]) for row in cases], answer=[row["gold"] for row in cases])
    wrong = [(row, score) for row, score in zip(cases, scores, strict=True) if (score.value == 1.0) != row["correct"]]
    assert len(cases) > 1000 and not wrong


def test_choices() -> None:
    cases = rows("choice_blocks.jsonl")
    texts = [tagged(row["answer"]) for row in cases]
    golds, options = [row["gold"] for row in cases], [row["options"] for row in cases]
    scores = multiple_choice_reward([], texts, answer=golds, options=options)
    wrong = [(row, score) for row, score in zip(cases, scores, strict=True) if (score.value == 1.0) != row["correct"]]
    assert len(cases) > 200 and not wrong


def test_countdown() -> None:
    for row in rows("countdown_blocks.jsonl"):
        score = score_countdown(tagged(row["answer"]), row["numbers"], row["target"], True)
        assert (score.value == 1.0) == row["correct"], (row, score)


@pytest.mark.parametrize("gold", ["0", "6", "42"])
def test_a_list_of_all_numbers_is_never_paid(gold: str) -> None:
    for joint in (" ", "  ", ", ", "\n", "\t", "; ", " / ", r"\ ", r"\quad ", "~", "} {", "$ $"):
        spam = joint.join(map(str, range(60)))
        assert accuracy_reward([], [tagged(f"{{{spam}}}"), tagged(spam)], answer=[gold, gold])[0].value == 0.0
        assert accuracy_reward([], [tagged(f"The answer is {spam}.")], answer=[gold])[0].value == 0.0


@pytest.mark.parametrize(
    "piece",
    ["1 ", "\\boxed{5} ", "1+", "= ", "-", "? ", "not ", "1+1=", "a", "5 6", "...", "$1$ ", "(5) ", "the answer is 5 "],
)
@pytest.mark.parametrize("tail", ["", "a", "6", "\\boxed{5}"])
def test_blocks_take_linear_time(piece: str, tail: str) -> None:
    text = piece * (39_000 // len(piece)) + tail
    blocks = (text, "\\boxed{5}" + text[:30_000] + tail, piece * (1_900 // len(piece)) + tail)
    assert_takes_less(0.5, lambda: [block_answer(block) for block in blocks])
