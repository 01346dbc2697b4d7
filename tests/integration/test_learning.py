"""It learns: a shortened quickstart, from random weights through cold start and GRPO, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.policy.weights import load_policy
from rl.rollout.engine import Engine
from rl.types import Problem, RolloutRequest, SamplingParams

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
pytestmark = [pytest.mark.xdist_group("one process"), pytest.mark.timeout(900)]

SHORT = [
    "--data.eval.params={split: eval, size: 64}",
    "--sft.steps", "400",
    "--grpo.steps", "20",
    "--optimizer.learning_rate", "3e-4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning") / "run"
    arguments = ["--config", str(RECIPE), "--output_dir", str(folder), *SHORT]
    launch("scripts/sft.py", arguments, config="cpu.yaml")
    launch("scripts/grpo.py", arguments, config="cpu.yaml")
    return folder


def test_accuracy_and_length_rise(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["final_accuracy"] >= summary["cold_start_accuracy"] + 0.2, summary
    assert summary["final_mean_length"] > 1.2 * summary["cold_start_mean_length"], summary
    assert (run_folder / "curves.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 20
    assert all(row["mismatch_kl"] < 1e-6 for row in steps), "the engine and the trainer disagree"


def test_saved_policy_opens_in_transformers_and_says_the_same(run_folder: Path) -> None:
    folder = run_folder / "policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_policy(folder, dtype=torch.float32)
    prompts = ["a5b-2c*6=", "a1b+1c+1=", "a9b*9c-8="]
    requests = [
        RolloutRequest(Problem(str(i), p, tuple(tokenizer(p)["input_ids"])), (0,)) for i, p in enumerate(prompts)
    ]
    params = SamplingParams(32, stop_token_ids=(tokenizer.eos_token_id,), temperature=0.0)
    for prompt, group in zip(prompts, Engine(ours).generate(requests, params), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)
        assert tokenizer.decode(out[0][inputs["input_ids"].shape[1] :]) == tokenizer.decode(
            group.completions[0].token_ids
        )
