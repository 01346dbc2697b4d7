"""Do the reward functions of a recipe find the dataset columns that they read, and do they ever apply?

In: entries, the task column, the names of a dataset's columns, optionally its rows. Out: what is wrong, one line each.
Used before a run pays for anything (`RewardScorer.check_columns`), by lint, and by every call.

    column_problems(entries, None, ["question", "anser"])
    # ["reward function 'accuracy': gold_column: there is no column 'answer'; did you mean 'anser'? ..."]
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rewards.reward_entry import RewardEntry, nearest_name

_SHOWN = 8


def missing_column(asked_by: str, column: str, columns: Iterable[str]) -> str:
    """The message for a column that is not there."""
    have = sorted(columns)
    return (
        f"{asked_by}: there is no column {column!r}{nearest_name(column, have)} "
        f"The columns are: {', '.join(have) or 'none'}"
    )


def missing_columns(entry: RewardEntry, columns: Collection[str]) -> list[str]:
    """A message for each column that this function needs and the dataset lacks."""
    return [
        missing_column(f"reward function {entry.name!r}: {asked_by}", column, columns)
        for column, asked_by in entry.needed_columns.items()
        if column not in columns
    ]


def column_problems(
    entries: Sequence[RewardEntry],
    task_column: str | None,
    columns: Collection[str],
    rows: Iterable[Mapping[str, Any]] = (),
) -> list[str]:
    """Everything wrong with these columns for these functions. rows: if there are any, a function that applies to none
    of them is a problem, too."""
    problems = [problem for entry in entries for problem in missing_columns(entry, columns)]
    if task_column is not None and task_column not in columns:
        problems.append(missing_column("task_column", task_column, columns))
    known = list(rows)
    if problems or not known:
        return problems
    names = [entry.name for entry in entries]
    named: list[Sequence[str]] = []  # by each row's task column
    for number, row in enumerate(known):
        try:
            named.append(names if task_column is None else named_functions(row.get(task_column), names))
        except ValueError as error:
            problems.append(f"row {number}, column {task_column!r}: {error}")
    if problems:
        return problems[:_SHOWN]
    return [
        _never(entry, task_column, known)
        for entry in entries
        if not any(entry.name in wanted and entry.holds_for(row) for wanted, row in zip(named, known, strict=True))
    ]


def named_functions(task: Any, names: Collection[str]) -> list[str]:
    """The functions that the value of a row's task column names (one or a list). ValueError for anything else."""
    wanted = [task] if isinstance(task, str) else task
    if not isinstance(wanted, list | tuple) or any(name not in names for name in wanted):
        raise ValueError(f"{task!r} is not allowed; one or a list of: {', '.join(names)}")
    return list(wanted)


def _never(entry: RewardEntry, task_column: str | None, rows: Sequence[Mapping[str, Any]]) -> str:
    asked: list[str] = []
    if entry.when is not None:
        values = list(dict.fromkeys(repr(row.get(entry.when.column)) for row in rows))
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        wanted = " or ".join(map(repr, entry.when.values))
        asked.append(f"when: column {entry.when.column!r} must be {wanted}; it is {', '.join(values[:_SHOWN])}{more}")
    if task_column is not None:
        asked.append(f"task_column: {task_column!r} must name it")
    return f"reward function {entry.name!r} applies to none of the {len(rows)} rows ({'; '.join(asked)})"
