"""Real text through the whole path: two GRPO steps on GSM8K rows, with a user's own reward function beside the built-in
ones."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, command, environment

RECIPE = ROOT / "recipes" / "gsm8k" / "tiny_cpu.yaml"
pytestmark = [pytest.mark.xdist_group("one process"), pytest.mark.timeout(600)]

OWN_REWARD = '''
def letters(prompts, completions, completion_ids, answer, **columns):
    """Share of letters in the text; does not apply to every third row."""
    assert all(a.replace(",", "").lstrip("-").replace(".", "").isdigit() for a in answer)
    shares = [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]
    return [None if i % 3 == 2 else share for i, share in enumerate(shares)]
'''


def test_two_steps_on_real_rows(launch: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_REWARD)
    folder = tmp_path / "run"
    launch(
        "scripts/grpo.py",
        [
            "--config", str(RECIPE), "--output_dir", str(folder), "--logging.report_to=[wandb]",
            f"--rewards.reward_funcs=[format, accuracy, '{tmp_path}/own.py:letters']",
            "--rewards.reward_weights=[1.0, 1.0, 0.5]",
        ],
        config="cpu.yaml",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rewards/format/mean"] == 0.0 and row["rewards/accuracy/mean"] == 0.0
        assert row["rewards/letters/none_frac"] == pytest.approx(0.25, abs=0.07)
        assert 0 < row["reward"] < 0.5 and math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert row["num_tokens"] == row["completions/mean_length"] * 16
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 32 and "How" in completions[0]["prompt"]
    assert list((folder / "wandb").glob("offline-run-*")), "wandb without a key must work offline"


def test_another_architecture_trains_through_transformers(launch: Callable[..., str], tmp_path: Path) -> None:
    """A Llama-shaped policy: transformers' model behind the same learner, transformers' generate as the engine."""
    folder = tmp_path / "run"
    llama = (
        "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 2, max_position_embeddings: 1024, eos_token_id: 1, pad_token_id: 0}"
    )
    overlong = "{func: soft_overlong_punishment, params: {max_completion_len: 64, soft_punish_cache: 32}}"
    launch(
        "scripts/grpo.py",
        [
            "--config", str(RECIPE), "--output_dir", str(folder), "--rollout.engine=hf", f"--model.from_config={llama}",
            f"--rewards.reward_funcs=[{overlong}]",
            "--eval.num_problems=2",
        ],
        config="cpu.yaml",
    )  # fmt: skip
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if "reward" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["mismatch_kl"] < 1e-6 and math.isfinite(row["loss"])
        assert "routing/disagreement_frac" not in row


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--rollout.temprature=0.8", "temperature"),
        ("--rewards.reward_funcs=[acuracy]", "accuracy"),
        ("--data.train.source=nowhere.jsonl", "nowhere.jsonl"),
        ("--rollout.num_generations=1", "num_generations"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_trained(override: str, said: str, tmp_path: Path) -> None:
    words = command("scripts/grpo.py", ["--config", str(RECIPE), "--output_dir", str(tmp_path / "run"), override])
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
