"""What `accuracy` makes of a math-verify that is broken, of a text that kills it, and of the limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards.math_answer import accuracy_reward, judge_pair
from rewards.scorer import RewardError, RewardScorer, ScoredBatch

OPEN = r"\int_0^x t\, dt"  # only math-verify could settle it
GOLD = "x^3"


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(body: str) -> None:
        path = tmp_path / "verifier.py"
        path.write_text(f"import os, time\n{body}\n")
        monkeypatch.setattr("rewards.symbolic.FUNCTION", f"{path}:verify_answer")

    return use


def score(answers: list[str], on_error: str = "mask") -> ScoredBatch:
    texts = [f"<think>t</think><answer>{answer}</answer>" for answer in answers]
    rows = len(texts)
    scorer = RewardScorer(["accuracy"], on_error="stop" if on_error == "stop" else "mask")
    return scorer.score(["p"] * rows, texts, [[0]] * rows, {"answer": [GOLD] * rows}, [0] * rows)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ImportError('antlr is missing')", "ImportError: antlr is missing"),
        ("raise AttributeError('half installed')", "AttributeError: half installed"),
        ("def verify_answer(gold, answer): os.abort()", "the worker died of SIGABRT"),
        ("def verify_answer(gold, answer): os._exit(1)", "the worker died"),
    ],
)
def test_a_verifier_that_does_not_work_is_an_error_not_a_zero(
    verifier: Callable[[str], None], body: str, says: str
) -> None:
    verifier(body)
    assert not judge_pair(GOLD, OPEN).decided
    batch = score([GOLD, "5", OPEN])
    assert batch.rewards == [1.0, 0.0, None]  # what our own rules settle does not need it
    assert batch.metrics["rewards/accuracy/error_frac"] == pytest.approx(1 / 3)
    assert says in batch.scores["accuracy"][2].reason and batch.scores["accuracy"][2].rule == "error"
    with pytest.raises(RewardError, match="row 2: math-verify: "):
        score([GOLD, "5", OPEN], on_error="stop")


def test_a_text_that_kills_the_verifier_scores_zero_and_says_so(verifier: Callable[[str], None]) -> None:
    verifier("def verify_answer(gold, answer):\n    if 'dt' in answer: os.abort()\n    return True")
    batch = score([OPEN, r"\int_0^x t\, du"], on_error="stop")
    assert batch.rewards == [0.0, 1.0] and batch.scores["accuracy"][0].rule == "math-verify error"
    assert "SIGABRT" in batch.scores["accuracy"][0].reason


def test_a_worker_that_the_machine_killed_is_replaced(verifier: Callable[[str], None], tmp_path: Path) -> None:
    flag = tmp_path / "killed once"
    verifier(
        "def verify_answer(gold, answer):\n"
        f"    if not os.path.exists({str(flag)!r}):\n"
        f"        open({str(flag)!r}, 'w').close()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return True"
    )
    assert score([OPEN], on_error="stop").rewards == [1.0]


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("def verify_answer(gold, answer): time.sleep(60)", "math-verify timeout"),
        ("def verify_answer(gold, answer): bytearray(1 << 40)", "math-verify memory"),
    ],
)
def test_limits_are_counted_and_cost_the_row_only(verifier: Callable[[str], None], body: str, rule: str) -> None:
    verifier(body)
    started = time.monotonic()
    batch = score([OPEN, GOLD], on_error="stop")
    assert batch.rewards == [0.0, 1.0] and batch.scores["accuracy"][0].rule == rule
    assert batch.metrics["rewards/accuracy/timeout_frac"] == 0.5
    assert time.monotonic() - started < 30  # not 60


def test_the_real_one_works() -> None:
    texts = [f"<answer>{OPEN}</answer>", f"<answer>{OPEN}</answer>"]
    scores = accuracy_reward([], texts, answer=[r"\frac{x^2}{2}", GOLD])
    assert [one.value for one in scores] == [1.0, 0.0] and scores[1].rule == "math-verify"


def test_a_math_verify_that_finds_nothing_equal_is_refused() -> None:
    """Its parser's exceptions end as "no answer"; an installation without it must not look like wrong answers."""
    source = (Path(__file__).parents[3] / "rewards" / "symbolic_worker.py").read_text()
    broken = source.replace("return bool(", "return not bool(")
    assert broken != source
    with pytest.raises(ImportError, match="does not find that"):
        exec(compile(broken, "symbolic_worker.py", "exec"), {"__name__": "broken_symbolic_worker"})
