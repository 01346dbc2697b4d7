"""Other causal language models (Qwen, Llama, ...) behind the policy's packed call, through transformers.

In: packed tokens, as `rl.policy.model.Policy` takes them. Out: final hidden states, packed; logits by `lm_head`.
Inside the sequences are padded on the right, which under causal attention needs no mask. There are no routes and no
latents here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from rl.policy.attention import PackedLayout
from rl.policy.config import PolicyConfig, refuse_unknown
from rl.policy.model import Policy, PolicyOutput, init_policy
from rl.policy.weights import load_policy, save_policy

OWN_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# Keys of transformers' configurations that change logits outside the output head; lm_head alone would be wrong.
_LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
# Keys that every configuration of transformers understands, beside its own fields.
_ANY_HF_TYPE = {"model_type", "attn_implementation", "head_dim", "rope_scaling", "rope_theta", "torch_dtype"}


class HFPolicy(nn.Module):
    """A transformers causal LM with the policy's call. `inner` is the model itself, `config` its configuration.

    Dropout and its like are off for good, also in training and in what is saved: the sampler draws without them, so
    with them the ratio of new to old probabilities would be noise, and a resumed run another run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.config: PretrainedConfig = inner.config
        _check_supported(self.config)
        _switch_noise_off(inner)
        self.inner = inner
        self._checkpointing = False

    @property
    def lm_head(self) -> nn.Module:
        return self.inner.get_output_embeddings()  # type: ignore[operator]

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        elif self._checkpointing:
            self.inner.gradient_checkpointing_disable()  # type: ignore[operator]
        self._checkpointing = on

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        *,
        routes: torch.Tensor | None = None,
        latents: list[torch.Tensor] | None = None,
    ) -> PolicyOutput:
        """tokens: (T,), cu_seqlens: (S + 1,) int32 -> hidden (T, D), routes None."""
        if routes is not None or latents is not None:
            raise ValueError(f"a {self.config.model_type} policy neither replays routes nor gives latents")
        layout = PackedLayout.of(cu_seqlens, num_tokens=tokens.shape[0], max_seqlen=max_seqlen)
        shape = (layout.num_sequences, max_seqlen)
        grid = tokens
        if layout.padded_rows is not None:
            grid = tokens.new_zeros(shape[0] * max_seqlen).index_copy_(0, layout.padded_rows, tokens)
        positions = torch.arange(max_seqlen, device=tokens.device).expand(shape)
        body = self.inner.base_model
        out = body(input_ids=grid.view(shape), position_ids=positions, use_cache=False)  # type: ignore[operator]
        hidden = out.last_hidden_state.flatten(0, 1)
        return PolicyOutput(hidden if layout.padded_rows is None else hidden.index_select(0, layout.padded_rows), None)


def read_model_config(name: str) -> dict[str, Any]:
    """config.json of a checkpoint folder or hub id. ValueError: there is none, or it names no model_type."""
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"{name!r}: no config.json, neither in a folder here nor on the hub: {error}") from error
    if "model_type" not in values:
        raise ValueError(f"{name!r}: no config.json that names a model_type")
    return dict(values)


def checkpoint_end_tokens(name: str) -> tuple[int, ...]:
    """Tokens that end a text or a turn by a checkpoint's generation_config.json (that of a chat model often names more
    than its tokenizer's end token), or by its config.json."""
    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ends = None
    if ends is None:
        ends = read_model_config(name).get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def load_any(
    folder_or_hub_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Policy | HFPolicy:
    """Our own policy for DeepSeek-V2/V3 checkpoints, transformers' model for every other causal LM. No code of the
    checkpoint is run. ValueError: weights that the files lack (transformers would draw them at random)."""
    name = os.fspath(folder_or_hub_id)
    values = read_model_config(name)
    if values["model_type"] in OWN_TYPES:
        return load_policy(folder_or_hub_id, dtype=dtype, device=device)
    _check_supported(AutoConfig.from_pretrained(name))
    inner, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name!r}: not the files of a causal language model: {', '.join(missing[:8])} missing")
    return HFPolicy(inner.to(device))


def init_any(
    values: Mapping[str, Any],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Policy | HFPolicy:
    """Random weights from a `config.json`-like mapping; `model_type` decides (default deepseek_v3)."""
    model_type = values.get("model_type", "deepseek_v3")
    if model_type in OWN_TYPES:
        return init_policy(PolicyConfig.from_dict(values), seed=seed, dtype=dtype, device=device)
    config = hf_config(values)
    _check_supported(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return HFPolicy(inner.to(device))


def hf_config(values: Mapping[str, Any], *, by_hand: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """transformers' configuration of a `config.json`-like mapping. by_hand: those of its keys that a recipe spells out,
    of which transformers must know each (files carry keys of other programs). ValueError names the key or the
    model_type."""
    model_type = values["model_type"]
    others = {key: value for key, value in values.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(model_type, **others)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"model config: model_type = {model_type!r}: {error}") from error
    fields = {field.name for field in dataclasses.fields(type(config))}
    refuse_unknown(by_hand or {}, fields | set(config.attribute_map) | _ANY_HF_TYPE)
    return config


def save_any(
    policy: Policy | HFPolicy,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The hub layout of either kind. state_dict: as in `save_policy` (for HFPolicy with the `inner.` prefix)."""
    if isinstance(policy, Policy):
        save_policy(policy, folder, tokenizer=tokenizer, state_dict=state_dict)
        return
    state = None
    if state_dict is not None:
        state = {name.removeprefix("inner."): tensor for name, tensor in state_dict.items()}
    cast(Any, policy.inner).save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _switch_noise_off(model: nn.Module) -> None:
    """Set every probability of dropout (of units, layers, paths) and every router jitter to 0.

    Evaluation mode would do the same but switches gradient checkpointing off as well. Architectures keep the numbers
    in dropout modules, in attributes of their own modules, and in the configuration, which some read at every call."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    for holder in (*modules, *(module.config for module in modules if hasattr(module, "config"))):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def _check_supported(config: PretrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type = {config.model_type!r} is an encoder-decoder; allowed: causal language models")
    for key, neutral in _LOGIT_CHANGES.items():
        value = getattr(config.get_text_config(), key, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"model_type = {config.model_type!r} has {key} = {value!r}, which changes logits outside lm_head; "
                f"allowed: {neutral!r} or absent"
            )
