"""Completions written for these tests with their labels (tests/data/free_answers.jsonl, tagged_answers.jsonl): answers
without tags as models word them, near misses beside them; tagged ones with tricks, bombs and honest controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.extract import free_answer
from rewards.grading import grade_row

DATA = Path(__file__).parents[2] / "data"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_answers_without_tags() -> None:
    cases = rows("free_answers.jsonl")
    verdicts = [grade_row(row, tagged=False) for row in cases]
    wrong = [v for row, v in zip(cases, verdicts, strict=True) if v["correct"] != row["expected"]]
    assert len(cases) > 800 and not wrong


def test_tagged_answers() -> None:
    cases = rows("tagged_answers.jsonl")
    verdicts = [grade_row(row, tagged=True) for row in cases]
    wrong = [v for row, v in zip(cases, verdicts, strict=True) if v["correct"] != row["correct"]]
    labels = [row.get("format_ok", verdict["format_ok"]) for row, verdict in zip(cases, verdicts, strict=True)]
    misread = [verdict for label, verdict in zip(labels, verdicts, strict=True) if verdict["format_ok"] != label]
    assert len(cases) > 500 and not wrong and not misread
    slow = [row for row, verdict in zip(cases, verdicts, strict=True) if verdict["seconds"] >= 2]
    assert all(grade_row(row, tagged=True)["seconds"] < 2 for row in slow)  # a second time: a verifier may have started


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He walks 10 km at 4 km an hour: 2 1/2 hours.", "2 1/2"),
        ("Together they produce 48 thousand bolts.", "48 thousand"),
        ("It is now minus 7 degrees.", "-7"),
        ("The number is 1011 in base 2.", "1011_2"),
        ("Sie brauchen also 2,5 Stunden.", "2.5"),
        ("Il doit 1 500 euros.", "1500"),
        ("So 8 of the 12 chairs can be used.", "8"),
        ("10 / 4 = 2.5, so she needs 3 trips.", "3"),
        ("The answer is 40, so each of her 20 friends gets 2.", "40"),
        ("The answer is 12. Wait, actually one was removed, so it's 11.", "11"),
        ("It cannot be determined how many of the 15 are left.", "It cannot be determined how many of the 15 are left"),
        (r"$x = \boxed{2}$ and $x = \boxed{3}$", "2, 3"),
    ],
)
def test_numbers_as_prose_writes_them(text: str, answer: str) -> None:
    assert free_answer(text).answer == answer
