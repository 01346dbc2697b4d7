"""Recipes are read strictly: everything wrong is told at once, with place, path, value and what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rl.config import Recipe, load_recipe

MINIMAL = """\
name: try
model:
  from_config: {hidden_size: 64}
  tokenizer: {type: characters, alphabet: "0123456789+-*=;abcdefg"}
  dtype: float32
data:
  train:
    source: rl.data.chain_arithmetic:problems
    params: {split: train, size: 20}
  template: {kind: raw}
  max_prompt_length: 32
rollout:
  prompts_per_step: 4
  num_generations: 4
  max_completion_length: 64
rewards:
  reward_funcs: [format, {func: accuracy, weight: 2.0}]
grpo:
  steps: 10
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_are_filled_in(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.optimizer.learning_rate == 1e-6
    assert recipe.grpo.loss_type == "dapo"
    assert recipe.sft is None
    assert recipe.run_folder == Path("runs/try")
    assert recipe.rewards.reward_funcs == ("format", {"func": "accuracy", "weight": 2.0})
    assert recipe.optimizer_steps == 10


def test_overrides_in_both_spellings(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["--rollout.temperature", "0.8", "--seed=3", "--optimizer.learning_rate=1e-6", "--grpo.beta", "-0.0",
         "--rollout.stop_strings", "[A, B]", "--sft.steps", "5", "--sft.data.source", "rows.jsonl",
         "--output_dir", "out/{name}-{seed}"],
    )  # fmt: skip
    assert recipe.rollout.temperature == 0.8
    assert recipe.seed == 3
    assert recipe.optimizer.learning_rate == 1e-6
    assert recipe.rollout.stop_strings == ("A", "B")
    assert recipe.sft is not None and recipe.sft.steps == 5 and recipe.sft.learning_rate == 1e-6
    assert recipe.run_folder == Path("out/try-3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--seed"], "--seed: has no value"),
        (["--seed", "--name=x"], "--seed: has no value"),
        (["seed=1"], "'seed=1': expected --section.key value"),
        (["--seed=1", "--seed", "2"], "--seed: is given twice"),
        (["--name", "[1"], "--name [1: is not valid YAML"),
        (["--name.first", "x"], "name is 'try', which has no keys; set --name as a whole"),
        (["--rewards.reward_funcs.0", "x"], "rewards.reward_funcs is ['format'"),
    ],
)
def test_malformed_overrides(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(recipe_file, *overrides)


def test_unknown_keys_get_the_nearest_name_and_the_line(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL.replace("  num_generations: 4", "  num_generation: 4"))
    message = refusal(recipe_file)
    assert (
        f"{recipe_file}:14: rollout.num_generation = 4: unknown key; did you mean rollout.num_generations?" in message
    )
    assert "allowed: prompts_per_step, num_generations" in message


def test_a_key_of_another_section_is_sent_there(recipe_file: Path) -> None:
    message = refusal(recipe_file, "--grpo.temperature", "1", "--optimizr.learning_rate=1")
    assert (
        "command line: grpo.temperature = 1: unknown key; did you mean rollout.temperature or eval.temperature?"
        in message
    )
    assert "command line: optimizr: unknown key; did you mean optimizer?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--num_generation=3", "did you mean rollout.num_generations?"),
        ("--rollout-temperature=3", "did you mean rollout.temperature?"),
        ("--data.train.max_prompt_lenght=3", "did you mean data.max_prompt_length?"),
        ("--learning_rte=1", "did you mean optimizer.learning_rate or sft.learning_rate?"),
    ],
)
def test_a_misspelt_key_is_found_in_other_sections(recipe_file: Path, override: str, message: str) -> None:
    assert message in refusal(recipe_file, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--rewards.reward_funcs=[format, 3]", "command line: rewards.reward_funcs[1] = 3: must be text or a mapping"),
        ("--rewards.reward_funcs=['']", "command line: rewards.reward_funcs[0] = '': must not be empty"),
        ("--rewards.reward_funcs=[]", "command line: rewards.reward_funcs = []: is empty; name at least one"),
        ("--model.tokenizer=[1]", "command line: model.tokenizer = [1]: must be text or a mapping with the keys type"),
        ("--model.from_config=3", "command line: model.from_config = 3: must be text or a mapping"),
        ("--rollout.temperature.x=3", "command line: rollout.temperature: must be a valid number"),
        ("--name=2024", "command line: name = 2024: must be text; in a file '2024' with its quotes, on the command"),
        ("--data.train.source=[x.jsonl]", "command line: data.train.source = ['x.jsonl']: must be text"),
    ],
)
def test_one_mistake_is_one_complaint(recipe_file: Path, override: str, message: str) -> None:
    refused = refusal(recipe_file, override)
    assert message in refused and ": 1 problem in this recipe:" in refused


def test_a_key_in_angle_brackets_is_named(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL.replace("rollout:\n", "rollout:\n  <<: {temperature: 1}\n"))
    assert "recipe.yaml:13: rollout.<<: unknown key" in refusal(recipe_file)


