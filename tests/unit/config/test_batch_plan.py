"""Batch arithmetic against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.config import Recipe, load_recipe

RECIPE = """\
name: try
model: {from_config: {hidden_size: 64}, tokenizer: {type: bytes}}
data: {train: {source: train.jsonl}, max_prompt_length: 100}
rollout: {prompts_per_step: 32, num_generations: 16, max_completion_length: 900}
rewards: {reward_funcs: [format]}
grpo: {steps: 5, mini_batches: 4, num_iterations: 2}
optimizer: {micro_batch_tokens: 4500}
"""


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides)


def test_numbers_on_eight_processes(tmp_path: Path) -> None:
    plan = recipe(tmp_path, "--sft.steps=1", "--sft.data.source=x.jsonl", "--sft.batch_size=64").batch_plan(8)
    assert (plan.rows, plan.prompts_per_rank, plan.rows_per_rank) == (512, 4, 64)
    assert (plan.rows_per_mini_batch, plan.rows_per_rank_per_mini_batch) == (128, 16)
    assert (plan.optimizer_steps_per_step, plan.optimizer_steps) == (8, 40)
    # rows of 100 + 900 tokens: 4 fit into 4500, so 16 rows need 4 micro-batches
    assert (plan.longest_row_tokens, plan.min_rows_per_micro_batch, plan.max_accumulation) == (1000, 4, 4)
    assert plan.sft_rows_per_rank == 8
    assert "512  64 on each process" in str(plan) and "cold-start batch" in str(plan)


def test_one_process_holds_everything(tmp_path: Path) -> None:
    plan = recipe(tmp_path).batch_plan(1)
    assert (plan.rows_per_rank, plan.rows_per_rank_per_mini_batch, plan.max_accumulation) == (512, 128, 32)
    assert plan.sft_rows_per_rank == 0 and "cold-start" not in str(plan)


def test_an_uneven_remainder_rounds_accumulation_up(tmp_path: Path) -> None:
    plan = recipe(tmp_path, "--optimizer.micro_batch_tokens=3000", "--grpo.mini_batches=1").batch_plan(32)
    assert (plan.rows_per_rank, plan.min_rows_per_micro_batch, plan.max_accumulation) == (16, 3, 6)


def test_every_number_that_does_not_divide_is_named(tmp_path: Path) -> None:
    plain = recipe(tmp_path, "--sft.steps=1", "--sft.data.source=x.jsonl", "--sft.batch_size=2")
    with pytest.raises(ValueError) as caught:
        plain.batch_plan(5)
    assert "rollout.prompts_per_step = 32: must be a multiple of the 5 processes; nearest: 30 or 35" in str(
        caught.value
    )
    assert "sft.batch_size = 2: must be a multiple of the 5 processes; nearest: 5" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"grpo\.mini_batches = 128: must divide the 64 completions of each of 8 processes"
    ):
        recipe(tmp_path, "--grpo.mini_batches=128").batch_plan(8)
    with pytest.raises(ValueError, match=r"mini_batches = 3: must divide the 512 completions of each of 1 processes"):
        recipe(tmp_path, "--grpo.mini_batches=3").batch_plan(1)
    with pytest.raises(ValueError, match="world_size = 0"):
        plain.batch_plan(0)
