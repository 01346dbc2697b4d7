"""Evaluation against an engine with known answers: every number can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.scorer import RewardScorer
from rl.config import EvalSection
from rl.train.evaluate import Evaluation, Evaluator, rightness_functions
from rl.train.experience import TextOf
from rl.train.record import to_json
from rl.types import Problem, SamplingParams
from tests.unit.train.spoken import TOKENIZER, Spoken, answered

Functions = Sequence[str | dict[str, Any]]


def evaluation(
    said: Mapping[str, Sequence[str]],
    golds: Sequence[Any],
    functions: Functions = ("format", "accuracy"),
    *,
    engine: Spoken | None = None,
    on_error: Any = "stop",
    **section: Any,
) -> Evaluation:
    """said: completions of the problems p0, p1, ..., whose reference answers are `golds`."""
    scorer = RewardScorer(functions, on_error=on_error)
    settings = EvalSection(**section)
    evaluator = Evaluator(
        settings,
        [Problem(f"p{i}", str(i), (3,), {"answer": gold}) for i, gold in enumerate(golds)],
        rightness=rightness_functions(scorer.entries, settings.metric),
        engine=engine or Spoken(said),
        scorer=scorer,
        decode=TextOf(TOKENIZER, [1]),
        params=SamplingParams(32, stop_token_ids=(TOKENIZER.eos_token_id,)),
        seed=0,
    )
    found = evaluator.run()
    scorer.close()
    return found


def spoken(*answers: str) -> dict[str, list[str]]:
    """One string of one-digit answers a problem."""
    return {f"p{i}": [answered(digit) for digit in digits] for i, digits in enumerate(answers)}


def test_accuracy_pass_and_majority() -> None:
    engine = Spoken(spoken("0010", "1222", "3345", "3333"))
    found = evaluation({}, "0123", engine=engine, num_samples=4, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1)
    drawn = [(p.temperature, p.top_p, p.top_k, p.min_p) for p in engine.params]
    assert drawn == [(0.0, 1.0, 0, 0.0), (0.7, 0.9, 5, 0.1)]
    metrics = found.metrics
    assert metrics["eval/accuracy"] == 3 / 4  # p2 is wrong
    assert metrics["eval/sampled_accuracy"] == (3 + 1 + 0 + 4) / 16
    assert metrics["eval/pass@1"] == pytest.approx(8 / 16)
    # pass@2 of 3, 1, 0, 4 right among 4: 1 - C(wrong, 2) / 6
    assert metrics["eval/pass@2"] == pytest.approx((1 + (1 - 3 / 6) + 0 + 1) / 4)
    assert metrics["eval/pass@4"] == pytest.approx(3 / 4)
    assert metrics["eval/maj@4"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert metrics["eval/none_frac"] == 0.0
    assert metrics["eval/greedy_mean_length"] == 7  # <think> a </think> <answer> d </answer> <eos>
    assert metrics["eval/accuracy_low"] < 0.75 < metrics["eval/accuracy_high"]
    table = found.table()
    assert len(table) == 20 and table[0]["kind"] == "greedy" and table[0]["extracted"] == "0"


@pytest.mark.parametrize(("given", "expected"), [({}, 32), ({"max_completion_length": 64}, 64)])
def test_answers_may_be_longer_than_in_training(given: dict[str, int], expected: int) -> None:
    engine = Spoken(spoken("00"))
    evaluation({}, "0", engine=engine, num_samples=2, **given)
    assert [params.max_completion_length for params in engine.params] == [expected, expected]


def test_every_decision_says_why() -> None:
    row = evaluation(spoken("1"), "2").table()[0]
    assert row["scores"] == {"format": 1.0, "accuracy": 0.0} and row["right"] is False
    said = row["explanations"]["accuracy"]
    assert (said["extracted"], said["gold"], said["rule"]) == ("1", "2", "different") and said["reason"]
    assert json.loads(json.dumps(to_json(row))) == row


def test_rows_without_a_value_count_neither_as_right_nor_as_wrong() -> None:
    """p1 has no reference, so accuracy does not apply to it."""
    metrics = evaluation(spoken("00", "11", "34"), ["0", None, "3"], num_samples=2).metrics
    assert metrics["eval/none_frac"] == pytest.approx(1 / 3)
    assert metrics["eval/accuracy"] == 1.0 and metrics["eval/accuracy_low"] == pytest.approx(0.3424, abs=5e-5)  # 2 of 2
    assert metrics["eval/sampled_accuracy"] == pytest.approx(3 / 4)
    assert metrics["eval/pass@2"] == 1.0 and metrics["eval/maj@2"] == pytest.approx((1 + 0.5) / 2)
    assert metrics["eval/greedy_mean_length"] == 7  # lengths are of all answers


def test_samples_that_a_function_failed_on_are_left_out_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("""
from rewards.base import Score

