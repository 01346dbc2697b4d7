"""Setting a run up: what is refused, and what a recipe turns into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.config import load_recipe
from rl.data import load_tokenizer
from rl.train import session

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


def test_grpo_starts_from_the_cold_start_or_says_what_to_do(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    with pytest.raises(ValueError, match=r"scripts/sft\.py"):
        session.starting_point(recipe, tmp_path)
    policy = tmp_path / "cold_start" / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    assert session.starting_point(recipe, tmp_path) == policy
    assert session.starting_point(load_recipe(RECIPE, ["--sft", "null"]), tmp_path) is None


def test_random_policy_gets_its_vocabulary_from_the_tokenizer() -> None:
    model = load_recipe(RECIPE).model
    tokenizer = load_tokenizer(model)
    policy = session.make_policy(model, tokenizer, seed=0, device=torch.device("cpu"))
    assert policy.config.vocab_size == len(tokenizer) == 32
    assert policy.config.eos_token_id == tokenizer.eos_token_id
    assert sum(p.numel() for p in policy.parameters()) == 1_227_936
