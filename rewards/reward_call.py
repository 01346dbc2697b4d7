"""One call of one reward function, from the rows of a batch to a verdict for each of them.

In: a `RewardEntry` and a `Batch`. Out: one `Verdict` per row that the function applies to. Whatever the function
returns or raises is checked here; the scorer only adds up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from rewards.base import Score
from rewards.column_check import missing_columns
from rewards.pool import Outcome, VerifierPool
from rewards.registry import load_function
from rewards.reward_entry import RewardEntry

RowStatus = Literal["ok", "none", "timeout", "error"]
# A built-in function marks single scores with these rules: the text made its verifier run out of time; the function
# itself failed on this row (value None), which stops or masks as an exception would.
TIMEOUT_RULE, ERROR_RULE = "timeout", "error"


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows to score; every field has one entry per row."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    group_ids: Sequence[int]

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
    if entry.conversational:
        _to_messages(arguments)
    return {**arguments, **entry.params}


def _to_messages(arguments: dict[str, Any]) -> None:
    for key, role in (("prompts", "user"), ("completions", "assistant")):
        if key in arguments:
            arguments[key] = [[{"role": role, "content": text}] for text in arguments[key]]


def call_here(entry: RewardEntry, arguments: dict[str, Any], count: int) -> list[Verdict]:
    """Call a synchronous function in this process; `count` verdicts."""
    started = time.monotonic()
    try:
        returned = entry.function(**arguments)
    except (
        Exception
    ) as error:  # the border to a user's function: carried on by name to the scorer, which stops or masks
        return [_failed(f"{type(error).__name__}: {error}", time.monotonic() - started)] * count
    return read_verdicts(returned, count, time.monotonic() - started)


async def call_async(entry: RewardEntry, arguments: dict[str, Any], count: int) -> list[Verdict]:
    """Await an async function; `count` verdicts."""
    started = time.monotonic()
    try:
        returned = await entry.function(**arguments)
    except Exception as error:  # as in call_here
        return [_failed(f"{type(error).__name__}: {error}", time.monotonic() - started)] * count
    return read_verdicts(returned, count, time.monotonic() - started)


def call_isolated(entry: RewardEntry, batch: Batch, rows: Sequence[int], pool: VerifierPool) -> list[Verdict]:
    """Call the function row by row in worker processes."""
    jobs = [(entry.path, call_arguments(entry, batch, [row])) for row in rows]
    outcomes = pool.map("rewards.reward_call:call_by_name", jobs, entry.time_limit_s)
    return [_isolated_verdict(outcome, entry.timeout_score) for outcome in outcomes]


def call_by_name(path: str, arguments: dict[str, Any]) -> Any:
    """What a worker runs. A list stays what it is, also of the wrong length: the owner checks it."""
    returned = load_function(path)(**arguments)
    return returned.tolist() if hasattr(returned, "tolist") else returned


def _isolated_verdict(outcome: Outcome, timeout_score: float | None) -> Verdict:
    if outcome.status == "ok":
        return read_verdicts(outcome.value, 1, outcome.seconds)[0]
    if outcome.status == "error":
        return _failed(outcome.error, outcome.seconds)
    if timeout_score is None:
        return Verdict(Score(None, outcome.error, rule=outcome.status), "timeout", outcome.seconds)
    return Verdict(Score(timeout_score, outcome.error, rule=outcome.status), "timeout", outcome.seconds)


def read_verdicts(returned: Any, count: int, seconds: float) -> list[Verdict]:
    """Check what a reward function returned for `count` rows. Lists, tuples and one-dimensional arrays or tensors are
    accepted."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        return [_failed(f"returned {_shown(returned)}, not a list of {count} values", seconds)] * count
    if len(values) != count:
        return [_failed(f"returned {len(values)} values for {count} completions", seconds)] * count
    return [_read_value(value, seconds) for value in values]


def _read_value(value: Any, seconds: float) -> Verdict:
    score = value if isinstance(value, Score) else None
    number = value.value if score is not None else value
    if number is None and score is not None and score.rule == ERROR_RULE:
        return Verdict(score, "error", seconds)
    if number is None:
        return Verdict(score or Score(None, "does not apply"), "none", seconds)
    if hasattr(number, "item"):  # a scalar of numpy or torch
        number = number.item()
    if not isinstance(number, Real):
        return _failed(f"returned {_shown(number)}, which is not a number", seconds)
    try:
        plain = float(number)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        return _failed(f"returned {_shown(number)}, which is not finite", seconds)
    if score is None:
        return Verdict(Score(plain), "ok", seconds)
    return Verdict(score, "timeout" if score.rule.endswith(TIMEOUT_RULE) else "ok", seconds)


def _failed(problem: str, seconds: float) -> Verdict:
    return Verdict(Score(None, problem, rule=ERROR_RULE), "error", seconds)


def _shown(value: Any, limit: int = 80) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
