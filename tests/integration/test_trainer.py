"""The trainer in this process, on the tiny recipe: what a run writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl.config import load_recipe
from rl.train.record import read_rows
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
