"""The summary's numbers by hand, and a picture that is drawn from whatever a run measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from rl.config import load_recipe
from rl.train.record import JsonLines
from rl.train.report import closing_text, draw_curves, summarize_run, versions, write_run_report

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
FIRST = {
    "eval/accuracy": 0.25,
    "eval/sampled_accuracy": 0.5,
    "eval/sampled_mean_length": 24.0,
    "eval/greedy_mean_length": 9.0,
}
LAST = {
    "eval/accuracy": 1.0,
    "eval/sampled_accuracy": 0.97,
    "eval/sampled_mean_length": 49.0,
    "eval/accuracy_low": 0.95,
}


def grpo_rows() -> list[dict[str, Any]]:
    steps = [
        {
            "step": s,
            "stage": "grpo",
            "reward": s / 4,
            "entropy": 0.5 / s,
            "num_tokens": 100.0 * s,
            "time/rollout_s": 0.5,
        }
        for s in (1, 2, 3)
    ]
    return [{"step": 0, "stage": "grpo", **FIRST}, *steps, {"step": 3, "stage": "grpo", **LAST}]


def test_summary_by_hand() -> None:
    summary = summarize_run(grpo_rows(), seed=3, first=FIRST, last=LAST, grpo_seconds=40.0, cold_start_seconds=100.0)
    assert summary.pop("versions") == versions()
    assert summary == {
        "cold_start_accuracy": 0.5,
        "cold_start_accuracy_greedy": 0.25,
        "cold_start_mean_length": 24.0,
        "cold_start_truncated_frac": None,
        "final_accuracy": 0.97,
        "final_accuracy_greedy": 1.0,
        "final_mean_length": 49.0,
        "final_truncated_frac": None,
        "train_seconds": 140.0,
        "cold_start_seconds": 100.0,
        "grpo_seconds": 40.0,
        "tokens_per_s": 600 / 1.5,
        "grpo_steps": 3,
        "seed": 3,
    }


def test_summary_of_a_run_that_measured_nothing() -> None:
    summary = summarize_run([], seed=0, first=None, last=None, grpo_seconds=1.0)
    assert summary["cold_start_accuracy"] is None and summary["final_accuracy"] is None
    assert summary["tokens_per_s"] is None and summary["train_seconds"] == 1.0


def test_greedy_accuracy_stands_in_when_nothing_was_sampled() -> None:
    summary = summarize_run(
        [], seed=0, first=None, last={"eval/accuracy": 0.8, "eval/greedy_mean_length": 7.0}, grpo_seconds=1
    )
    assert summary["final_accuracy"] == 0.8 and summary["final_mean_length"] == 7.0


def test_report_is_written_from_the_run_folder(tmp_path: Path) -> None:
    for folder, rows in [
        (tmp_path, grpo_rows()),
        (
            tmp_path / "cold_start",
            [{"step": s, "stage": "sft", "entropy": 2.0 / s, "loss": 1.0 / s} for s in range(1, 30)],
        ),
    ]:
        record = JsonLines(folder / "metrics.jsonl")
        record.append(rows)
        record.close()
    (tmp_path / "cold_start" / "summary.json").write_text('{"train_seconds": 12.5, "overlong_sft_rows": 7}')
    recipe = load_recipe(QUICKSTART, [])
    dropped = {"overlong_train_prompts": 3}
    summary = write_run_report(tmp_path, recipe, first=FIRST, last=LAST, train_seconds=40.0, dropped=dropped)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["train_seconds"] == 52.5 and summary["name"] == "quickstart" and "torch" in summary["versions"]
    assert summary["overlong_train_prompts"] == 3 and summary["overlong_sft_rows"] == 7
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05


def test_the_closing_text_names_what_was_written(tmp_path: Path) -> None:
    summary = {"name": "x", **summarize_run([], seed=0, first=None, last=LAST, grpo_seconds=40.0)}
    (tmp_path / "curves.png").touch()
    assert closing_text(summary, tmp_path).splitlines()[1:] == [
        "Run x, seed 0: 40 s of training",
        "  held-out accuracy after GRPO    97.0% (100.0% greedy), 49.0 tokens a completion",
        f"  everything is in  {tmp_path}",
        f"  the curves        {tmp_path / 'curves.png'}",
    ]
    (tmp_path / "policy").mkdir()
    (tmp_path / "completions.jsonl").touch()
    assert closing_text(summary, tmp_path).splitlines()[-2:] == [
        f"  what it says      {tmp_path / 'completions.jsonl'}",
        f"  the policy        {tmp_path / 'policy'} (opens with transformers)",
    ]


def test_a_single_step_is_seen(tmp_path: Path) -> None:
    def blue(rows: list[dict[str, Any]], cold_start: list[dict[str, Any]]) -> int:
        draw_curves(rows, tmp_path / "curves.png", cold_start=cold_start)
        colors = imread(tmp_path / "curves.png")[..., :3] * 255
        return int((abs(colors - (31, 119, 180)).sum(-1) < 3).sum())  # matplotlib's tab:blue

    both = blue([{"step": 1, "reward": 1.0, "entropy": 0.5}], [{"step": 20, "entropy": 1.5}])
    assert both > blue([{"step": 1, "reward": 1.0, "entropy": 0.5}], []) > blue([{"step": 1, "entropy": 0.5}], []) > 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "eval/accuracy": 0.5}],
        [{"step": 1, "reward": "nan", "entropy": 0.3}],
        [{"step": s, "reward": 1.0} for s in range(1, 4)],
    ],
)
def test_the_picture_is_drawn_whatever_was_measured(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    draw_curves(rows, tmp_path / "curves.png", title="t")
    assert imread(tmp_path / "curves.png").std() > 0.01
    draw_curves(rows, tmp_path / "curves.png", cold_start=[{"step": 1, "loss": 1.0}])