def test_all_problems_come_at_once(recipe_file: Path) -> None:
    message = refusal(
        recipe_file, "--seed=true", "--grpo.loss_type=ppo", "--rollout.num_generations=1", "--grpo.beta=x",
        "--data.train=3", "--rewards.reward_funcs=format", "--model.tokenizer.typ=bytes", "--rollout.temperature=.inf",
        "--grpo.steps=1.5",
    )  # fmt: skip
    assert ": 9 problems in this recipe:" in message
    for line in (
        "command line: seed = True: must be a whole number",
        "command line: grpo.loss_type = 'ppo': must be 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'gspo' or 'cispo'",
        "command line: rollout.num_generations = 1: must be greater than or equal to 2",
        "command line: grpo.beta = 'x': must be a valid number",
        "command line: data.train = 3: must be a mapping with the keys source, config, split",
        "command line: rewards.reward_funcs = 'format': must be a list",
        "command line: model.tokenizer.typ = 'bytes': unknown key; did you mean model.tokenizer.type?",
        "command line: rollout.temperature = inf: must be a finite number",
        "command line: grpo.steps = 1.5: must be a valid integer",
    ):
        assert line in message


def test_missing_keys_say_what_they_are_for(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL.replace("  steps: 10", "  beta: 0.1"))
    assert "grpo.steps: is missing: Rollout passes" in refusal(recipe_file)
    assert load_recipe(recipe_file, ["--grpo.steps=3"]).grpo.steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", ":2: name is given twice, first in line 1"),
        ("grpo:\n  steps: 1\n  beta: 0\n  steps: 2\n", ":4: grpo.steps is given twice, first in line 2"),
        ("rewards:\n  reward_funcs:\n  - {func: a, func: b}\n", ":3: rewards.reward_funcs.0.func is given twice"),
        ("name: [a\n", "is not valid YAML"),
        ("name: !!python/object:os.system x\n", "is not valid YAML"),
        ("- a\n- b\n", "holds a list; a recipe is a mapping"),
        ("seed: 1\n7: x\n", ":2: a key must be text; put a number, true, false or null in quotes"),
        ("grpo:\n  null: x\n", ":2: a key must be text"),
        ("name: a\x00b\n", "is not valid YAML: unacceptable character"),
        ("name: &a [*a]\n", "an anchor (&name) stands inside itself"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused = refusal(path)
    assert message in refused and str(path) in refused


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "nothing.yaml: cannot be read: No such file" in refusal(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "latin.yaml: is not UTF-8 text" in refusal(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "name: is missing" in refusal(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1_000", 1000), ("-3", -3), ("0.5", 0.5), ("5.", 5.0), (".5e2", 50.0), ("1E3", 1000.0),
        ("true", True), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("007", "007"),
        ("null", None), ("~", None), ("'5'", "5"), ("{a: [1, b]}", {"a": [1, "b"]}), ("1e-6x", "1e-6x"),
        ("e5", "e5"), (".", "."),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(recipe_file: Path, text: str, value: object) -> None:
    read = load_recipe(recipe_file, ["--data.train.params.x", text]).data.train.params["x"]
    assert read == value and type(read) is type(value)


def test_the_resolved_recipe_loads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["--sft.steps=3", "--sft.data.source=x.jsonl", "--name", "'1e-6'",
         "--rollout.stop_strings", """['no', '007', " x\\n", 'é']""",
         "--data.train.params.alphabet", "'0123'", "--grpo.routing_replay=false",
         "--grpo.importance_sampling_cap=null"],
    )  # fmt: skip
    recipe.dump(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert recipe.name == "1e-6" and recipe.rollout.stop_strings == ("no", "007", " x\n", "é")


def test_sections_are_frozen(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.grpo.steps = 3  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def undocumented(section: type, path: str) -> list[str]:
        from rl.config.loading import _section_in

        missing = []
        for key, field in section.model_fields.items():  # type: ignore[attr-defined]
            missing += [] if field.description else [path + key]
            inner = _section_in(field.annotation)
            missing += undocumented(inner, f"{path}{key}.") if inner else []
        return missing

    assert undocumented(Recipe, "") == []


def test_the_schema_is_printed_for_editors() -> None:
    printed = subprocess.run([sys.executable, "-m", "rl.config"], capture_output=True, text=True, check=True).stdout
    schema = json.loads(printed)
    assert (
        schema["properties"]["grpo"]
        and "Clip range" in schema["$defs"]["GRPOSection"]["properties"]["epsilon"]["description"]
    )


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[3].glob("recipes/**/*.yaml")), ids=lambda path: path.name
)
def test_recipes_of_the_repository_are_valid(path: Path) -> None:
    if path.parent.name == "accelerate_configs":
        assert path.read_text().startswith("#") and "Hardware:" in path.read_text()
    else:
        recipe = load_recipe(path)
        assert recipe.batch_plan(1).rows == recipe.rollout.prompts_per_step * recipe.rollout.num_generations
        assert "Hardware:" in path.read_text()
