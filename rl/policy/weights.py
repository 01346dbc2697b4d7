"""Weights to and from the hub layout: `config.json`, `generation_config.json`, safetensors, tokenizer.

In the files every expert has its own keys (`mlp.experts.3.up_proj.weight`), in the module experts are fused; files
written with fused keys are read too. Loading is strict: a missing or unexpected key is an error that names it.
Skipped knowingly: the multi-token prediction layers of V3 (reported in the log). FP8 checkpoints (DeepSeek-V3's block
scales) are dequantised.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, empty_policy

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_SCALE = ".weight_scale_inv"
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Where a part of a fused parameter sits in the hub's keys: (key, expert, rows) of `..mlp.experts.gate_up_proj`.
_Part = tuple[str, int, slice]


def load_policy(
    folder_or_hub_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Policy:
    """A policy from a folder, or from the hub (downloaded). dtype None keeps that of the files' `config.json` (fp32
    if it names none). The selection bias stays fp32. Errors: ValueError with the folder and the keys at fault."""
    folder = checkpoint_folder(folder_or_hub_id)
    hub_config = read_config(folder)
    try:
        config = PolicyConfig.from_dict(hub_config, strict=False)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    policy = empty_policy(config, dtype=dtype or _config_dtype(hub_config), device=device)
    files = CheckpointFiles(folder, fp8_block=_fp8_block(hub_config))
    load_into(policy, files)
    if (folder / _GENERATION).exists():
        policy.generation_config = json.loads((folder / _GENERATION).read_text())
    return policy


def load_into(policy: Policy, files: CheckpointFiles) -> None:
    """Copy every tensor of `files` into the policy, checking that both have the same keys."""
    names = files.keys()
    targets = _targets(policy, fused=any(name.endswith(".experts.gate_up_proj") for name in names))
    _check_keys(files, set(targets), num_layers=policy.config.num_hidden_layers)
    with torch.no_grad():
        for file, keys in files.by_file():
            for key, tensor in files.read(file, [key for key in keys if key in targets]):
                target = targets[key]
                if tensor.shape != target.shape:
                    raise ValueError(
                        f"{file}: {key} has shape {tuple(tensor.shape)}; config.json implies {tuple(target.shape)}"
                    )
                target.copy_(tensor)


class CheckpointFiles:
    """The safetensors files of a folder, sharded or not, read tensor by tensor."""

    def __init__(self, folder: Path, *, fp8_block: tuple[int, int] = (128, 128)) -> None:
        self.folder, self.fp8_block = folder, fp8_block
        index, single = folder / _INDEX, folder / _SINGLE
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            with safe_open(single, framework="pt") as opened:
                self._file_of = dict.fromkeys(opened.keys(), _SINGLE)
        else:
            raise ValueError(f"{folder}: neither {_INDEX} nor {_SINGLE}; only safetensors checkpoints are read")
        for name in sorted(set(self._file_of.values())):
            if not (folder / name).exists():
                raise ValueError(f"{folder}: the index names {name}, which is not there")

    def keys(self) -> list[str]:
        """Keys of the weights; the scales of FP8 weights are not listed."""
        return [key for key in self._file_of if not key.endswith(_SCALE)]

    def by_file(self) -> Iterator[tuple[Path, list[str]]]:
        for name in sorted(set(self._file_of.values())):
            yield self.folder / name, [key for key in self.keys() if self._file_of[key] == name]

    def read(self, file: Path, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, CPU tensor) one after the other, dequantised where the checkpoint is FP8."""
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                tensor = opened.get_tensor(key)
                scale = key.removesuffix(".weight") + _SCALE
                if scale in self._file_of:
                    tensor = dequantise_fp8(tensor, self._tensor(scale), block=self.fp8_block)
                elif tensor.dtype == torch.float8_e4m3fn:
                    raise ValueError(f"{file}: {key} is FP8 and has no {scale}")
                yield key, tensor

    def _tensor(self, key: str) -> torch.Tensor:
        with safe_open(self.folder / self._file_of[key], framework="pt") as opened:
            return opened.get_tensor(key)


