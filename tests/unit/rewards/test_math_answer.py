"""accuracy as a reward function: columns, references, masked rows, reasons, the symbolic fallback, real graded
outputs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rewards.base import Score
from rewards.grading import agreement, grade_rows
from rewards.math_answer import Case, accuracy_reward, judge_cases, reference_answer
from rewards.math_compare import compare_texts
from rewards.phrases import Extraction
from rewards.pool import Outcome
from rewards.symbolic import worth_trying

DATA = Path(__file__).parents[2] / "data"
SHARED = Path(__file__).parents[4] / "shared" / "data"
GOOD = "<think>6 * 7</think><answer>42</answer>"


def test_columns_and_references() -> None:
    golds = ["6 * 7 = <<6*7=42>>42\n#### 42", 42, 42.0, "41", None, "", [42]]
    scores = accuracy_reward(["p"] * 7, [GOOD] * 7, [[1]] * 7, answer=golds)
    assert [score.value for score in scores] == [1.0, 1.0, 1.0, 0.0, None, None, None]


def test_another_column_and_conversations() -> None:
    messages = [[{"role": "assistant", "content": GOOD}]]
    assert accuracy_reward([], messages, solution=["42"], gold_column="solution")[0].value == 1.0


def test_a_missing_column_is_the_users_error() -> None:
    with pytest.raises(ValueError, match=r"'answer'.*only the columns \['solution'\]"):
        accuracy_reward([], [GOOD], solution=["42"])
    with pytest.raises(ValueError, match="found 2 values"):
        accuracy_reward([], [GOOD], answer=["42", "43"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x\n#### 1,234", "1,234"),
        ("42", "42"),
        (0.5, "0.5"),
        (7, "7"),
        (None, None),
        ("  ", None),
        (True, None),
        ({}, None),
    ],
)
def test_reference_answer(value: object, text: str | None) -> None:
    assert reference_answer(value) == text


def test_every_decision_says_why() -> None:
    right = accuracy_reward([], [GOOD], answer=["84/2"])[0]
    assert right == Score(1.0, "equals the reference (answer block)", "42", "84/2", "number")
    missing = accuracy_reward([], ["<think>x</think>42"], answer=["42"])[0]
    assert (missing.value, missing.rule, missing.reason) == (0.0, "no answer", "no answer block")


def test_thinking_never_counts() -> None:
    texts = [
        "<think>\\boxed{42}</think><answer>I do not know</answer>",
        "<think><answer>42</answer></think>",
        "<think>42",
        "<think>x</think><answer>41</answer><answer>42</answer>",
    ]
    assert [score.value for score in accuracy_reward([], texts, answer=["42"] * 4)] == [0.0] * 4


def test_what_the_rules_cannot_settle_goes_to_the_pool_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[tuple[str, str]]] = []

    class Pool:
        def map(self, function: str, jobs: list[tuple[str, str]], time_limit_s: float, *, tries: int) -> list[Outcome]:
            assert function == "rewards.symbolic_worker:verify_answer"
            assert time_limit_s <= 1.0
            calls.append(list(jobs))
            return [Outcome(True, "ok", 0.1), Outcome(None, "timeout", 1.0)]

    monkeypatch.setattr("rewards.symbolic.shared_pool", Pool)
    integral = "\\int_0^x t dt"
    cases = [Case("x^2/2", Extraction(text, "test")) for text in (integral, "x^2/2", integral + " + 0", "x^3")]
    scores = judge_cases(cases)
    assert calls == [[("x^2/2", integral), ("x^2/2", integral + " + 0")]]
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0]
    assert scores[2].rule == "math-verify timeout"


def test_the_symbolic_verifier_itself() -> None:
    """Runs in a real worker: an integral that only sympy evaluates."""
    scores = judge_cases([Case("\\frac{x^2}{2}", Extraction("\\int_0^x t\\, dt", "test"))])
    assert scores[0].rule.startswith("math-verify")


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "10^{10^{10}}",
        "x^{99999}",
        "(10^9)!",
        "\\int " * 4,
        "{" * 20,
        "x" * 400,
        "__import__('os')",
        "open('x')",
    ],
)
def test_the_guard_refuses_bombs(text: str) -> None:
    assert not worth_trying(text)


def test_expressions_agree_with_sympy() -> None:
    """The slow reference: sympy on random expressions and their expanded forms or a changed one."""
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    random.seed(11)
    for _ in range(40):
        a, b, c, d = (random.randint(-5, 5) for _ in range(4))
        expression = (a * x + b * y + 1) * (c * x - d) ** 2 + sympy.Rational(a, 7)
        changed = expression + random.choice([0, 0, 1, x, sympy.Rational(1, 100)])
        expected = sympy.simplify(expression - changed) == 0
        found = compare_texts(sympy.latex(expression), sympy.latex(sympy.expand(changed))).equal
        assert found == expected, (expression, changed)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sample_of_real_outputs() -> None:
    rows = _rows(DATA / "grader_sample.jsonl")
    wrong = [
        (row["id"], verdict)
        for row, verdict in zip(rows, grade_rows(rows, tagged=False), strict=True)
        if verdict["correct"] != row["expected"]
    ]
    assert not wrong


@pytest.mark.skipif(not (SHARED / "grader_cases.jsonl").exists(), reason="the full set of cases is not here")
def test_bars_on_the_full_set() -> None:
    rows = _rows(SHARED / "grader_cases.jsonl")
    verdicts = list(grade_rows(rows, tagged=False))
    right = [verdict["correct"] == row["expected"] for row, verdict in zip(rows, verdicts, strict=True)]
    hard = [good for good, row in zip(right, rows, strict=True) if row["hard"]]
    assert sum(right) / len(right) >= 0.993, agreement(rows, verdicts)
    assert sum(hard) / len(hard) >= 0.93, agreement(rows, verdicts)


@pytest.mark.skipif(not (SHARED / "math_test.jsonl").exists(), reason="MATH is not here")
def test_reference_solutions_of_math_score_full_marks() -> None:
    """All but the 7 of 5,000 whose reference keeps only the last of several boxes."""
    rows = _rows(SHARED / "math_test.jsonl")[:1500]
    golds, solutions = [row["answer"] for row in rows], [row["solution"] for row in rows]
    scores = accuracy_reward([], solutions, answer=golds, tagged=False)
    assert sum(score.value == 1.0 for score in scores) >= len(rows) - 7
