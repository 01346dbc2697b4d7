"""Columns are checked before a run: missing ones, settings that name them, functions that never apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewards.scorer import RewardScorer

FUNCTIONS = """
def equals(completions, answer): return [1.0] * len(completions)
def softer(completions, answer=None, **columns): return [1.0] * len(completions)
def anything(prompts, completions, completion_ids, **columns): return [1.0] * len(completions)
def grouped(completions, group_ids, limit): return [1.0] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def entry(file: str, setting: dict[str, Any]) -> dict[str, Any]:
    return {**setting, "func": setting["func"].replace("FILE", file)}


@pytest.mark.parametrize(
    ("setting", "columns", "says"),
    [
        (
            {"func": "FILE:equals"},
            ["question", "anser"],
            "data.train: reward function 'equals': argument 'answer': there is no column 'answer'; "
            "did you mean 'anser'? The columns are: anser, question",
        ),
        ({"func": "FILE:equals"}, [], "argument 'answer': there is no column 'answer'; The columns are: none"),
        (
            {"func": "FILE:equals", "columns": {"answer": "gold"}},
            ["answer", "golds"],
            "argument 'answer': there is no column 'gold'; did you mean 'golds'?",
        ),
        ({"func": "FILE:softer", "columns": {"answer": "gold"}}, ["answer"], "argument 'answer': there is no column"),
        ({"func": "FILE:anything", "columns": {"extra": "gold"}}, ["answer"], "columns.extra: there is no column"),
        ({"func": "FILE:anything", "params": {"gold_column": "gold"}}, ["g"], "gold_column: there is no column 'gold'"),
        ({"func": "FILE:grouped"}, ["x"], "argument 'limit': there is no column 'limit'"),
        ({"func": "accuracy"}, ["solution"], "reward function 'accuracy': gold_column: there is no column 'answer'"),
        ({"func": "countdown"}, ["numbers"], "target_column: there is no column 'target'"),
        ({"func": "code"}, ["test"], "argument 'tests': there is no column 'tests'; did you mean 'test'?"),
        (
            {"func": "multiple_choice", "params": {"options_column": "choices"}},
            ["answer", "options"],
            "options_column: there is no column 'choices'",
        ),
        ({"func": "format", "when": {"column": "task", "equals": 1}}, ["tusk"], "when: there is no column 'task'"),
    ],
)
def test_missing_columns(file: str, setting: dict[str, Any], columns: list[str], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        RewardScorer([entry(file, setting)]).check_columns(columns, source="data.train")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "columns"),
    [
        ({"func": "FILE:softer"}, []),
        ({"func": "FILE:anything"}, []),
        ({"func": "FILE:grouped", "params": {"limit": 3}}, []),
        ({"func": "FILE:equals", "columns": {"answer": "gold"}}, ["gold"]),
        ({"func": "format"}, []),
        ({"func": "accuracy", "params": {"gold_column": "gold"}}, ["gold"]),
        ({"func": "multiple_choice"}, ["answer"]),  # options are read where there are any
        ({"func": "majority"}, []),
        ({"func": "language_consistency"}, []),
    ],
)
def test_columns_that_suffice(file: str, setting: dict[str, Any], columns: list[str]) -> None:
    RewardScorer([entry(file, setting)]).check_columns(columns, source="data.train")


def test_all_that_is_missing_comes_at_once(file: str) -> None:
    scorer = RewardScorer([f"{file}:equals", "countdown"], task_column="task")
    with pytest.raises(ValueError) as caught:
        scorer.check_columns(["target"], source="data.eval")
    lines = str(caught.value).splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "data.eval: reward function 'equals': argument 'answer': there is no column 'answer'",
        "data.eval: reward function 'countdown': numbers_column: there is no column 'numbers'",
        "data.eval: task_column: there is no column 'task'",
    ]


def test_functions_that_never_apply() -> None:
    rows = [{"task": "math", "use": "format"}, {"task": "chat", "use": ["format"]}]
    by_condition = RewardScorer(["format", {"func": "tag_count", "when": {"column": "task", "in": ["maths", "code"]}}])
    by_condition.check_columns(["task", "use"], source="data.train")  # nothing is known of the rows
    with pytest.raises(ValueError) as caught:
        by_condition.check_columns(["task", "use"], source="data.train", rows=iter(rows))
    assert str(caught.value) == (
        "data.train: reward function 'tag_count' applies to none of the 2 rows "
        "(when: column 'task' must be 'maths' or 'code'; it is 'math', 'chat')"
    )
    by_task = RewardScorer(["format", "tag_count"], task_column="use")
    with pytest.raises(
        ValueError, match=r"'tag_count' applies to none of the 2 rows \(task_column: 'use' must name it"
    ):
        by_task.check_columns(["task", "use"], source="data.train", rows=rows)
    by_task.check_columns(["use"], source="data.train", rows=[*rows, {"use": ["tag_count", "format"]}])
    both = RewardScorer(
        [{"func": "format", "when": {"column": "task", "equals": "chat"}}, "tag_count"], task_column="use"
    )
    with pytest.raises(ValueError, match="'format' applies to none of the 2 rows"):
        both.check_columns(
            ["task", "use"], source="s", rows=[{"task": "chat", "use": "tag_count"}, {"task": "math", "use": "format"}]
        )


def test_task_columns_that_name_no_function() -> None:
    scorer = RewardScorer(["format"], task_column="use")
    with pytest.raises(ValueError) as caught:
        scorer.check_columns(["use"], source="data.train", rows=[{"use": "format"}, {"use": "formt"}, {}])
    assert str(caught.value).splitlines() == [
        "data.train: row 1, column 'use': 'formt' is not allowed; one or a list of: format",
        "data.train: row 2, column 'use': None is not allowed; one or a list of: format",
    ]
