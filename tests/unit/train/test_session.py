"""Setting a run up: what is refused, and what a recipe turns into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.config import ModelSection, load_recipe
from rl.data import load_tokenizer
from rl.train import session

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


def test_one_run_at_a_time_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LOCKS", [])
    session._lock(tmp_path)
    with pytest.raises(ValueError, match="in use by another run"):
        session._lock(tmp_path)
    session._LOCKS.pop().close()
    session._lock(tmp_path)


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


def test_a_tokenizer_larger_than_the_policy_is_refused() -> None:
    model = load_recipe(RECIPE, ["--model.from_config.vocab_size", "20"]).model
    with pytest.raises(ValueError, match=r"32 tokens.*20"):
        session.make_policy(model, load_tokenizer(model), seed=0, device=torch.device("cpu"))
    assert isinstance(model, ModelSection)