def dequantise_fp8(weight: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """weight: (N, M) float8, scale: (ceil(N / b0), ceil(M / b1)) float32, one factor per block -> (N, M) float32
    (arXiv:2412.19437, section 3.3)."""
    rows, columns = weight.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * factors


def save_policy(
    policy: Policy,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the hub layout into `folder`. tokenizer: anything with `save_pretrained`. state_dict: the full weights by
    the names of `policy.state_dict()`, for a policy whose own parameters are partitioned (ZeRO-3)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = policy.state_dict() if state_dict is None else state_dict
    expected = set(policy.state_dict())
    if missing := sorted(expected - set(state)):
        raise ValueError(f"cannot save to {folder}: the state dict lacks {_some(missing)}")
    tensors = dict(hub_tensors(state, policy.config))
    _write_shards(tensors, folder, max_shard_bytes)
    config = policy.config.to_dict()
    dtype = state["model.embed_tokens.weight"].dtype
    config["dtype"] = config["torch_dtype"] = _DTYPE_NAMES[dtype]
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    _write_json(folder / _GENERATION, policy.generation_config or {"_from_model_config": True, **ids})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def hub_tensors(state: Mapping[str, torch.Tensor], config: PolicyConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(hub key, tensor) of a full state dict: fused experts become one matrix per expert and projection (views)."""
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            yield name, tensor
            continue
        for key, expert, rows in _expert_parts(name, tensor.shape):
            yield key, tensor[expert, rows]


def checkpoint_folder(folder_or_hub_id: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a name that is no folder is downloaded from the hub."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = os.fspath(folder_or_hub_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{name!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name!r} is no folder here, and the hub did not give it: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary of `config.json`."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no config.json")
    return json.loads(path.read_text())


def _config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    by_name = {value: key for key, value in _DTYPE_NAMES.items()}
    if name not in by_name:
        raise ValueError(f"config.json: dtype = {name!r}; allowed: {sorted(by_name)}")
    return by_name[name]


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return 128, 128
    method = quantisation.get("quant_method")
    if method != "fp8":
        raise ValueError(f"config.json: quantization_config.quant_method = {method!r}; allowed: 'fp8' or none")
    block = quantisation.get("weight_block_size", (128, 128))
    if not isinstance(block, (list, tuple)) or len(block) != 2:  # null: one scale for a whole matrix
        raise ValueError(f"config.json: quantization_config.weight_block_size = {block!r}; allowed: [rows, columns]")
    return block[0], block[1]


def _expert_parts(name: str, shape: torch.Size) -> Iterator[_Part]:
    """The hub's keys of one fused parameter, each with the expert and the rows that it is."""
    prefix, projection = name.rsplit(".", 1)
    for expert in range(shape[0]):
        if projection == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", expert, slice(None)
            continue
        inner = shape[1] // 2
        yield f"{prefix}.{expert}.gate_proj.weight", expert, slice(0, inner)
        yield f"{prefix}.{expert}.up_proj.weight", expert, slice(inner, None)


def _targets(policy: Policy, *, fused: bool) -> dict[str, torch.Tensor]:
    """Hub key -> the piece of the policy's memory that it fills."""
    state = policy.state_dict()
    return dict(state.items() if fused else hub_tensors(state, policy.config))


def _check_keys(files: CheckpointFiles, expected: set[str], *, num_layers: int) -> None:
    found = set(files.keys())
    layer_of = {key: int(m[1]) for key in found if (m := re.match(r"model\.layers\.(\d+)\.", key))}
    # A multi-token prediction layer joins the hidden state with the next embedding; without that it is a lost layer.
    joining = {layer for key, layer in layer_of.items() if layer >= num_layers and key.endswith(".eh_proj.weight")}
    prediction = {key for key, layer in layer_of.items() if layer in joining}
    if prediction:
        logger.info("%s: skipped %d tensors of multi-token prediction layers", files.folder, len(prediction))
    inverse_frequencies = {key for key in found if key.endswith(".rotary_emb.inv_freq")}  # derived, in some old files
    tied_copy = {"lm_head.weight"} - expected
    unexpected = sorted(found - expected - prediction - inverse_frequencies - tied_copy)
    missing = sorted(expected - found)
    problems = [f"{what}: {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if problems:
        raise ValueError(f"{files.folder}: the weights do not fit config.json; {'; '.join(problems)}")


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path, max_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += size
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / _INDEX, folder / _SINGLE):
        old.unlink(missing_ok=True)  # an earlier save with another number of shards
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [_SINGLE]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        # clone: safetensors wants tensors that own their memory, and views of fused experts do not
        save_file({k: t.detach().cpu().clone() for k, t in shard.items()}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
