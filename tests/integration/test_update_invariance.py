"""The update is the same on any number of ranks, at any ZeRO stage, with any micro-batches; and a saved state is the
state.

Each case runs workers/update_worker.py in processes of its own: for each loss (two of them, where others cover how the
ranks' tokens are counted) one GRPO step of 6 optimizer
steps (3 mini-batches x 2 iterations) with KL to a reference, clipping, masked rows and, for our own policy, replayed
routes and a moving router bias. It compares with one plain process that takes every mini-batch whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.policy.hf import init_any, save_any
from tests.integration.conftest import CONFIGS

WORKER = Path(__file__).parent / "workers" / "update_worker.py"
LOSSES = ("grpo", "bnpo", "dr_grpo", "gspo", "cispo", "dapo")
WHOLE, SPLIT, ROW_BY_ROW = 10_000, 60, 1

pytestmark = pytest.mark.timeout(900)
GROUP = pytest.mark.xdist_group("launch")  # two processes at a time keep two cores busy

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_theta": 100.0,
    "initializer_range": 0.06,
    "max_position_embeddings": 128,
}
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek": DEEPSEEK,
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False, **LLAMA_LIKE},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        **LLAMA_LIKE,
    },
    # GPT-2's dropout of 0.1, in embeddings, attention and residuals, would tell any two launches apart.
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


# An optimizer on the CPU whose step is torch's: DeepSpeed's own, which the launch files' offload keys ask for, takes
# minutes to compile.
OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": "auto"},
}
OFFLOAD_LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {path}
  deepspeed_multinode_launcher: standard
num_machines: 1
main_process_port: 0
"""


@dataclass(frozen=True)
class Launch:
    """config: a launch file of the recipes, None for plain Python; replaced: a text in it and what stands there
    instead. from_folder: the weights are read from a checkpoint instead of drawn."""

    config: str | None = None
    processes: int = 1
    replaced: tuple[str, str] = ("", "")
    model: str = "deepseek"
    losses: tuple[str, ...] = LOSSES
    tokens: int = SPLIT
    dtype: str = "float32"
    checkpointing: bool = False
    from_folder: bool = False

    def config_file(self, folder: Path) -> str | None:
        if self.config is None:
            return None
        path = folder / "launch.yaml"
        if self.config == "offload":
            (folder / "deepspeed.json").write_text(json.dumps(OFFLOAD), encoding="utf-8")
            text = OFFLOAD_LAUNCH.format(path=folder / "deepspeed.json")
        else:
            text = (CONFIGS / self.config).read_text(encoding="utf-8")
            assert self.replaced[0] in text
        path.write_text(text.replace(*self.replaced), encoding="utf-8")
        return str(path)

    def found(self, launch: Callable[..., str], folder: Path) -> dict[str, Any]:
        """What the worker found."""
        folder.mkdir()
        model = json.dumps(MODELS[self.model])
        if self.from_folder:
            model = str(folder / "model")
            save_any(init_any(MODELS[self.model], seed=0), model)
        arguments = [folder / "out.pt", folder / "scratch", "--model", model, "--losses", ",".join(self.losses)]
        arguments += ["--tokens", self.tokens, "--dtype", self.dtype, *["--checkpointing"] * self.checkpointing]
        launch(WORKER, arguments, config=self.config_file(folder), processes=self.processes)
        found: dict[str, Any] = torch.load(folder / "out.pt", map_location="cpu", weights_only=True)
        assert not found["unguarded"], "a flaw on one rank moved the weights, went unsaid, or spoilt the next step"
        return found

    def run(self, launch: Callable[..., str], folder: Path) -> dict[str, Any]:
        """What the worker found, where repeated steps have the same bits."""
        found = self.found(launch, folder)
        assert found["resumed_exactly"], "a step repeated after a return to the checkpoint differs from the first time"
        return found


ZERO_0 = ("zero_stage: 2", "zero_stage: 0")
SPLIT_WHILE_LOADING = ("zero3_init_flag: false", "zero3_init_flag: true")
FEW = ("grpo", "dapo")

