"""One call of one reward function, from the rows of a batch to a verdict for each of them.

In: a `RewardEntry` and a `Batch`. Out: one `Verdict` per row that the function applies to. Whatever the function
returns or raises is checked here; the scorer only adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from rewards.base import Score, TrainerState
from rewards.column_check import missing_columns
from rewards.pool import Outcome, shared_pool
from rewards.registry import load_function
from rewards.reward_entry import RewardEntry
from rewards.shown import shown

RowStatus = Literal["ok", "none", "timeout", "error"]
# A built-in function marks single scores with rules that end in these: the text made its verifier run out of time or
# memory; the function itself failed on this row (value None), which stops or masks as an exception would.
LIMIT_RULES, ERROR_RULE = ("timeout", "memory"), "error"


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows to score; every field but trainer_state has one entry per row."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    group_ids: Sequence[int]
    trainer_state: TrainerState

    def __post_init__(self) -> None:
        rows = len(self.completions)
        fields = {"prompts": self.prompts, "completion_ids": self.completion_ids, "group_ids": self.group_ids}
        for name, values in {**fields, **self.columns}.items():
            if len(values) != rows:
                raise ValueError(f"{name} has {len(values)} entries for {rows} completions")


@dataclass(frozen=True, slots=True)
class Verdict:
    """score: value None unless status is ok (or a timeout that still has a score). seconds: what it took."""

    score: Score
    status: RowStatus
    seconds: float


def call_arguments(entry: RewardEntry, batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments for a call with these rows. ValueError for a dataset column that the function needs and the
    dataset lacks."""
    for problem in missing_columns(entry, batch.columns):
        raise ValueError(problem)
    arguments: dict[str, Any] = {}
    renamed = set(entry.columns.values())
    columns = {key: values for key, values in batch.columns.items() if key not in renamed}
    columns |= {argument: batch.columns[column] for argument, column in entry.columns.items()}
    params = dict(entry.params)
    if entry.builtin:
        _keep_apart(entry, columns, params)
    own = {
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        "group_ids": batch.group_ids,
    }
    named = entry.named_arguments
    for key, values in {**columns, **own}.items():
        # group_ids only go to a function that declares them: somebody's **kwargs would otherwise see a column of that
        # name.
        if key in named or (entry.takes_any and key != "group_ids"):
            arguments[key] = [values[row] for row in rows]
    if "trainer_state" in named:
        arguments["trainer_state"] = batch.trainer_state
    if entry.conversational:
        _to_messages(arguments, [batch.columns.get("prompt", batch.prompts)[row] for row in rows])
    return {**arguments, **params}


def _keep_apart(entry: RewardEntry, columns: dict[str, Sequence[Any]], params: dict[str, Any]) -> None:
    """A column that has the name of a built-in's setting must not replace it. If a setting asks for that column, as in
    `language_column: language`, it goes by another name."""
    settings = [key for key in entry.named_arguments if key not in entry.column_arguments]
    taken = {key: columns.pop(key) for key in settings if key in columns}
    for setting, column in entry.column_settings.items():
        if column in taken:
            params[setting] = f"column {column}"
            columns[params[setting]] = taken[column]


def _to_messages(arguments: dict[str, Any], questions: Sequence[Any]) -> None:
    """questions: of the dataset, as text or messages, since TRL's prompts come without a template's words."""
    if "prompts" in arguments:
        arguments["prompts"] = [_messages("user", question) for question in questions]
    if "completions" in arguments:
        arguments["completions"] = [_messages("assistant", text) for text in arguments["completions"]]


def _messages(role: str, content: Any) -> Any:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def call_isolated(entry: RewardEntry, batch: Batch, rows: Sequence[int]) -> list[Verdict]:
    """Call the function row by row in worker processes."""
    jobs = [(entry.path, call_arguments(entry, batch, [row])) for row in rows]
    assert entry.time_limit_s is not None, entry.name
    outcomes = shared_pool(entry.memory_limit_mb).map("rewards.reward_call:call_by_name", jobs, entry.time_limit_s)
    return [_isolated_verdict(outcome, entry.timeout_score) for outcome in outcomes]


def call_by_name(path: str, arguments: dict[str, Any]) -> Any:
    """What a worker runs. A list stays what it is, also of the wrong length: the owner checks it."""
    return _plain(load_function(path)(**arguments))


def _isolated_verdict(outcome: Outcome, timeout_score: float | None) -> Verdict:
    if outcome.status == "ok":
        return read_verdicts(outcome.value, 1, outcome.seconds)[0]
    if outcome.status in ("error", "broken"):
        return failed(outcome.error, outcome.seconds)
    if timeout_score is None:
        return Verdict(Score(None, outcome.error, rule=outcome.status), "timeout", outcome.seconds)
    return Verdict(Score(timeout_score, outcome.error, rule=outcome.status), "timeout", outcome.seconds)


def read_verdicts(returned: Any, count: int, seconds: float) -> list[Verdict]:
    """Check what a reward function returned for `count` rows. Lists, tuples and one-dimensional arrays or tensors are
    accepted, of numbers of Python, numpy or torch."""
    values = _plain(returned)
    if not isinstance(values, list):
        return [failed(f"returned {_told(returned)}, not a list of {count} values", seconds)] * count
    if len(values) != count:
        return [failed(f"returned {len(values)} values for {count} completions", seconds)] * count
    return [_read_value(value, seconds) for value in values]


def _plain(returned: Any) -> Any:
    """A list of Python's own numbers and of Scores that hold such numbers, where it is one; the rest as it came."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        return values
    return [
        replace(value, value=_plain_number(value.value)) if isinstance(value, Score) else _plain_number(value)
        for value in values
    ]


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar of numpy or torch, or an array of theirs
        try:
            return value.item()
        except (ValueError, RuntimeError):  # of several entries: no number
            return value
    return value


def _read_value(value: Any, seconds: float) -> Verdict:
    score = value if isinstance(value, Score) else Score(value)
    number = score.value
    for key, text in score.explanation.items():
        if not isinstance(text, str | None):
            return failed(f"returned a Score whose {key} is {_told(text)}, which is not text", seconds)
    if number is None and score.rule == ERROR_RULE:
        return Verdict(score, "error", seconds)
    if number is None:
        return Verdict(score if score is value else Score(None, "does not apply"), "none", seconds)
    if not isinstance(number, Real):
        return failed(f"returned {_told(number)}, which is not a number", seconds)
    try:
        plain = float(number)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        return failed(f"returned {_told(number)}, which is not finite", seconds)
    return Verdict(replace(score, value=plain), "timeout" if score.rule.endswith(LIMIT_RULES) else "ok", seconds)


def failed(problem: str, seconds: float) -> Verdict:
    """The function failed on a row, or on all of them."""
    return Verdict(Score(None, problem, rule=ERROR_RULE), "error", seconds)


def _told(value: Any) -> str:
    return f"{type(value).__name__} {shown(value)}"
