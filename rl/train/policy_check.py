"""Does the recipe ask of the policy what it can do? Told from its configuration, before any weight is read or made.

In: the recipe, its tokenizer, and where a cold start left its policy. Out: nothing, or one ValueError with every key
that does not fit, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from rl.config import ModelSection, Recipe
from rl.policy.config import PolicyConfig
from rl.policy.hf import OWN_TYPES, hf_config, read_model_config
from rl.train.checkpoint import load_json

AnyConfig: TypeAlias = PolicyConfig | PretrainedConfig
# What makes two configurations of a transformers model the same policy, beside details that it adds when it saves.
_HF_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# Keys of a config.json that nothing here acts on: usual in a file, a mistake where a recipe spells them out.
_WITHOUT_EFFECT = {
    "dtype": "model.dtype decides",
    "torch_dtype": "model.dtype decides",
    "quantization_config": "random weights are not quantised",
    "aux_loss_alpha": "there is no auxiliary loss; model.router_bias_update_rate balances experts",
    "num_nextn_predict_layers": "there are no multi-token prediction layers",
}


def check_policy(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, start_from: Path | None = None) -> None:
    """start_from: the folder of a cold start's policy, which must be of the shape that `model` describes."""
    config = policy_config(recipe.model, tokenizer)
    wrong = [*_ignored(recipe.model), *_does_not_fit(recipe, config), *_too_short(recipe, config)]
    vocab_size = _text(config).vocab_size
    if len(tokenizer) > vocab_size:
        wrong.append(f"model: the tokenizer has {len(tokenizer)} tokens, the policy's vocab_size is {vocab_size}")
    if start_from is not None:
        wrong += _other_shape(config, _read_config(str(start_from)), start_from)
    if wrong:
        raise ValueError("the recipe does not fit the policy:\n" + "\n".join(f"  {text}" for text in wrong))


def policy_config(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> AnyConfig:
    """The configuration of the policy that `model` describes. ValueError for keys that it does not have."""
    if model.name_or_path is not None:
        try:
            return _read_config(model.name_or_path)
        except ValueError as error:
            raise ValueError(f"model.name_or_path: {error}") from error
    values = config_values(model, tokenizer)
    model_type = values.get("model_type", "deepseek_v3")
    try:
        if model_type in OWN_TYPES:
            return PolicyConfig.from_dict(values)
        return hf_config(values, by_hand=model.from_config if isinstance(model.from_config, dict) else None)
    except ValueError as error:
        raise ValueError(f"model.from_config: {error}") from error


def config_values(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The keys of `model.from_config`, or of the file that it names, with what the tokenizer adds to them."""
    given = model.from_config
    assert given is not None
    if isinstance(given, str):
        path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise ValueError(f"model.from_config = {given!r}: there is no file {path} (from {Path.cwd()})")
        given = load_json(path)
        if not isinstance(given, dict):
            raise ValueError(f"{path}: holds a {type(given).__name__}; a config.json is an object ({{...}})")
    values = dict(given)
    values.setdefault("vocab_size", len(tokenizer))
    values.setdefault("eos_token_id", tokenizer.eos_token_id)
    values.setdefault("pad_token_id", tokenizer.pad_token_id)
    return values


def _read_config(name: str) -> AnyConfig:
    """The configuration of a checkpoint, a folder or a hub id."""
    values = read_model_config(name)
    if values["model_type"] not in OWN_TYPES:
        return AutoConfig.from_pretrained(name)
    try:
        return PolicyConfig.from_dict(values, strict=False)
    except ValueError as error:
        raise ValueError(f"{name!r}: config.json: {error}") from error


def _text(config: AnyConfig) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config() if isinstance(config, PretrainedConfig) else config


def _ignored(model: ModelSection) -> Iterator[str]:
    """Keys that a recipe spells out in vain."""
    given = model.from_config if isinstance(model.from_config, dict) else {}
    for key, reason in _WITHOUT_EFFECT.items():
        if given.get(key):
            yield f"model.from_config.{key} = {given[key]!r}: has no effect ({reason}); allowed: leave it out"


def _does_not_fit(recipe: Recipe, config: AnyConfig) -> Iterator[str]:
    """Options that this kind of policy cannot follow."""
    own = isinstance(config, PolicyConfig)
    experts = isinstance(config, PolicyConfig) and bool(config.moe_layers)
    biased = isinstance(config, PolicyConfig) and experts and config.topk_method == "noaux_tc"
    kind = f"this policy is a {config.model_type}"
    engine, rate = recipe.rollout.engine, recipe.model.router_bias_update_rate
    if engine == "in_process" and not own:
        yield f"rollout.engine = {engine!r}: samples {', '.join(OWN_TYPES)} policies; {kind}; allowed: hf"
    if engine == "hf" and own:
        yield f"rollout.engine = {engine!r}: samples models of transformers; {kind}; allowed: in_process"
    if recipe.grpo.routing_replay is True and not experts:
        yield f"grpo.routing_replay = true: {kind} without experts to record; allowed: auto, false"
    if rate and not biased:
        yield (
            f"model.router_bias_update_rate = {rate:g}: {kind} whose routers have no selection bias (those of a "
            "deepseek_v3 with experts have); allowed: 0"
        )


def _too_short(recipe: Recipe, config: AnyConfig) -> Iterator[str]:
    """Rows with more tokens than the policy has positions."""
    positions = getattr(_text(config), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    prompt = recipe.data.max_prompt_length
    lengths = {"data.max_prompt_length + rollout.max_completion_length": prompt + recipe.rollout.max_completion_length}
    if recipe.eval.max_completion_length is not None:
        length = prompt + recipe.eval.max_completion_length
        lengths["data.max_prompt_length + eval.max_completion_length"] = length
    if recipe.sft is not None:
        lengths["sft.max_length"] = recipe.sft.max_length
    for keys, length in lengths.items():
        if length > positions:
            yield f"{keys} = {length}: the policy has max_position_embeddings = {positions}; allowed: at most that"


def _other_shape(wanted: AnyConfig, found: AnyConfig, folder: Path) -> Iterator[str]:
    """How the policy in `folder` differs from the one that the recipe describes."""
    names: tuple[str, ...] = _HF_SHAPE
    if isinstance(wanted, PolicyConfig) and isinstance(found, PolicyConfig):
        names = tuple(field.name for field in dataclasses.fields(PolicyConfig))
    for name in names:
        here, there = getattr(_text(wanted), name, None), getattr(_text(found), name, None)
        if here != there:
            yield (
                f"model: {name} = {here!r}, but the cold start left a policy with {there!r} in {folder}; give the cold "
                "start's value, or run scripts/sft.py again under another name or output_dir"
            )
