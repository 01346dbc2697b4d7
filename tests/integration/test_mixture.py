"""Two tasks in one recipe, each scored by its own function, through whole GRPO steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl.data.chain_arithmetic import problems

TINY = Path(__file__).parent / "tiny.yaml"
pytestmark = [pytest.mark.xdist_group("launch"), pytest.mark.timeout(900)]


def mixture(folder: Path) -> Path:
    """The tiny recipe, with arithmetic and words to be repeated instead of arithmetic alone."""
    rows: list[dict[str, Any]] = []
    for n, row in enumerate(problems(split="train", size=20, operations=3, seed=0)):
        word = "abcdefghij"[n % 10] * 3
        rows += [
            {"prompt": row["prompt"], "answer": row["answer"], "task": "math"},
            {"prompt": f"{word}{n}=", "word": word, "task": "word"},  # no answer
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(TINY.read_text())
    recipe["data"]["train"] = {"source": str(folder / "rows.jsonl")}
    recipe["data"]["missing_answers"] = "allow"
    recipe["data"].pop("eval")
    recipe.pop("eval")
    recipe["grpo"]["steps"] = 2
    recipe["rewards"]["reward_funcs"] = [
        "format",
        {"func": "accuracy", "when": {"column": "task", "equals": "math"}},
        {
            "func": "exact_match",
            "name": "word",
            "params": {"gold_column": "word"},
            "when": {"column": "task", "equals": "word"},
        },
    ]
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def recorded(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_each_task_is_scored_by_its_own_function_on_any_number_of_ranks(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    recipe = mixture(tmp_path)
    folders = {processes: tmp_path / f"run{processes}" for processes in (1, 2)}
    for processes, folder in folders.items():
        arguments = ["--config", str(recipe), "--output_dir", str(folder)]
        launch("scripts/grpo.py", arguments, config="ddp.yaml" if processes == 2 else None, processes=processes)
        steps = [row for row in recorded(folder, "metrics.jsonl") if "reward" in row]
        assert [row["step"] for row in steps] == [1, 2]
        for row in steps:
            assert row["rewards/accuracy/none_frac"] + row["rewards/word/none_frac"] == 1.0
            assert row["rewards/format/none_frac"] == row["rewards/masked_frac"] == 0.0
        completions = recorded(folder, "completions.jsonl")
        is_word_of = [row["prompt"][0] == row["prompt"][1] for row in completions]
        assert any(is_word_of) and not all(is_word_of)
        for row, is_word in zip(completions, is_word_of, strict=True):
            assert (row["rewards/accuracy"] is None) == is_word and (row["rewards/word"] is None) != is_word
    first = [[row for row in recorded(folder, "completions.jsonl") if row["step"] == 1] for folder in folders.values()]
    assert len(first[0]) == 16 and first[0] == first[1]
