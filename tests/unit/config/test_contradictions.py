"""Values that are valid alone and wrong together are refused, and no option is left without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.config import DataSource, load_recipe

RECIPE = """\
name: try
model: {from_config: {hidden_size: 64}, tokenizer: {type: bytes}, dtype: float32}
data:
  train: {source: train.jsonl}
  eval: {source: eval.jsonl}
  template: {kind: raw}
rewards: {reward_funcs: [format, accuracy]}
grpo: {steps: 10}
"""
SFT = ("--sft.steps=3", "--sft.data.source=x.jsonl")
NO_EVAL = "--data.eval=null"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


REFUSED = [
    (["--grpo.epsilon_high=0.1"], "grpo.epsilon_high = 0.1: must be at least epsilon (0.2)"),
    (["--grpo.loss_type=cispo", "--grpo.epsilon=0.3"], "grpo.epsilon = 0.3: has no effect with loss_type: cispo"),
    (["--grpo.loss_type=cispo", "--grpo.delta=3"], "grpo.delta = 3: has no effect with loss_type: cispo"),
    (["--grpo.delta=1.1"], "grpo.delta = 1.1: must be above 1 + epsilon_high (1.2)"),
    (["--grpo.ref_update_steps=4"], "grpo.ref_update_steps = 4: has no effect while beta is 0"),
    (["--grpo.unbiased_kl=true"], "grpo.unbiased_kl = True: has no effect while beta is 0"),
    (
        ["--rollout.engine=hf", "--rollout.cache_bytes=1000"],
        "rollout.cache_bytes = 1000: has no effect with engine: hf",
    ),
    (
        ["--rollout.engine=hf", "--rollout.batch_invariant=true"],
        "rollout.batch_invariant = True: has no effect with engine: hf",
    ),
    (
        ["--rollout.engine=hf", "--grpo.routing_replay=true"],
        "grpo.routing_replay = True: needs rollout.engine: in_process",
    ),
    (["--optimizer.micro_batch_tokens=100"], "optimizer.micro_batch_tokens = 100: must hold the longest row"),
    (["--optimizer.warmup_steps=11"], "optimizer.warmup_steps = 11: must be at most grpo.steps x mini_batches"),
    ([*SFT, "--sft.warmup_steps=4"], "sft.warmup_steps = 4: must be at most steps (3)"),
    (
        [*SFT, "--sft.micro_batch_tokens=10"],
        "sft.micro_batch_tokens = 10: must hold the longest row, max_length (2048)",
    ),
    ([NO_EVAL, "--eval.eval_steps=5"], "eval.eval_steps = 5: has no effect without data.eval"),
    ([NO_EVAL, "--data.eval_overlap=warn"], "data.eval_overlap = 'warn': has no effect without data.eval"),
    (["--eval.greedy=false"], "eval.num_samples = 0: is 0 and greedy is false"),
    (["--eval.top_p=0.9"], "eval.top_p = 0.9: has no effect while num_samples is 0"),
    (["--eval.min_p=0.1"], "eval.min_p = 0.1: has no effect while num_samples is 0"),
    (["--rewards.reward_weights=[1]"], "rewards.reward_weights = [1]: has 1 entries for 2 reward_funcs"),
    (["--rewards.reward_weights=[0, 0]"], "rewards.reward_weights = [0, 0]: are all 0"),
    (["--logging.run_name=x"], "logging.run_name = 'x': has no effect while report_to is empty"),
    (
        ["--model.name_or_path=x"],
        "model.name_or_path = 'x': exactly one of name_or_path and from_config is needed; both",
    ),
    (["--model.from_config=null"], "exactly one of name_or_path and from_config is needed; neither is given"),
    (["--model.tokenizer=null"], "model.tokenizer = None: is missing; from_config brings none"),
    (["--model.from_config={}"], "model.from_config: is empty"),
    (["--model.trust_remote_code=true"], "model.trust_remote_code = True: has no effect without a checkpoint"),
    (["--model.tokenizer.type=characters"], "model.tokenizer.alphabet = None: is missing"),
    (["--model.tokenizer.alphabet=abc"], "model.tokenizer.alphabet = 'abc': has no effect with type: bytes"),
    (
        ["--model.tokenizer.type=characters", "--model.tokenizer.alphabet=abca"],
        "model.tokenizer.alphabet = 'abca': names 'a' more than once",
    ),
    (["--model.tokenizer.special_tokens=[<a>, <a>]"], "'<a>' is named twice"),
    (["--model.tokenizer.special_tokens=[<eos>]"], "'<eos>' is named twice, or is one of"),
    (["--data.template.text=x {prompt}"], "data.template.text = 'x {prompt}': has no effect with kind: raw"),
    (
        ["--data.template={kind: r1_zero, text: no place}"],
        "data.template.text = 'no place': must contain {prompt} exactly",
    ),
    (["--data.template={kind: r1_zero, system: x}"], "data.template.system = 'x': has no effect with kind: r1_zero"),
    (
        ["--data.train.params={a: 1}"],
        "data.train.params: only a Python function takes parameters; 'train.jsonl' is none",
    ),
    (
        ["--data.train.split=train"],
        "data.train.split = 'train': only a hub data set has it; 'train.jsonl' is read as jsonl",
    ),
    (["--data.train.extract={a: '(x'}"], "data.train.extract: a: '(x' is no regular expression"),
    (["--data.train.extract={a: 'x'}"], "data.train.extract: a: 'x' has no group"),
    (["--output_dir=runs/{user}"], "output_dir = 'runs/{user}': may contain {name} and {seed}"),
    (["--name=a/b"], "name = 'a/b': names a folder: no slash"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda item: item[0] if isinstance(item, list) else "")
def test_contradictions_are_refused(recipe_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--grpo.epsilon_high=0.28"],
        ["--grpo.epsilon_high=10"],
        ["--grpo.epsilon=0.0003", "--grpo.epsilon_high=0.0004", "--grpo.loss_type=gspo"],
        ["--grpo.loss_type=cispo", "--grpo.epsilon_high=4"],
        ["--grpo.delta=4"],
        ["--grpo.beta=0.001", "--grpo.ref_update_steps=400"],
        ["--grpo.mini_batches=16"],
        ["--data.eval=null"],
        ["--eval.metric=format", "--data.eval=null"],
        ["--eval.num_samples=4", "--eval.top_p=0.9", "--eval.greedy=false"],
        ["--model={name_or_path: deepseek-ai/DeepSeek-V2-Lite}"],
        [*SFT, "--sft.learning_rate=2e-3", "--sft.warmup_steps=3"],
        ["--logging.report_to=[wandb]", "--logging.project=x"],
    ],
    ids=lambda item: item[0],
)
def test_sensible_combinations_are_accepted(recipe_file: Path, overrides: list[str]) -> None:
    load_recipe(recipe_file, overrides)


def test_several_contradictions_of_a_section_come_together(recipe_file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, ["--grpo.epsilon_high=0.1", "--grpo.ref_update_steps=4", "--eval.top_k=3"])
    assert ": 3 problems in this recipe" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("openai/gsm8k", "hub"), ("gsm8k", "hub"), ("a/b.jsonl", "jsonl"), ("x.json", "json"), ("x.CSV", "csv"),
        ("x.parquet", "parquet"), ("pkg.mod:f", "function"), ("some/file.py:f", "function"), ("mod:f", "function"),
    ],
)  # fmt: skip
def test_sources_are_told_by_their_form(source: str, kind: str) -> None:
    assert DataSource(source=source).kind == kind
