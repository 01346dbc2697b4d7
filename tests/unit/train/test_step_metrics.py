"""A step's metrics by hand, and its seconds over ranks of different speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.train import step_metrics as module
from rl.train.step_metrics import stage_seconds, step_metrics
from rl.train.update import UpdateResult
from tests.unit.train.test_experience import collected

SECONDS = {"rollout": 2.0, "reward": 0.5, "update": 1.0, "step": 4.0, "rest": 0.5}


def metrics_of(functions: list[Any] | None = None, *, rightness: tuple[str, ...] = ()) -> dict[str, float]:
    """Of twelve completions, most of seven tokens."""
    load = torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]])
    result = UpdateResult([], {"loss": 0.25, "skipped_updates": 1.0}, load)
    experience = collected(functions) if functions else collected()
    return step_metrics(experience, result, SECONDS, epoch=0.5, rightness=rightness)


def test_metrics_by_hand() -> None:
    found = metrics_of(rightness=("word",))
    # <think> a </think> <answer> 0.5 </answer> <eos> and the like: 1, 3 or 9 letters more or less
    lengths = [9, 7, 2, 9, 9, 9, 9, 9, 9, 7, 9, 7]
    assert found["completions/mean_length"] == sum(lengths) / 12 and found["num_tokens"] == sum(lengths)
    assert (found["completions/min_length"], found["completions/max_length"]) == (2, 9)
    assert found["accuracy"] == 4 / 6  # of the rows that the function applies to
    assert found["loss"] == 0.25 and found["skipped_updates"] == 1.0 and found["epoch"] == 0.5
    assert found["routing/max_load_over_mean"] == (2 + 1) / 2
    assert found["rollout/tokens_per_s"] == sum(lengths) / 2.0
    assert found["train/tokens_per_s"] == sum(lengths) / 4.0
    assert (found["time/step_s"], found["time/rollout_s"], found["time/rest_s"]) == (4.0, 2.0, 0.5)


def test_accuracy_is_that_of_the_first_rightness_function_with_a_value_or_absent() -> None:
    assert metrics_of(rightness=("accuracy",))["accuracy"] == 3 / 6
    assert metrics_of(rightness=("accuracy", "word"))["accuracy"] == (3 + 4) / 12
    assert "accuracy" not in metrics_of(["format"])


def test_a_step_takes_as_long_as_its_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"rollout": 5.0, "reward": 0.1, "update": 2.0, "step": 9.0}
    monkeypatch.setattr(module, "gather_objects", lambda mine: [mine, other])
    found = stage_seconds({"rollout": 3.0, "reward": 0.5, "update": 2.0}, 8.9)
    assert found == {"rollout": 5.0, "reward": 0.5, "update": 2.0, "step": 9.0, "rest": 1.5}


def test_what_has_no_stage_is_the_rest() -> None:
    assert stage_seconds({"rollout": 3.0}, 4.5) == {"rollout": 3.0, "step": 4.5, "rest": 1.5}
    assert stage_seconds({"rollout": 3.0}, 2.9999)["rest"] == 0.0  # rounding of the clock
