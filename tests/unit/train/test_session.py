"""Setting a run up: what is refused, and what a recipe turns into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.config import Recipe, load_recipe
from rl.data import ProblemSet, load_tokenizer
from rl.policy.hf import save_any
from rl.train import session, sft
from rl.train.learner import make_accelerator

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


def test_a_completion_ends_with_each_token_that_the_checkpoint_names(tmp_path: Path) -> None:
    """A chat model ends its turn with another token than the end of text that its tokenizer knows."""
    made = load_recipe(RECIPE, ["--model.tokenizer.special_tokens=[<turn>]", "--rollout.stop_strings=[]"])
    tokenizer = load_tokenizer(made.model)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    policy = session.make_policy(made.model, tokenizer, seed=0, device=torch.device("cpu"))
    save_any(policy, tmp_path, tokenizer=tokenizer)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, tokenizer.eos_token_id]}))
    recipe = load_recipe(RECIPE, [f"--model={{name_or_path: {tmp_path}, dtype: float32}}", "--rollout.stop_strings=[]"])
    opened = session.Session(recipe, tmp_path, None, load_tokenizer(recipe.model), None)  # type: ignore[arg-type]
    assert opened.sampling_params().stop_token_ids == (tokenizer.eos_token_id, turn)
    assert opened.decode([*tokenizer("1+1")["input_ids"], turn]) == "1+1"


def test_the_engine_is_the_one_that_the_recipe_describes(tmp_path: Path) -> None:
    settings = {"max_batch_size": 24, "cache_bytes": 2**20, "batch_invariant": True}
    recipe = load_recipe(RECIPE, [f"--rollout.{name}={value}" for name, value in settings.items()])
    tokenizer = load_tokenizer(recipe.model)
    policy = session.make_policy(recipe.model, tokenizer, seed=0, device=torch.device("cpu"))
    opened = session.Session(recipe, tmp_path, None, tokenizer, None)  # type: ignore[arg-type]
    engine = opened.make_engine(policy)
    assert {name: getattr(engine, name) for name in settings} == settings


def test_the_metric_must_be_one_of_the_reward_functions() -> None:
    session.make_scorer(load_recipe(RECIPE, ["--eval.metric=format"])).close()
    with pytest.raises(ValueError, match=r"eval\.metric = 'acuracy': not among .*allowed: format, accuracy"):
        session.make_scorer(load_recipe(RECIPE, ["--eval.metric=acuracy"]))


def test_one_weight_at_least_is_not_zero() -> None:
    none = "--rewards={reward_funcs: [{func: format, weight: 0}, {func: accuracy, weight: 0.0}]}"
    with pytest.raises(ValueError, match="weights of all functions are 0"):
        session.make_scorer(load_recipe(RECIPE, [none]))
    session.make_scorer(load_recipe(RECIPE, [none.replace("0.0", "1")])).close()


@pytest.mark.usefixtures("nothing_isolates")
def test_programs_are_refused_before_the_run_where_nothing_isolates() -> None:
    """With on_error: mask, the run would otherwise go on and mask every row."""
    with pytest.raises(ValueError, match=r"reward function 'code': .*apt-get install bubblewrap"):
        session.make_scorer(load_recipe(RECIPE, ["--rewards.reward_funcs=[format, code]", "--rewards.on_error=mask"]))


def load(*overrides: str) -> tuple[ProblemSet, ProblemSet | None]:
    recipe = load_recipe(RECIPE, overrides)
    return session.load_data(recipe, load_tokenizer(recipe.model), session.make_scorer(recipe))


def test_a_step_takes_no_problem_twice() -> None:
    few = "--data.train.params={split: train, size: 16}"
    train, held_out = load(few)
    assert len(train) == 16 and held_out is not None and len(held_out) == 256
    with pytest.raises(ValueError, match=r"prompts_per_step = 17: data\.train holds 16 problems; allowed: at most"):
        load(few, "--rollout.prompts_per_step=17")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_columns_that_the_rewards_read_must_be_there(split: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}b+{split[:1].count('t')}=", "answer": "1"} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load(f"--data.{split}={{source: {file}}}", "--rollout.prompts_per_step=4")
    with pytest.raises(ValueError, match=rf"data\.{split}: .*accuracy.*answer"):
        load(f"--data.{split}={{source: {file}, columns: {{gold: answer}}}}", "--rollout.prompts_per_step=4")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--rewards.reward_funcs=[format, acuracy]", "unknown reward function 'acuracy'"),
        ("--eval.metric=acuracy", "eval.metric = 'acuracy'"),
        ("--data.train={source: nowhere.jsonl}", "data.train.source = 'nowhere.jsonl'"),
        ("--data.train.params={split: train, size: 8}", "rollout.prompts_per_step = 16: data.train holds 8 problems"),
    ],
)
def test_a_cold_start_refuses_what_grpo_would_refuse_after_it(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(RECIPE, ["--output_dir", str(tmp_path), override])

    def opened(recipe: Recipe, **options: Any) -> session.Session:
        return session.Session(recipe, tmp_path, make_accelerator(torch.float32), load_tokenizer(recipe.model), None)

    monkeypatch.setattr(sft, "open_session", opened)
    with pytest.raises(ValueError) as caught:
        sft.ColdStart(recipe)
    assert said in str(caught.value)
