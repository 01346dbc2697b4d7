"""The rollout benchmark on tiny shapes: that it measures the same work twice, and refuses what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.policy.config import PolicyConfig
from rl.policy.model import init_policy

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_rollout.py"
SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 48, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}  # fmt: skip


def load() -> Any:
    spec = importlib.util.spec_from_file_location("bench_rollout_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    bench = load()
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)  # else half a gigabyte
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *words])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_engine_and_transformers_agree(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(PolicyConfig.from_dict(SHAPE | {"model_type": model_type}).to_dict()))
    sizes = ["--batch", "4", "--group", "2", "--prompt", "5", "--new", "6", "--repeats", "1"]
    run(monkeypatch, "--shape", str(shape), *sizes, "--peer", "hf", "--check")
    check, ours, theirs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert check["tokens"] == check["equal_to_its_argmax"] == 12 and check["worst_logprob_difference"] < 1e-5
    assert ours["steps"] == 5 and ours["cache_bytes_per_token"] == 2 * (8 + 4) * 4
    assert theirs["engine"] == "transformers" and theirs["tokens_per_s"] > 0


def bytes_read(lengths: list[int], *, steps: int, **changes: object) -> tuple[int, int]:
    config = PolicyConfig.from_dict(SHAPE | changes)
    policy = init_policy(config, seed=0)
    return load().bytes_per_step(config, policy, lengths, group=2, prompt=5, steps=steps)


def test_a_tied_output_matrix_is_read_like_any_other() -> None:
    assert bytes_read([6] * 4, steps=5) == bytes_read([6] * 4, steps=5, tie_word_embeddings=True)


def test_rows_that_have_ended_read_nothing() -> None:
    token = 2 * (8 + 4) * 4  # layers, cache width, bytes of a number
    weights, cache = bytes_read([6] * 4, steps=5)
    assert cache == (4 * (1 + 2 + 3 + 4 + 5) / 5 + 2 * 5) * token
    # In two steps the first row reads one and two tokens, the third and fourth one; the second never takes a step.
    skewed, cache = bytes_read([3, 1, 2, 2], steps=2)
    assert cache == (1 + 2 + 1 + 1 + 5 * (2 + 1)) / 2 * token
    experts = 4 * 3 * 32 * 16 * 4
    assert weights - skewed == pytest.approx(((1 - 0.5**4) - (1 - 0.5**2)) * experts, abs=1)  # 2 of 4 rows a step


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "nosuch"], "--shape nosuch: neither one of quickstart, "),
        (["--new", "0"], "--new 0: must be at least 1"),
        (["--batch", "6", "--group", "4"], "--batch 6 is not a multiple of --group 4"),
        (["--check"], "--check compares with --peer hf"),
        (["--peer-only"], "--peer-only goes with --peer vllm"),
    ],
)
def test_what_it_cannot_do_is_said(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert said in capsys.readouterr().err
