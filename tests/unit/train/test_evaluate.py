"""Evaluation against an engine with known answers: every number can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from rewards.scorer import RewardScorer
from rl.config import EvalSection, GeneratedTokenizer
from rl.data import build_tokenizer
from rl.train.evaluate import Evaluator, rightness_function
from rl.train.experience import TextOf
from rl.types import Completion, Problem, RolloutGroup, RolloutRequest, SamplingParams

TOKENIZER = build_tokenizer(GeneratedTokenizer(type="characters", alphabet="0123456789"))
PROBLEMS = [Problem(f"p{i}", str(i), (3,), {"answer": str(i)}) for i in range(4)]
# What is sampled for each problem, in the order of its seeds; greedy takes the first.
SAID = {"p0": ["0", "0", "1", "0"], "p1": ["1", "2", "2", "2"], "p2": ["3", "3", "4", "5"], "p3": ["3", "3", "3", "3"]}


class KnownAnswers:
    def __init__(self) -> None:
        self.params: list[SamplingParams] = []

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        *,
        on_group: Callable[[int, RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        self.params.append(params)
        groups = []
        for i, request in enumerate(requests):
            completions = []
            for k in range(len(request.seeds)):
                text = f"<think>{request.problem.id[1]}</think><answer>{SAID[request.problem.id][k]}</answer>"
                ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
                completions.append(Completion(ids, torch.zeros(len(ids)), "stop"))
            groups.append(RolloutGroup(request.problem, completions))
            if on_group:
                on_group(i, groups[-1])
        return groups


def test_accuracy_pass_and_majority(tmp_path: Path) -> None:
    engine = KnownAnswers()
    evaluator = Evaluator(
        EvalSection(num_samples=4, temperature=0.7, top_p=0.9),
        PROBLEMS,
        engine=engine,
        scorer=RewardScorer(["format", "accuracy"]),
        decode=TextOf(TOKENIZER),
        params=SamplingParams(32, stop_token_ids=(TOKENIZER.eos_token_id,)),
        seed=0,
    )
    found = evaluator.run()
    assert [p.temperature for p in engine.params] == [0.0, 0.7] and engine.params[1].top_p == 0.9
    metrics = found.metrics
    assert metrics["eval/accuracy"] == 3 / 4  # p2 is wrong
    assert metrics["eval/sampled_accuracy"] == (3 + 1 + 0 + 4) / 16
    assert metrics["eval/pass@1"] == pytest.approx(8 / 16)
    # pass@2 of 3, 1, 0, 4 right among 4: 1 - C(wrong, 2) / 6
    assert metrics["eval/pass@2"] == pytest.approx((1 + (1 - 3 / 6) + 0 + 1) / 4)
    assert metrics["eval/pass@4"] == pytest.approx(3 / 4)
    assert metrics["eval/maj@4"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert metrics["eval/greedy_mean_length"] == 7  # <think> d </think> <answer> d </answer> <eos>
    assert metrics["eval/accuracy_low"] < 0.75 < metrics["eval/accuracy_high"]
    table = found.table()
    assert len(table) == 20 and table[0]["kind"] == "greedy" and table[0]["extracted"] == "0"


def test_which_function_says_right() -> None:
    assert rightness_function(["format", "accuracy"], None) == "accuracy"
    assert rightness_function(["format", "mine"], None) == "mine"
    assert rightness_function(["format", "accuracy"], "format") == "format"
    with pytest.raises(ValueError, match=r"eval\.metric.*allowed: format"):
        rightness_function(["format"], "acuracy")
