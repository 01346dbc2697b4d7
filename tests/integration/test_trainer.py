"""The trainer in this process, on the tiny recipe: what a run writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rl.config import load_recipe
from rl.policy.moe import Router
from rl.train.metrics import RUN_ID_FILE
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
    given = {text.split("=")[0] for text in overrides}
    short = [text for text in SHORT if text.split("=")[0] not in given]
    return GRPOTrainer(load_recipe(TINY, [f"--output_dir={folder}", f"--grpo.steps={steps}", *short, *overrides]))


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


@pytest.mark.parametrize("replay", ["auto", "false"])
def test_routing_is_compared_whether_it_is_replayed_or_not(
    replay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that changes between sampling and update chooses other experts; replay keeps the logprobs all the
    same."""
    made = trainer(tmp_path, f"--grpo.routing_replay={replay}")
    run = made.update.run

    def with_another_router(*arguments: Any, **options: Any) -> Any:
        for router in (module for module in made.learner.policy.modules() if isinstance(module, Router)):
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.copy_(torch.linspace(-1, 1, router.num_experts))
        return run(*arguments, **options)

    monkeypatch.setattr(made.update, "run", with_another_router)
    metrics, _ = made.step(0)
    assert metrics["routing/disagreement_frac"] > 0.1 and metrics["mismatch_kl_without_replay"] > 1e-4
    assert (metrics["mismatch_kl"] > 1e-4) == (replay == "false")


def test_each_step_samples_anew_and_a_step_made_again_samples_the_same(tmp_path: Path) -> None:
    """Four problems are all there are, and the weights hardly move."""
    made = trainer(tmp_path, "--data.train.params.size=4", "--data.shuffle=false", "--optimizer.learning_rate=1e-12")
    texts = [[record.text for record in made.step(step)[1].records] for step in (0, 1, 0)]
    assert texts[0] == texts[2] and not set(texts[0]) & set(texts[1]) and len(set(texts[0])) > 12


def test_the_schedule_is_laid_over_all_optimizer_steps(tmp_path: Path) -> None:
    made = trainer(tmp_path, "--grpo.mini_batches=2", "--grpo.num_iterations=2", steps=2)
    rates = [made.step(step)[0]["learning_rate"] for step in range(2)]
    assert rates == pytest.approx([1e-3 * (1 - 3 / 8), 1e-3 * (1 - 7 / 8)])  # of the last of four optimizer steps


def test_a_counter_that_is_no_number_costs_no_checkpoint(tmp_path: Path) -> None:
    """What a user's function counts in an evaluation is kept with the checkpoint."""
    (tmp_path / "own.py").write_text(
        "def mean(completions, counters, **columns):\n"
        "    counters.add(cost=float('nan'))\n"
        "    return [1.0] * len(completions)\n"
    )
    run = f"--rewards.reward_funcs=['{tmp_path}/own.py:mean']"
    trainer(tmp_path, run, "--eval.eval_steps=1", "--checkpoint.save_steps=1", steps=2).train()
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_resumed_run_goes_on_with_the_tracker_run_of_its_checkpoint(tmp_path: Path) -> None:
    keeper = trainer(tmp_path).keeper
    (tmp_path / RUN_ID_FILE).write_text("0a1b2c3d\n")
    keeper.save(1, elapsed_s=0.0)
    (tmp_path / RUN_ID_FILE).write_text("")  # killed while it was written
    assert keeper.restore(keeper.store.latest_valid()) == 1
    assert (tmp_path / RUN_ID_FILE).read_text() == "0a1b2c3d\n"


def test_as_many_checkpoints_stay_as_the_recipe_says(tmp_path: Path) -> None:
    trainer(tmp_path, "--checkpoint.save_steps=1", "--checkpoint.save_total_limit=3").train()
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "4"]


def test_the_update_scores_the_distribution_that_was_sampled(tmp_path: Path) -> None:
    metrics, _ = trainer(tmp_path, "--rollout.temperature=0.6").step(0)
    assert metrics["mismatch_kl"] < 1e-9 and metrics["importance/mean"] == pytest.approx(1.0, abs=1e-5)


def test_the_reference_is_refreshed_when_the_recipe_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, "--grpo.beta=0.1", "--grpo.ref_update_steps=2")
    kl = [made.step(step)[0]["kl"] for step in range(4)]
    assert kl[0] < 1e-9 < kl[1] and kl[2] < 1e-9 < kl[3]


def test_a_step_in_which_everything_is_masked_moves_nothing_and_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def none(completions, **columns):\n    return [None] * len(completions)\n")
    made = trainer(tmp_path, f"--rewards.reward_funcs=['{tmp_path}/own.py:none']")
    before = [parameter.detach().clone() for parameter in made.learner.policy.parameters()]
    metrics, _ = made.step(0)
    assert metrics["rewards/masked_frac"] == 1.0
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0.0
    for name in ("reward", "entropy", "mismatch_kl", "ratio/mean", "importance/mean", "clip_ratio/region_mean"):
        assert math.isnan(metrics[name]), name
    assert all(map(torch.equal, made.learner.policy.parameters(), before))


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
