"""The trainer in this process, on the tiny recipe: what a run writes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl.config import load_recipe
from rl.train.record import read_rows
from rl.train.sft import ColdStart
from rl.train.trainer import GRPOTrainer

TINY = Path(__file__).parent / "tiny.yaml"
SHORT = [
    "--grpo.mini_batches=1",
    "--grpo.beta=0",
    "--optimizer.warmup_steps=0",
    "--checkpoint.save_steps=0",
    "--eval.num_samples=0",
]


def trainer(folder: Path, *overrides: str, steps: int = 4) -> GRPOTrainer:
    return GRPOTrainer(load_recipe(TINY, [f"--output_dir={folder}", f"--grpo.steps={steps}", *SHORT, *overrides]))


def steps_in(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "reward" in row]


def test_every_step_is_recorded_whatever_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, "--logging.logging_steps=3").train()
    rows = steps_in(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all("skipped_updates" in row for row in rows)
    shown = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("grpo step")]
    assert shown == ["3", "4"]
    assert {row["step"] for row in read_rows(tmp_path / "completions.jsonl")} == {3, 4}


def test_the_step_takes_the_time_on_the_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 gathering the weights takes its time, before sampling starts."""
    made = trainer(tmp_path)
    gathered = made.learner.gathered

    @contextmanager
    def slow() -> Iterator[Any]:
        time.sleep(0.3)
        with gathered() as policy:
            yield policy

    monkeypatch.setattr(made.learner, "gathered", slow)
    began = time.monotonic()
    metrics, _ = made.step(0)
    assert metrics["time/rest_s"] >= 0.3
    stages = sum(metrics[f"time/{stage}_s"] for stage in ("rollout", "reward", "update", "rest"))
    assert stages == pytest.approx(metrics["time/step_s"]) and stages < time.monotonic() - began
    assert metrics["train/tokens_per_s"] == pytest.approx(metrics["num_tokens"] / metrics["time/step_s"])


def test_accuracy_is_that_of_the_function_that_the_recipe_names(tmp_path: Path) -> None:
    """Training and held-out problems alike; without one that says right or wrong there is none."""
    trainer(tmp_path / "named", "--eval.metric=tag_count", steps=1).train()
    rows = read_rows(tmp_path / "named" / "metrics.jsonl")
    assert [name for row in rows for name in ("accuracy", "eval/accuracy") if name in row] == [
        "accuracy",
        "eval/accuracy",
    ]
    trainer(tmp_path / "none", "--rewards.reward_funcs=[tag_count, format]", steps=1).train()
    rows = read_rows(tmp_path / "none" / "metrics.jsonl")
    assert len(rows) == 2 and not any("accuracy" in name for row in rows for name in row)


def test_reward_functions_are_told_how_far_the_training_is(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def done(prompts, trainer_state): return [trainer_state.global_step] * len(prompts)"
    )
    wanted = f"--rewards.reward_funcs=[format, '{tmp_path}/own.py:done']"
    trainer(tmp_path / "run", wanted, "--eval.eval_steps=2", "--eval.eval_on_start=true", steps=3).train()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["rewards/done/mean"] for row in rows if "reward" in row] == [0.0, 1.0, 2.0]
    answers = read_rows(tmp_path / "run" / "evaluations.jsonl")
    assert {(row["step"], row["scores"]["done"]) for row in answers} == {(0, 0.0), (2, 2.0), (3, 3.0)}


def test_prompts_that_were_dropped_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("a1b+0=", "a0b+1=", "a1b+0c+0=", "a2b-1=", "a1b*1=")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "a3b-2=", "answer": "1"}) + "\n")
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps({**row, "completion": "11"}) + "\n" for row in rows))
    recipe = yaml.safe_load(TINY.read_text())
    recipe["data"] |= {
        "train": {"source": str(tmp_path / "train.jsonl")},
        "eval": {"source": str(tmp_path / "eval.jsonl")},
        "max_prompt_length": 6,
    }
    recipe["sft"] = {
        "data": {"source": str(tmp_path / "traces.jsonl")},
        "steps": 3, "batch_size": 2, "max_length": 9, "logging_steps": 2,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "recipe.yaml", [f"--output_dir={tmp_path / 'run'}", "--grpo.steps=2", *SHORT])
    ColdStart(loaded).train()
    GRPOTrainer(loaded).train()
    counts = {"overlong_train_prompts": 1, "overlong_eval_prompts": 0, "overlong_sft_rows": 1}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: summary.get(name) for name in counts} == counts
    first, second = steps_in(tmp_path / "run")
    assert first["data/overlong_train_prompts"] == 1.0 and first["data/overlong_eval_prompts"] == 0.0
    assert "data/overlong_train_prompts" not in second
    cold = read_rows(tmp_path / "run" / "cold_start" / "metrics.jsonl")
    assert [row.get("data/overlong_sft_rows") for row in cold] == [1.0, None]
