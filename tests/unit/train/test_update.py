"""The update stage: which rows make a mini-batch, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from rl.config import GRPOSection
from rl.train.batching import MicroBatch
from rl.train.keeping import NonFiniteError, check_finite
from rl.train.learner import Scored, StepResult
from rl.train.update import GRPOUpdate, mini_batch_rows
from tests.integration.workers.update_worker import make_experience


def test_mini_batches_deal_rows_out_across_problems() -> None:
    assert mini_batch_rows(4, 2, parts=2) == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert mini_batch_rows(4, 4, parts=1) == [set(range(16))]
    # 4 problems, 8 mini-batches of 2 rows: the first completions of problems 0 and 1, then of 2 and 3, ...
    assert mini_batch_rows(4, 4, parts=8)[:3] == [{0, 4}, {8, 12}, {1, 5}]


@pytest.mark.parametrize(
    ("problems", "group", "parts", "ranks"),
    [(4, 4, 4, 2), (4, 4, 4, 4), (32, 16, 16, 8), (32, 8, 16, 16), (6, 4, 3, 2), (8, 2, 8, 2), (8, 3, 6, 4)],
)
def test_every_rank_holds_an_equal_part_of_every_mini_batch(problems: int, group: int, parts: int, ranks: int) -> None:
    """Problem b, with all its rows, is on rank b % ranks; the printed plan says rows / ranks / parts for each."""
    minis = mini_batch_rows(problems, group, parts=parts)
    assert sorted(row for mini in minis for row in mini) == list(range(problems * group))
    for mini in minis:
        per_rank = [sum(row // group % ranks == rank for row in mini) for rank in range(ranks)]
        assert per_rank == [problems * group // parts // ranks] * ranks


class FakeLearner:
    """Gives the results it was made with, one after the other; scores every token 0."""

    policy = None
    device = torch.device("cpu")
    pads_rows = False

    def __init__(self, results: Sequence[StepResult]) -> None:
        self.results = list(results)
        self.rows: list[set[int]] = []
        self.grids: list[int] = []

    def step(self, batches: Sequence[MicroBatch], *arguments: Any, **options: Any) -> StepResult:
        self.rows.append({row.index for batch in batches for row in batch.rows})
        self.grids += [len(batch.rows) * batch.max_seqlen for batch in batches]
        return self.results.pop(0)

    def score(self, batches: Sequence[MicroBatch], **options: Any) -> list[Scored]:
        return [Scored(torch.zeros_like(b.loss_mask), torch.zeros_like(b.loss_mask), b.routes) for b in batches]


def result(loss: float) -> StepResult:
    return StepResult(loss=loss, grad_norm=loss, learning_rate=1e-3, skipped=loss != loss)


def update_with(learner: FakeLearner, *, mini_batches: int, micro_batch_tokens: int = 1000) -> GRPOUpdate:
    section = GRPOSection(steps=1, mini_batches=mini_batches)
    return GRPOUpdate(
        learner,  # type: ignore[arg-type]
        section,
        micro_batch_tokens=micro_batch_tokens,
        temperature=1.0,
        max_completion_length=32,
    )


def test_an_update_that_is_not_finite_stops_before_the_next_one_moves_the_weights() -> None:
    learner = FakeLearner([result(1.0), result(float("nan")), result(1.0)])
    stop = partial(check_finite, step=4, on_nonfinite="stop")
    with pytest.raises(NonFiniteError, match=r"^step 4: loss nan, .* did not change the weights .*on_nonfinite: skip"):
        experience = make_experience(0, with_routes=False)
        update_with(learner, mini_batches=3).run(experience, step=3, replay_routes=False, after_each=stop)
    assert learner.rows == mini_batch_rows(6, 4, parts=3)[:2]


@pytest.mark.parametrize("pads_rows", [False, True])
def test_rows_are_packed_as_the_policy_computes_them(pads_rows: bool) -> None:
    sums = {"loss_tokens": 1.0, "loss_rows": 1.0, "entropy_sum": 0.0}
    learner = FakeLearner([StepResult(0.0, 0.0, 0.0, skipped=False, sums=sums)])
    learner.pads_rows = pads_rows
    update = update_with(learner, mini_batches=1, micro_batch_tokens=120)
    experience = make_experience(0, with_routes=False)
    update.run(experience, step=0, replay_routes=False, after_each=lambda result: None)
    assert (max(learner.grids) <= 120) == pads_rows


def test_an_update_that_is_not_finite_is_skipped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    skip = partial(check_finite, step=4, on_nonfinite="skip")
    skip(result(1.0))
    assert capsys.readouterr().err == ""
    skip(result(float("nan")))
    assert "step 4" in capsys.readouterr().err
