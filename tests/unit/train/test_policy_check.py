"""What a recipe asks of a policy that it cannot do is told from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from rl.config import Recipe, load_recipe
from rl.data import load_tokenizer
from rl.policy.hf import save_any
from rl.train.policy_check import check_policy, policy_config
from rl.train.session import make_policy

RECIPES = Path(__file__).parents[3] / "recipes"
RECIPE = RECIPES / "quickstart.yaml"
AS_LLAMA = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 256, eos_token_id: 1, pad_token_id: 0}"
)
V2 = [
    f"--model.from_config.{setting}"
    for setting in ("model_type=deepseek_v2", "scoring_func=softmax", "topk_method=greedy", "norm_topk_prob=false")
]
DENSE = ["--model.from_config.n_routed_experts=null"]
LLAMA = [f"--model.from_config={AS_LLAMA}", "--rollout.engine=hf"]
RATE = "--model.router_bias_update_rate=0.001"


def check(*overrides: str, start_from: Path | None = None) -> None:
    recipe = load_recipe(RECIPE, overrides)
    check_policy(recipe, load_tokenizer(recipe.model), start_from=start_from)


@pytest.mark.parametrize("path", [RECIPE, RECIPES / "gsm8k" / "tiny_cpu.yaml", RECIPES / "bench" / "grpo_step.yaml"])
def test_our_recipes_fit(path: Path) -> None:
    recipe = load_recipe(path)
    check_policy(recipe, load_tokenizer(recipe.model))


@pytest.mark.parametrize(
    "overrides",
    [
        LLAMA,
        ["--grpo.routing_replay=true", RATE],
        ["--model.from_config.num_nextn_predict_layers=0"],
        [*V2, "--grpo.routing_replay=true"],
        DENSE,
        ["--eval.max_completion_length=224", "--sft.max_length=256", "--sft.micro_batch_tokens=256"],
    ],
    ids=["llama", "replay and bias", "no prediction layers", "V2", "dense", "full length"],
)
def test_what_a_policy_can_do_is_accepted(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["--model.from_config.n_routed_expert=8"],
            "model.from_config: policy config: unknown key 'n_routed_expert' = 8; did you mean 'n_routed_experts'?",
        ),
        (
            [*LLAMA, "--model.from_config.hiden_act=gelu"],
            "model.from_config: policy config: unknown key 'hiden_act' = 'gelu'; did you mean 'hidden_act'?",
        ),
        (
            [*LLAMA, "--model.from_config.hidden_size=wide"],
            "model_type = 'llama': Validation error for field 'hidden_size'",
        ),
        (
            ["--model.from_config.dtype=bfloat16"],
            "model.from_config.dtype = 'bfloat16': has no effect (model.dtype decides); allowed: leave it out",
        ),
        (
            ["--model.from_config.aux_loss_alpha=0.001"],
            "model.from_config.aux_loss_alpha = 0.001: has no effect (there",
        ),
        (["--model.from_config.vocab_size=20"], "model: the tokenizer has 32 tokens, the policy's vocab_size is 20"),
        (["--model.from_config=nowhere.json"], "model.from_config = 'nowhere.json': there is no file nowhere.json"),
        (
            [LLAMA[0]],
            "rollout.engine = 'in_process': samples deepseek_v2, deepseek_v3, kimi_k2 policies; this policy is a llama"
            "; allowed: hf",
        ),
        (
            ["--rollout.engine=hf"],
            "rollout.engine = 'hf': samples models of transformers; this policy is a deepseek_v3; allowed: in_process",
        ),
        ([*DENSE, "--grpo.routing_replay=true"], "grpo.routing_replay = true: this policy is a deepseek_v3 without"),
        ([*DENSE, RATE], "model.router_bias_update_rate = 0.001: this policy is a deepseek_v3 whose routers have no"),
        ([*V2, RATE], "model.router_bias_update_rate = 0.001: this policy is a deepseek_v2 whose routers have no"),
        (
            [*LLAMA, RATE],
            "model.router_bias_update_rate = 0.001: this policy is a llama whose routers have no",
        ),
        (
            ["--rollout.max_completion_length=225"],
            "data.max_prompt_length + rollout.max_completion_length = 257: the policy has max_position_embeddings = ",
        ),
        (
            ["--eval.max_completion_length=225"],
            "data.max_prompt_length + eval.max_completion_length = 257: the policy has max_position_embeddings = 256",
        ),
        (["--sft.max_length=257"], "sft.max_length = 257: the policy has max_position_embeddings = 256"),
        (
            [*LLAMA, "--sft.max_length=257"],
            "sft.max_length = 257: the policy has max_position_embeddings = 256",
        ),
    ],
    ids=lambda item: item[-1] if isinstance(item, list) else "",
)
def test_what_it_cannot_do_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(*overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("from_config", "list.json: holds a list; a config.json is an object"),
        ("name_or_path", "model.name_or_path: .*: no config.json"),
    ],
)
def test_what_is_no_config_is_told_with_its_place(key: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    other = "--model.from_config=null" if key == "name_or_path" else "--seed=0"
    with pytest.raises(ValueError, match=said):
        check(f"--model.{key}={path if key == 'from_config' else tmp_path}", other)


def test_everything_is_told_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the policy:\n  rollout\.engine.*\n  model\.router.*\n  sft\.max"
    ):
        check("--rollout.engine=hf", *DENSE, RATE, "--sft.max_length=300")


def test_the_config_is_read_from_the_file_that_is_named(tmp_path: Path) -> None:
    """Not from a config.json that happens to lie beside it."""
    values = load_recipe(RECIPE).model.from_config
    assert isinstance(values, dict)
    (tmp_path / "small.json").write_text(json.dumps({**values, "hidden_size": 64}))
    (tmp_path / "config.json").write_text(json.dumps(values))

    def width(path: Path) -> int:
        model = load_recipe(RECIPE, [f"--model.from_config={path}"]).model
        return int(policy_config(model, load_tokenizer(model)).hidden_size)

    assert width(tmp_path / "small.json") == 64 and width(tmp_path) == 128


def test_a_file_may_carry_keys_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**yaml.safe_load(AS_LLAMA), "rope_theta": 100.0, "use_mrope": False}))
    check(f"--model.from_config={path}", *LLAMA[1:])
    with pytest.raises(ValueError, match="unknown key 'use_mrope'"):
        check(*LLAMA, "--model.from_config.rope_theta=100.0", "--model.from_config.use_mrope=false")


def test_a_policy_that_reads_images_too_is_judged_by_its_text_part(tmp_path: Path) -> None:
    def write(folder: Path, **text: int) -> list[str]:
        folder.mkdir()
        values = {"model_type": "gemma3", "text_config": {"vocab_size": 40, "max_position_embeddings": 256, **text}}
        (folder / "config.json").write_text(json.dumps(values))
        return [f"--model.name_or_path={folder}", "--model.from_config=null", "--rollout.engine=hf"]

    base = write(tmp_path / "base", hidden_size=32)
    check(*base)
    with pytest.raises(ValueError, match="the policy's vocab_size is 20"):
        check(*write(tmp_path / "narrow", vocab_size=20))
    write(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ValueError, match="model: hidden_size = 32, but the cold start left a policy with 64"):
        check(*base, start_from=tmp_path / "wide")


def left_by_a_cold_start(recipe: Recipe, folder: Path) -> Path:
    tokenizer = load_tokenizer(recipe.model)
    save_any(make_policy(recipe.model, tokenizer, seed=0, device=torch.device("cpu")), folder, tokenizer=tokenizer)
    return folder


YARN = (
    "--model.from_config.rope_scaling={type: yarn, factor: 4.0, original_max_position_embeddings: 64, "
    "mscale: 1.0, mscale_all_dim: 1.0}"
)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        DENSE,
        V2,
        [YARN],
        LLAMA,
    ],
    ids=["quickstart", "dense", "V2", "YaRN", "llama"],
)
def test_a_cold_start_fits_the_recipe_that_made_it_and_no_other(overrides: list[str], tmp_path: Path) -> None:
    folder = left_by_a_cold_start(load_recipe(RECIPE, overrides), tmp_path / "policy")
    check(*overrides, start_from=folder)
    with pytest.raises(ValueError) as caught:
        check(*overrides, "--model.from_config.num_hidden_layers=4", start_from=folder)
    assert "model: num_hidden_layers = 4, but the cold start left a policy with" in str(caught.value)
    assert str(folder) in str(caught.value) and "scripts/sft.py again" in str(caught.value)


def test_a_cold_start_of_a_checkpoint_is_compared_with_the_checkpoint(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    base = left_by_a_cold_start(recipe, tmp_path / "base")
    wider = left_by_a_cold_start(load_recipe(RECIPE, ["--model.from_config.hidden_size=64"]), tmp_path / "wider")
    words = [f"--model={{name_or_path: {base}, dtype: float32}}"]
    check(*words, start_from=base)
    with pytest.raises(ValueError, match="model: hidden_size = 128, but the cold start left a policy with 64"):
        check(*words, start_from=wider)
