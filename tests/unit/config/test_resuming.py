"""Which differences between a run's recipe and that of its continuation are allowed, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.config import Recipe, load_recipe
from rl.config.loading import _all_keys
from rl.config.resuming import COLD_START_SECTIONS, MAY_CHANGE, Stage, changes_on_resume

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def changes(*overrides: str, stage: Stage = "grpo", steps_done: int = 20, start: tuple[str, ...] = ()) -> list[str]:
    """What a run started with the overrides `start` may be resumed with, after so many steps."""
    saved, given = load_recipe(RECIPE, start), load_recipe(RECIPE, [*start, *overrides])
    return changes_on_resume(saved, given, stage=stage, steps_done=steps_done)


def test_the_same_recipe_changes_nothing() -> None:
    assert changes() == [] and changes(stage="sft") == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--name=other", "--output_dir=elsewhere"], ["name: quickstart -> other", "output_dir: runs/"]),
        (["--logging.print_samples_every=1"], ["logging.print_samples_every: 10 -> 1"]),
        (["--checkpoint.save_steps=7"], ["checkpoint.save_steps: 20 -> 7"]),
        (["--eval.eval_steps=5"], ["eval.eval_steps: 0 -> 5"]),
        (["--optimizer.micro_batch_tokens=500"], ["optimizer.micro_batch_tokens: 16384 -> 500"]),
        (["--rollout.cache_bytes=100000"], ["rollout.cache_bytes: None -> 100000"]),
        (["--optimizer.on_nonfinite=skip"], ["optimizer.on_nonfinite: stop -> skip"]),
        (["--sft.logging_steps=1"], ["sft.logging_steps: 25 -> 1"]),
    ],
    ids=lambda item: item[0],
)
def test_what_leaves_the_numbers_alone_may_change_and_is_told(overrides: list[str], said: list[str]) -> None:
    for found, expected in zip(changes(*overrides), said, strict=True):
        assert found.startswith(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--seed=1", "seed: saved 0, given 1"),
        ("--rollout.num_generations=4", "rollout.num_generations: saved 8, given 4"),
        ("--grpo.loss_type=gspo", "grpo.loss_type: saved dapo, given gspo"),
        ("--data.train.params={split: train, size: 10}", "data.train.params.size: saved 4000, given 10"),
        ("--data.template.kind=r1_zero", "data.template.kind: saved raw, given r1_zero"),
        ("--model.from_config.hidden_size=64", "model.from_config.hidden_size: saved 128, given 64"),
        ("--rewards.reward_weights=[1, 1]", "rewards.reward_weights: saved [0.2, 1.0], given [1.0, 1.0]"),
        ("--eval.num_samples=8", "eval.num_samples: saved 4, given 8"),
        ("--data.train.params.operations=3", "data.train.params.operations: saved (not set), given 3"),
        ("--sft=null", "sft: saved {"),
    ],
)
def test_what_would_make_it_another_run_is_refused(override: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        changes(override, "--logging.logging_steps=2")
    assert said in str(caught.value) and "another name or output_dir" in str(caught.value)
    assert "logging.logging_steps" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_refusal_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"seed: saved 0, given 1\n  grpo\.epsilon: saved 0\.2, given 0\.1"):
        changes("--seed=1", "--grpo.epsilon=0.1")


def test_a_run_may_go_on_for_longer_where_no_schedule_was_laid_over_its_steps() -> None:
    constant = ("--optimizer.lr_scheduler_type=constant", "--sft.lr_scheduler_type=constant")
    assert changes("--grpo.steps=90", start=constant) == ["grpo.steps: 80 -> 90"]
    assert changes("--sft.steps=700", stage="sft", start=constant) == ["sft.steps: 650 -> 700"]
    assert changes("--grpo.steps=20", start=constant) == ["grpo.steps: 80 -> 20"]
    with pytest.raises(ValueError, match=r"grpo\.steps: saved 80, given 19 \(20 are done already\)"):
        changes("--grpo.steps=19", start=constant)
    with pytest.raises(ValueError, match=r"grpo\.steps: saved 80, given 90 \(the linear schedule"):
        changes("--grpo.steps=90")
    with pytest.raises(ValueError, match=r"sft\.steps: saved 650, given 700 \(the cosine schedule"):
        changes("--sft.steps=700", stage="sft")


def test_a_cold_start_goes_on_whatever_grpo_will_be() -> None:
    assert changes("--grpo.steps=5", "--rollout.num_generations=4", "--grpo.loss_type=gspo", stage="sft") == []
    with pytest.raises(ValueError, match=r"sft\.batch_size"):
        changes("--sft.batch_size=16", stage="sft")
    with pytest.raises(ValueError, match=r"sft\.steps: saved 650, given 700$"):
        changes("--sft.steps=700")


def test_the_lists_name_keys_that_exist() -> None:
    assert set(MAY_CHANGE) <= set(_all_keys(Recipe)) and set(COLD_START_SECTIONS) <= set(Recipe.model_fields)