CASES = {
    "one process": Launch(),
    "one process, row by row, checkpointing": Launch(tokens=ROW_BY_ROW, checkpointing=True),
    "two processes, DDP": Launch("ddp.yaml", 2),
    "two processes, DDP, checkpointing": Launch("ddp.yaml", 2, checkpointing=True, losses=FEW),
    "one process, ZeRO-0": Launch("zero2.yaml", 1, ZERO_0, losses=FEW),
    "two processes, ZeRO-0": Launch("zero2.yaml", 2, ZERO_0, losses=FEW),
    "one process, ZeRO-1, row by row": Launch("zero1.yaml", 1, tokens=ROW_BY_ROW, losses=FEW),
    "two processes, ZeRO-1": Launch("zero1.yaml", 2, losses=FEW),
    "one process, ZeRO-2": Launch("zero2.yaml", 1, losses=FEW),
    "two processes, ZeRO-2": Launch("zero2.yaml", 2),
    "two processes, ZeRO-2, whole, checkpointing": Launch(
        "zero2.yaml", 2, tokens=WHOLE, checkpointing=True, losses=FEW
    ),
    "two processes, ZeRO-2, optimizer on the CPU": Launch("offload", 2, losses=FEW),
    "one process, ZeRO-3": Launch("zero3.yaml", 1, losses=FEW),
    "two processes, ZeRO-3": Launch("zero3.yaml", 2),
    "two processes, ZeRO-3, checkpointing": Launch("zero3.yaml", 2, checkpointing=True, losses=FEW),
    "Qwen2, two processes, ZeRO-3": Launch("zero3.yaml", 2, model="qwen2", losses=FEW),
    "Qwen3-MoE, two processes, ZeRO-3": Launch("zero3.yaml", 2, model="qwen3_moe", losses=FEW),
    "Qwen3-MoE, two processes, ZeRO-3, split while loading": Launch(
        "zero3.yaml", 2, SPLIT_WHILE_LOADING, model="qwen3_moe", losses=FEW, from_folder=True
    ),
    "GPT-2, two processes, ZeRO-2": Launch("zero2.yaml", 2, model="gpt2", losses=FEW, checkpointing=True),
}


@pytest.fixture(scope="module")
def baselines() -> dict[tuple[str, ...], dict[str, Any]]:
    """What plain processes found, by dtype, model and losses."""
    return {}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=GROUP if how.processes > 1 else ()) for name, how in CASES.items()]
)
def test_same_step_everywhere(
    case: str, launch: Callable[..., str], baselines: dict[tuple[str, ...], dict[str, Any]], tmp_path: Path
) -> None:
    how = CASES[case]
    key = ("float32", how.model, *how.losses)
    if key not in baselines:
        plain = Launch(model=how.model, losses=how.losses, tokens=WHOLE)
        baselines[key] = plain.run(launch, tmp_path / "baseline")
    expected, found = baselines[key], how.run(launch, tmp_path / "case")
    for loss, left, right in zip(how.losses, found["metrics"], expected["metrics"], strict=True):
        for name, value in right.items():
            if name.endswith("_without_replay") or name.startswith("routing/"):
                continue  # the router's own choice, in which rounding may decide a tie
            assert left[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{loss}: {name}"
    # Weights are of size 0.1 to 1, move by 0.02 to 0.1, and differ by rounding: 3.6e-7 is the most that was seen.
    difference = largest_difference(found["weights"], expected["weights"])
    print(f"{case}: weights differ by at most {difference:.1e}")
    assert difference < 2e-6
    assert found["tokens"] == expected["tokens"]


@GROUP
@pytest.mark.parametrize("config", ["zero1.yaml", "zero3.yaml", "offload"])
def test_bfloat16_agrees_between_stages(
    config: str, launch: Callable[..., str], baselines: dict[tuple[str, ...], dict[str, Any]], tmp_path: Path
) -> None:
    """ZeRO-2 and the others keep the same fp32 master weights, so their bf16 weights agree to bf16 rounding.
    Micro-batches are whole: split ones round otherwise, and where that moves a token over the clip's edge runs part."""
    key = ("bfloat16", "deepseek", *FEW)
    if key not in baselines:
        plain = Launch("zero2.yaml", 2, losses=FEW, dtype="bfloat16", tokens=WHOLE)
        baselines[key] = plain.run(launch, tmp_path / "two")
    two = baselines[key]
    other = Launch(config, 2, losses=FEW, dtype="bfloat16", tokens=WHOLE).run(launch, tmp_path / "other")
    assert largest_difference(two["weights"], other["weights"]) < 1e-2
    for step in (0, 1):
        expected = pytest.approx(two["metrics"][step]["loss"], rel=0.05, abs=0.01)
        assert other["metrics"][step]["loss"] == expected


def test_bfloat16_sums_of_micro_batches_stay_in_float32(launch: Callable[..., str], tmp_path: Path) -> None:
    """On one process ZeRO-1 adds up the rows of a mini-batch as ZeRO-2 does. DeepSpeed would round ZeRO-1's sums to
    bfloat16 for its all-reduce, and the loss behind the first step was 5e-4 off. (Later steps tell nothing: where the
    last bit of a sum moves a weight to the next bfloat16, runs part.)"""
    one, two = (
        Launch(config, 1, losses=("grpo",), dtype="bfloat16", tokens=ROW_BY_ROW).run(launch, tmp_path / config)
        for config in ("zero1.yaml", "zero2.yaml")
    )
    for name in ("loss/0", "loss/1"):
        assert one["metrics"][0][name] == pytest.approx(two["metrics"][0][name], abs=5e-5)