def picky(completions, answer):
    \"\"\"Fails on texts with a 9.\"\"\"
    found = [text[-10] for text in completions]
    return [
        Score(None, "a 9", rule="error") if it == "9" else Score(float(it == gold), "", it)
        for it, gold in zip(found, answer)
    ]
""")
    own = [f"{tmp_path}/own.py:picky"]
    said = spoken("0019", "1299", "9999")
    metrics = evaluation(said, "012", own, num_samples=4, greedy=False, metric="picky", on_error="mask").metrics
    assert metrics["eval/none_frac"] == pytest.approx(7 / 12)
    for name in ("eval/sampled_accuracy", "eval/pass@1"):
        assert metrics[name] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["eval/pass@2"] == pytest.approx(
        (1 + 1) / 2
    )  # C(1, 2) = 0 and C(1, 2) = 0 ways to draw wrong ones only
    assert "eval/pass@4" not in metrics  # no problem has four judged samples
    assert metrics["eval/maj@4"] == pytest.approx((1 + 0.5) / 2)
    assert "eval/accuracy" not in metrics


def test_one_answer_in_several_wordings_is_one_vote() -> None:
    said = {"p0": [answered(a) for a in ("1/2", "0.5", "3", "3", "2/4")]}
    assert evaluation(said, ["1/2"], num_samples=5).metrics["eval/maj@5"] == 1.0
    said = {"p0": [answered(a) for a in ("1/2", "0.5", "3", "3.0", "6/2")]}
    assert evaluation(said, ["1/2"], num_samples=5).metrics["eval/maj@5"] == 0.0


PLAIN = """
def ends_well(completions, answer):
    return [float(text.endswith(f"{gold}</answer>")) for text, gold in zip(completions, answer)]
"""


def test_a_function_that_extracts_nothing_gives_no_majority(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PLAIN)
    own = [f"{tmp_path}/own.py:ends_well"]
    metrics = evaluation(spoken("00", "12"), "01", own, num_samples=2, metric="ends_well").metrics
    assert metrics["eval/accuracy"] == 1.0 and metrics["eval/pass@2"] == 1.0
    assert not [name for name in metrics if "maj@" in name]


def test_without_a_metric_function_only_lengths_are_measured(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PLAIN)
    found = evaluation(spoken("00"), "0", [f"{tmp_path}/own.py:ends_well", "format"], num_samples=2)
    assert sorted(found.metrics) == [
        f"eval/{kind}_{what}" for kind in ("greedy", "sampled") for what in ("mean_length", "truncated_frac")
    ]
    assert found.table()[0]["right"] is None


def test_what_functions_count_is_in_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PLAIN.replace("answer):", "answer, counters):\n    counters.add(calls=1)"))
    metrics = evaluation(spoken("00", "11"), "01", [f"{tmp_path}/own.py:ends_well"], num_samples=2).metrics
    assert metrics["eval/rewards/ends_well/calls"] == 4  # a greedy and a sampled group of each problem


def test_each_task_is_judged_by_its_own_function() -> None:
    by_answer = {"column": "answer", "in": ["0", "1"]}
    functions: Functions = [
        {"func": "accuracy", "when": by_answer},
        {"func": "exact_match", "name": "word", "when": {"column": "answer", "equals": "2"}},
    ]
    found = evaluation(spoken("0", "2", "2", "3"), "0123", functions)
    assert [answers[0].right for answers in found.greedy] == [True, False, True, None]
    assert found.metrics["eval/accuracy"] == 2 / 3 and found.metrics["eval/none_frac"] == 1 / 4


def test_which_function_says_right(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PLAIN + "accuracy = ends_well\n")

    def chosen(functions: Functions, wanted: str | None = None) -> tuple[str, ...]:
        return rightness_functions(RewardScorer(functions).entries, wanted)

    assert chosen(["format", "accuracy"]) == ("accuracy",)
    assert chosen(["accuracy", "format"], "format") == ("format",)
    # by the function, whatever it is called
    assert chosen([{"func": "accuracy", "name": "is_right"}, "format"]) == ("is_right",)
    assert chosen(["rewards.math_answer:accuracy_reward", "format"]) == ("accuracy_reward",)
    assert chosen([f"{tmp_path}/own.py:accuracy", "format"]) == ()
    assert chosen(["countdown", "exact_match"]) == ("exact_match", "countdown")
    # never just the last one
    assert chosen([f"{tmp_path}/own.py:ends_well", "format"]) == ()
    assert chosen([f"{tmp_path}/own.py:ends_well", "format"], "ends_well") == ("ends_well",)
    with pytest.raises(ValueError, match=r"eval\.metric.*allowed: format"):
        chosen(["format"], "acuracy")
