"""Scores rows with all reward functions of a recipe, and never invents a number.

In: prompts, completions, token ids, dataset columns, group ids (one entry per row). Out: `ScoredBatch`. Every function
has TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async, and is
called with keyword arguments: the columns that it names (all of them if it takes `**columns`), only for the rows that
it applies to, and the parameters of the recipe, which win over a column of the same name. A function that declares
`group_ids` gets them and can so see whole groups; one that declares `counters` gets a `rewards.base.Counters`, one that
declares `trainer_state` a `rewards.base.TrainerState`.

A wrong number of values, a value that is no finite number, or an exception is a fault of the function, not of the
policy. `on_error="stop"` raises `RewardError`; `"mask"` makes the reward of the row None and counts it. Nothing is
broadcast and nothing becomes a silent 0. True and False count as 1 and 0.

    scorer = RewardScorer(["format", {"func": "my_rewards.py:brevity", "params": {"limit": 80}}], [1.0, 0.2])
    batch = scorer.score(prompts, completions, completion_ids, {"answer": answers}, group_ids)
    batch.rewards       # [1.2, 1.0, 0.0, ...]
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewards.base import Counters, Score, TrainerState
from rewards.column_check import column_problems, missing_column, named_functions
from rewards.daemon_threads import DaemonThreads
from rewards.in_process import InProcess
from rewards.reward_call import Batch, RowStatus, Verdict, call_arguments, call_isolated
from rewards.reward_entry import RewardEntry, parse_entries
from rewards.shown import shown

_EXCERPT_CHARS = 200
_DOES_NOT_APPLY = Verdict(Score(None, "does not apply"), "none", 0.0)


class RewardError(RuntimeError):
    """A reward function broke its contract. function: its name in the recipe. row: the first row concerned."""

    def __init__(self, message: str, *, function: str, row: int) -> None:
        super().__init__(message)
        self.function = function
        self.row = row


@dataclass(slots=True)
class ScoredBatch:
    """What came out, one entry per row.

    rewards: weighted sum over the functions that gave a value; None when none did, or when one of them failed on this
    row (a sum without one of its parts is not comparable with the rest of its group). by_function: the unweighted
    values. scores: the same with reasons. statuses: ok, none (does not apply), timeout or error. latencies: seconds of
    the call that scored the row (of the row alone where a worker process scored it), None where the recipe leaves the
    row out. counters: what functions counted by themselves, of the whole batch.
    """

    rewards: list[float | None]
    by_function: dict[str, list[float | None]]
    scores: dict[str, list[Score]]
    statuses: dict[str, list[RowStatus]] = field(default_factory=dict)
    latencies: dict[str, list[float | None]] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """`rewards/<name>/{mean,std,timeout_frac,error_frac,none_frac,latency_p95_s}` over the rows of this batch. mean
        and std (n - 1 in the divisor, as in TRL) are over the rows with a value, absent without any; fractions are of
        all rows."""
        metrics: dict[str, float] = {}
        for name, values in self.by_function.items():
            given = [value for value in values if value is not None]
            if given:
                metrics[f"rewards/{name}/mean"] = math.fsum(given) / len(given)
                metrics[f"rewards/{name}/std"] = _sample_std(given)
            for status in ("timeout", "error", "none"):
                count = sum(1 for other in self.statuses[name] if other == status)
                metrics[f"rewards/{name}/{status}_frac"] = count / max(1, len(values))
            measured = [seconds for seconds in self.latencies[name] if seconds is not None]
            metrics[f"rewards/{name}/latency_p95_s"] = _percentile_95(measured)
        return metrics | self.counters


def merge_batches(batches: Sequence[ScoredBatch]) -> ScoredBatch:
    """One batch of all rows in order, for groups that were scored one by one while others were still being sampled.
    All of them must come from the same scorer."""
    names = list(batches[0].by_function) if batches else []
    return ScoredBatch(
        rewards=[reward for batch in batches for reward in batch.rewards],
        by_function={name: [value for batch in batches for value in batch.by_function[name]] for name in names},
        scores={name: [score for batch in batches for score in batch.scores[name]] for name in names},
        statuses={name: [status for batch in batches for status in batch.statuses[name]] for name in names},
        latencies={name: [seconds for batch in batches for seconds in batch.latencies[name]] for name in names},
        counters={
            key: math.fsum(batch.counters.get(key, 0.0) for batch in batches)
            for key in sorted({key for batch in batches for key in batch.counters})
        },
    )


class RewardScorer:
    """The reward functions of a recipe, ready to be called. Thread-safe; may be used inside a running event loop.

    reward_funcs: names, or mappings with the keys of `rewards.reward_entry.RewardEntry`. reward_weights: one per
    function (default 1). on_error: "stop" or "mask", see the module's text. task_column: a dataset column whose value
    in a row, a name or a list of names, says which functions apply to that row. base_folder: where relative paths of
    the recipe start.

    Construction imports the functions and checks names, parameters and weights; ValueError lists everything wrong.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str | Mapping[str, Any]],
        reward_weights: Sequence[float] | None = None,
        *,
        on_error: Literal["stop", "mask"] = "stop",
        task_column: str | None = None,
        base_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if on_error not in ("stop", "mask"):
            raise ValueError(f"on_error: {on_error!r} is not allowed; stop or mask")
        folder = Path(base_folder) if base_folder is not None else None
        self.entries: tuple[RewardEntry, ...] = parse_entries(reward_funcs, reward_weights, base_folder=folder)
        self.on_error = on_error
        self.task_column = task_column
        self.trainer_state = TrainerState()  # what a function that names it is told next; the trainer keeps it true
        self._callers = {entry.name: InProcess(entry) for entry in self.entries if not entry.isolate}
        self._counters = {entry.name: Counters() for entry in self.entries if entry.wants_counters}
        self._executor: DaemonThreads | None = None
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        group_ids: Sequence[int],
    ) -> ScoredBatch:
        """Score all rows. group_ids: which group a row belongs to; rows of a group must come in the same call.

        Raises RewardError (see the module's text), and ValueError for columns that are missing or of another length.
        """
        batch = Batch(prompts, completions, completion_ids, columns, group_ids, self.trainer_state)
        rows_of = {entry.name: self._rows(entry, batch) for entry in self.entries}
        called = [entry for entry in self.entries if rows_of[entry.name]]
        waiting = {entry.name: self._start(entry, batch, rows_of[entry.name]) for entry in called if entry.is_async}
        given: dict[str, list[Verdict]] = {entry.name: [] for entry in self.entries}
        for entry in sorted(called, key=lambda entry: entry.is_async):  # they wait for others while the rest computes
            rows = rows_of[entry.name]
            if entry.is_async:
                given[entry.name] = self._callers[entry.name].verdicts(waiting[entry.name], len(rows))
            else:
                given[entry.name] = self._call(entry, batch, rows)
            self._stop_at_error(entry, rows, given[entry.name], batch)
        verdicts: dict[str, list[Verdict]] = {}
        for name, rows in rows_of.items():
            verdicts[name] = [_DOES_NOT_APPLY] * len(batch.completions)
            for row, verdict in zip(rows, given[name], strict=True):
                verdicts[name][row] = verdict
        return self._scored(verdicts, len(batch.completions))

    def submit(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        group_ids: Sequence[int],
    ) -> Future[ScoredBatch]:
        """`score` in a background thread, so that a group is scored while the engine samples others; see
        `merge_batches`."""
        with self._lock:
            if self._executor is None:
                self._executor = DaemonThreads(4, "reward-scorer")
            return self._executor.submit(self.score, prompts, completions, completion_ids, columns, group_ids)

    def close(self) -> None:
        """Let the threads that this scorer started end; a call that hangs is not waited for. The shared pools stay."""
        with self._lock:
            if self._executor is not None:
                self._executor.shutdown(wait=False, cancel_futures=True)
                self._executor = None
        for caller in self._callers.values():
            caller.close()

    def check_columns(self, columns: Collection[str], *, source: str, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Whether a dataset with these columns can be scored; call it before a run starts to pay.

        source: what to call the dataset in messages ("data.train"). rows: its rows, if every function is meant to apply
        to some of them. ValueError lists every column that is missing (an argument without a default, one named by a
        setting such as gold_column or by `columns`, the one that `when` reads, the task column), values of the task
        column that name no function, and functions that apply to none of the rows.
        """
        problems = column_problems(self.entries, self.task_column, columns, rows)
        if problems:
            raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))

    def check_machine(self) -> None:
        """Whether the functions can run here; call it before a run starts to pay. ValueError says what is missing."""
        for entry in self.entries:
            check = getattr(entry.function, "check_machine", None)
            try:
                if check is not None:
                    check()
            except RuntimeError as error:
                raise ValueError(f"reward function {entry.name!r}: {error}") from error

    def _rows(self, entry: RewardEntry, batch: Batch) -> list[int]:
        """The rows that the function applies to."""
        rows = list(range(len(batch.completions)))
        if entry.when is not None:
            asked_by = f"reward function {entry.name!r}: when"
            values = self._column(batch, entry.when.column, asked_by)
            rows = [row for row in rows if entry.when.holds(values[row])]
        if self.task_column is not None:
            tasks = self._column(batch, self.task_column, "task_column")
            rows = [row for row in rows if entry.name in self._named_in(tasks[row], row)]
        return rows

    def _column(self, batch: Batch, name: str, asked_by: str) -> Sequence[Any]:
        if name not in batch.columns:
            raise ValueError(missing_column(asked_by, name, batch.columns))
        return batch.columns[name]

    def _named_in(self, task: Any, row: int) -> list[str]:
        try:
            return named_functions(task, self.names)
        except ValueError as error:
            raise ValueError(f"row {row}, column {self.task_column!r}: {error}") from error

    def _call(self, entry: RewardEntry, batch: Batch, rows: Sequence[int]) -> list[Verdict]:
        if entry.isolate:
            return call_isolated(entry, batch, rows)
        return self._callers[entry.name].verdicts(self._start(entry, batch, rows), len(rows))

    def _start(self, entry: RewardEntry, batch: Batch, rows: Sequence[int]) -> Future[list[Verdict]]:
        arguments = call_arguments(entry, batch, rows)
        if entry.wants_counters:
            arguments["counters"] = self._counters[entry.name]
        return self._callers[entry.name].start(arguments, len(rows))

    def _stop_at_error(self, entry: RewardEntry, rows: Sequence[int], given: list[Verdict], batch: Batch) -> None:
        if self.on_error == "mask":
            return
        for row, verdict in zip(rows, given, strict=True):
            if verdict.status in ("error", "timeout") and verdict.score.value is None:
                columns = {key: shown(values[row], 60) for key, values in batch.columns.items()}
                raise RewardError(
                    f"reward function {entry.name!r} ({entry.path}) failed on row {row}: {verdict.score.reason}\n"
                    f"  columns: {columns}\n"
                    f"  completion: {_excerpt(repr(batch.completions[row]), _EXCERPT_CHARS)}\n"
                    "  (`on_error: mask` would leave this row out and count it instead)",
                    function=entry.name,
                    row=row,
                )

    def _scored(self, verdicts: dict[str, list[Verdict]], count: int) -> ScoredBatch:
        rewards: list[float | None] = []
        for row in range(count):
            parts = [(entry.weight, verdicts[entry.name][row]) for entry in self.entries]
            failed = any(part.status in ("error", "timeout") and part.score.value is None for _, part in parts)
            given = [weight * part.score.value for weight, part in parts if part.score.value is not None]
            rewards.append(None if failed or not given else math.fsum(given))
        return ScoredBatch(
            rewards=rewards,
            by_function={name: [verdict.score.value for verdict in column] for name, column in verdicts.items()},
            scores={name: [verdict.score for verdict in column] for name, column in verdicts.items()},
            statuses={name: [verdict.status for verdict in column] for name, column in verdicts.items()},
            latencies={
                name: [None if verdict is _DOES_NOT_APPLY else verdict.seconds for verdict in column]
                for name, column in verdicts.items()
            },
            counters={
                f"rewards/{name}/{key}": float(amount)
                for name, counters in self._counters.items()
                for key, amount in counters.take().items()
            },
        )


def _sample_std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _percentile_95(values: Sequence[float]) -> float:
    """Nearest rank: the smallest value that at least 95 % do not exceed; 0 without any."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else 0.0


def _excerpt(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
