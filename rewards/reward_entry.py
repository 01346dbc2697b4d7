"""One entry of a recipe's `reward_funcs`, checked: which function, for which rows, with which parameters and weight.

In: a name, or a mapping with the keys of `RewardEntry` that a recipe may set (`ENTRY_KEYS`). Out: `RewardEntry`, or
ValueError that names every entry and key that is wrong.

    reward_funcs:
      - format                                        # a registry name alone
      - func: accuracy                                # or with settings
        weight: 2.0
        when: {column: task, in: [gsm8k, math]}       # rows of other tasks are masked
      - func: my_rewards.py:brevity
        params: {limit: 80}                           # keyword arguments of the function
        columns: {target: answer}                     # its argument `target` is the dataset's column `answer`
        isolate: true                                 # in a worker process that is killed after time_limit_s
        time_limit_s: 2.0
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rewards.pool import MEMORY_LIMIT_MB
from rewards.registry import BUILTINS, absolute_name, load_function

ROW_ARGUMENTS = ("prompts", "completions", "completion_ids")
RESERVED_ARGUMENTS = (*ROW_ARGUMENTS, "group_ids", "counters", "trainer_state")
_OPTIONAL_COLUMN_SETTINGS = ("options_column",)  # where they keep their default, the dataset may lack the column
ENTRY_KEYS = (
    "func", "name", "weight", "params", "columns", "when", "isolate", "time_limit_s", "memory_limit_mb",
    "timeout_score", "conversational",
)  # fmt: skip


# Seconds: one row in a worker process; a whole call in this process, where only a function that hangs needs so long.
ISOLATED_LIMIT_S, CALL_LIMIT_S = 5.0, 600.0
SMALLEST_MEMORY_MB = 256

_Function = TypeVar("_Function", bound=Callable[..., Any])


def checked_by(
    check: Callable[..., None], *, machine: Callable[[], object] | None = None
) -> Callable[[_Function], _Function]:
    """Decorator for a reward function: `check(**params)` is called with the recipe's parameters when the recipe is
    read, and raises ValueError for values that are not allowed. machine: called before a run starts to pay; raises
    RuntimeError where the function cannot run on this machine."""

    def mark(function: _Function) -> _Function:
        # functions have no such attributes for type checkers
        setattr(function, "check_params", check)  # noqa: B010
        setattr(function, "check_machine", machine)  # noqa: B010
        return function

    return mark


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds for the rows whose `column` has one of `values`."""

    column: str
    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"column {self.column!r} is {' or '.join(map(repr, self.values))}"


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """name: unique, used in metrics and by task_column. path: `module:function`, loadable from any process.
    weight: factor in the sum. params: keyword arguments from the recipe. columns: argument name -> dataset column.
    when: None means every row. isolate: call row by row in a worker process. time_limit_s: seconds of a row there
    (default 5), else of a call with all rows in this process (default 600; None: the function bounds itself).
    memory_limit_mb: address space of a worker there.
    timeout_score: what a row is worth that ran out of time or memory there; None means that this is an error.
    conversational: pass prompts and completions as TRL's lists of messages instead of text.
    """

    name: str
    path: str
    function: Callable[..., Any]
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    when: Condition | None = None
    isolate: bool = False
    time_limit_s: float | None = None
    memory_limit_mb: float = MEMORY_LIMIT_MB
    timeout_score: float | None = None
    conversational: bool = False

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    @property
    def wants_groups(self) -> bool:
        return "group_ids" in self.named_arguments

    @property
    def wants_counters(self) -> bool:
        return "counters" in self.named_arguments

    @property
    def named_arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments that can be given by keyword."""
        usable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {key: item for key, item in inspect.signature(self.function).parameters.items() if item.kind in usable}

    @property
    def takes_any(self) -> bool:
        parameters = inspect.signature(self.function).parameters.values()
        return any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)

    @property
    def builtin(self) -> bool:
        return self.path in BUILTINS.values()

    @property
    def column_arguments(self) -> list[str]:
        """Arguments that dataset columns fill, if the recipe's params do not: all of a user's function; of a built-in
        those without a default, since the others are its settings."""
        return [
            key
            for key, item in self.named_arguments.items()
            if key not in (*RESERVED_ARGUMENTS, *self.params)
            and not (self.builtin and item.default is not inspect.Parameter.empty)
        ]

    @property
    def needed_columns(self) -> dict[str, str]:
        """Dataset columns without which the function cannot be called -> what asks for each of them."""
        named = self.named_arguments
        needed = {
            self.columns.get(key, key): f"argument {key!r}"
            for key in self.column_arguments
            if key in self.columns or named[key].default is inspect.Parameter.empty
        }
        needed |= {column: f"columns.{key}" for key, column in self.columns.items() if column not in needed}
        needed |= {column: key for key, column in self.column_settings.items() if column not in needed}
        if self.when is not None and self.when.column not in needed:
            needed[self.when.column] = "when"
        return needed

    @property
    def column_settings(self) -> dict[str, str]:
        """Parameters that name a column, by convention those that end in `_column` -> the column. Of a built-in, the
        defaults count as well."""
        settings: dict[str, Any] = dict(self.params)
        if self.builtin:
            defaults = {key: item.default for key, item in self.named_arguments.items()}
            settings = {
                key: value for key, value in defaults.items() if key not in _OPTIONAL_COLUMN_SETTINGS
            } | settings
        return {key: value for key, value in settings.items() if key.endswith("_column") and isinstance(value, str)}

    def holds_for(self, row: Mapping[str, Any]) -> bool:
        """Whether `when` lets the function score this row."""
        return self.when is None or self.when.holds(row.get(self.when.column))


def parse_entries(
    reward_funcs: Sequence[str | Mapping[str, Any]],
    reward_weights: Sequence[float] | None = None,
    *,
    base_folder: Path | None = None,
) -> tuple[RewardEntry, ...]:
    """All entries of a recipe. ValueError lists everything that is wrong with any of them."""
    if isinstance(reward_funcs, str | Mapping) or not reward_funcs:
        raise ValueError("reward_funcs: a list with at least one reward function is needed")
    if reward_weights is not None and len(reward_weights) != len(reward_funcs):
        raise ValueError(f"reward_weights has {len(reward_weights)} entries, reward_funcs has {len(reward_funcs)}")
    entries: list[RewardEntry] = []
    problems: list[str] = []
    for index, raw in enumerate(reward_funcs):
        weight = None if reward_weights is None else reward_weights[index]
        try:
            entries.append(_parse_entry(raw, weight, base_folder))
        except ValueError as error:
            problems.append(f"reward_funcs[{index}]: {error}")
    names = [entry.name for entry in entries]
    problems += [f"reward_funcs: the name {name!r} stands twice; give one of them `name: ...`"
                 for name in dict.fromkeys(names) if names.count(name) > 1]  # fmt: skip
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(entries)


def _parse_entry(raw: str | Mapping[str, Any], listed_weight: float | None, base_folder: Path | None) -> RewardEntry:
    settings: dict[str, Any] = {"func": raw} if isinstance(raw, str) else dict(raw)
    for key in settings:
        if key not in ENTRY_KEYS:
            raise ValueError(f"unknown key {key!r}{nearest_name(key, ENTRY_KEYS)} Allowed: {', '.join(ENTRY_KEYS)}")
    name = settings.get("func")
    if not isinstance(name, str) or not name:
        raise ValueError(f"func: {name!r} is not allowed; a registry name, module:function or file.py:function")
    if listed_weight is not None and "weight" in settings:
        raise ValueError(f"{name}: weight stands both here and in reward_weights")
    function = load_function(name, base_folder=base_folder)
    entry = RewardEntry(
        name=str(settings.get("name", name if name in BUILTINS else name.rpartition(":")[2])),
        path=absolute_name(name, base_folder=base_folder),
        function=function,
        weight=_number(settings.get("weight", 1.0 if listed_weight is None else listed_weight), f"{name}: weight"),
        params=_mapping(settings, "params", name),
        columns=_mapping(settings, "columns", name),
        when=_condition(settings.get("when"), name),
        isolate=_truth(settings.get("isolate", False), f"{name}: isolate"),
        memory_limit_mb=_number(settings.get("memory_limit_mb", MEMORY_LIMIT_MB), f"{name}: memory_limit_mb"),
        timeout_score=_number_or_none(settings.get("timeout_score"), f"{name}: timeout_score"),
        conversational=_truth(settings.get("conversational", False), f"{name}: conversational"),
    )
    limit = settings.get("time_limit_s", _default_limit(entry))
    if limit is not None or "time_limit_s" in settings:
        entry = replace(entry, time_limit_s=_number(limit, f"{name}: time_limit_s", above_zero=True))
    _check_arguments(entry)
    _check_isolation(entry, settings)
    check = getattr(function, "check_params", None)
    if check is not None:
        try:
            check(**entry.params)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.name}: params: {error}") from error
    return entry


def _default_limit(entry: RewardEntry) -> float | None:
    """Our own synchronous functions bound every row by themselves, so that many rows may take long together."""
    if entry.isolate:
        return ISOLATED_LIMIT_S
    return None if entry.builtin and not entry.is_async else CALL_LIMIT_S


def _check_arguments(entry: RewardEntry) -> None:
    named = [key for key in entry.named_arguments if key not in RESERVED_ARGUMENTS]
    for kind, keys in (("params", entry.params), ("columns", entry.columns)):
        for key in keys:
            if key in RESERVED_ARGUMENTS:
                raise ValueError(f"{entry.name}: {kind}: {key!r} is not allowed; the scorer gives it")
            # A user's function may read what it likes out of **kwargs; of ours we know that a stranger is a
            # misspelling.
            if key not in named and (entry.builtin or not entry.takes_any):
                allowed = ", ".join(named) or "none"
                raise ValueError(
                    f"{entry.name}: {kind}: it has no argument {key!r}{nearest_name(key, named)} Allowed: {allowed}"
                )
    if entry.builtin:
        for key, value in entry.params.items():
            default = entry.named_arguments[key].default
            if isinstance(default, bool):
                _truth(value, f"{entry.name}: params: {key}")
            elif isinstance(default, int | float):
                _number(value, f"{entry.name}: params: {key}")
        for key in entry.columns:
            if key not in (*entry.column_arguments, *entry.params):
                raise ValueError(f"{entry.name}: columns: {key!r} is a setting, no column; it goes into params")
    both = sorted(set(entry.params) & set(entry.columns))
    if both:
        raise ValueError(f"{entry.name}: {', '.join(both)} stands both in params and in columns")
    required_by_position = [
        key for key, item in inspect.signature(entry.function).parameters.items()
        if item.kind is inspect.Parameter.POSITIONAL_ONLY and item.default is inspect.Parameter.empty
    ]  # fmt: skip
    if required_by_position:
        raise ValueError(f"{entry.name}: takes {', '.join(required_by_position)} by position only; keywords are needed")


def _check_isolation(entry: RewardEntry, settings: Mapping[str, Any]) -> None:
    if entry.isolate and entry.is_async:
        raise ValueError(f"{entry.name}: isolate is not possible for an async function")
    if entry.isolate and entry.wants_groups:
        raise ValueError(f"{entry.name}: isolate calls row by row, but this function needs whole groups (group_ids)")
    if entry.isolate and entry.wants_counters:
        raise ValueError(f"{entry.name}: isolate is not possible for a function that counts (counters)")
    for key in ("timeout_score", "memory_limit_mb"):
        if key in settings and not entry.isolate:
            raise ValueError(f"{entry.name}: {key} has no effect without `isolate: true`")
    if entry.memory_limit_mb < SMALLEST_MEMORY_MB:  # Python and the verifiers' modules themselves need some
        raise ValueError(
            f"{entry.name}: memory_limit_mb: {entry.memory_limit_mb:g} is not allowed; at least {SMALLEST_MEMORY_MB}"
        )


def _condition(raw: Any, name: str) -> Condition | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping) or "column" not in raw or set(raw) not in ({"column", "equals"}, {"column", "in"}):
        allowed = "{column: C, equals: V} or {column: C, in: [V, ...]}"
        raise ValueError(f"{name}: when: {raw!r} is not allowed; {allowed}")
    if "equals" in raw:
        return Condition(str(raw["column"]), (raw["equals"],))
    if not isinstance(raw["in"], list | tuple) or not raw["in"]:
        raise ValueError(f"{name}: when: in: {raw['in']!r} is not allowed; a list of values")
    return Condition(str(raw["column"]), tuple(raw["in"]))


def _mapping(settings: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {key}: {value!r} is not allowed; a mapping of argument names")
    return dict(value)


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):  # the text "no" would count as true
        raise ValueError(f"{where}: {value!r} is not allowed; true or false")
    return value


def _number(value: Any, where: str, *, above_zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {value!r} is not allowed; a finite number")
    if above_zero and value <= 0:
        raise ValueError(f"{where}: {value!r} is not allowed; more than 0")
    return float(value)


def _number_or_none(value: Any, where: str) -> float | None:
    return None if value is None else _number(value, where)


def nearest_name(key: str, allowed: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or `;` where nothing is near."""
    nearest = difflib.get_close_matches(key, allowed, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ";"
