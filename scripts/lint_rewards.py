"""Try reward functions out on hostile texts and on rows of the dataset, before paying for GPUs.

    python scripts/lint_rewards.py recipes/gsm8k/tiny_cpu.yaml            # its reward_funcs, on rows of its data.train
    python scripts/lint_rewards.py accuracy --data rows.jsonl             # one function by name
    python scripts/lint_rewards.py my_rewards.py:brevity --params '{"limit": 80}'

Prints a table per function. Exit code 0: nothing found; 1: problems; 2: the recipe, function or data cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.lint import lint_function, table

Settings = list[str | Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a recipe (.yaml) or a reward function: name, module:function, file.py:function")
    parser.add_argument("--data", type=Path, help="JSONL file of dataset rows, columns as the function gets them")
    parser.add_argument("--rows", type=int, default=200, help="rows of the dataset to check (default: 200)")
    parser.add_argument("--params", default="{}", help="JSON of the function's parameters")
    options = parser.parse_args(arguments)
    try:
        settings, rows, task_column = read_target(options)
        reports = [lint_function(setting, rows, task_column=task_column) for setting in settings]
    except (OSError, ValueError) as error:
        print(f"lint_rewards: {error}", file=sys.stderr)
        return 2
    for report in reports:
        print("\n".join(table(report)))
    return int(any(report.problems for report in reports))


def read_target(options: argparse.Namespace) -> tuple[Settings, list[dict[str, Any]], str | None]:
    """The functions to try, the rows to try them on (none: the corpus brings its own), and the recipe's task column."""
    if options.rows < 1:
        raise ValueError(f"--rows {options.rows}: allowed from 1")
    try:
        params = json.loads(options.params)
    except ValueError as error:
        raise ValueError(f"--params {options.params}: is not JSON: {error}") from error
    rows = read_jsonl(options.data, options.rows) if options.data is not None else []
    if not options.target.endswith((".yaml", ".yml")):
        return [{"func": options.target, "params": params}], rows, None
    from rl.config import load_recipe  # only for recipes, as it loads the whole schema
    from rl.data.sources import read_rows

    if params:
        raise ValueError("--params goes with a function; a recipe brings its own")
    recipe = load_recipe(options.target)
    if options.data is None:
        located = read_rows(recipe.data.train, key="data.train", seed=recipe.seed)
        rows = [row.columns for row in located[: options.rows]]
    return list(recipe.rewards.reward_funcs), rows, recipe.rewards.task_column


def read_jsonl(path: Path, limit: int) -> list[dict[str, Any]]:
    """The first rows of a file. ValueError names the line that is no JSON object."""
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: an object is needed, not {type(row).__name__}")
            rows.append(row)
            if len(rows) == limit:
                break
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


if __name__ == "__main__":
    sys.exit(main())
