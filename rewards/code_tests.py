"""The `tests` of a row of code data, read and checked.

In: what stands in the dataset's column, as Python data or as its JSON text, in one of these forms. Out: a list of
cases.

    [{"input": "2 3\\n", "output": "5\\n"}, ...]                                     reads standard input, prints
    {"inputs": ["2 3\\n", ...], "outputs": ["5\\n", ...]}                            the same, as in APPS
    {"entry_point": "add", "cases": [{"args": [2, 3], "output": 5}, ...]}           a function; also "kwargs"
    {"fn_name": "add", "inputs": [[2, 3], ...], "outputs": [5, ...]}                the same, as in APPS, where outputs
                                                                                    may also stand in lists: [[5], ...]
    {"entry_point": "add", "tests": ["assert add(2, 3) == 5", ...], "setup": "..."}   test code; also one text that
                                                                                    defines check, as in HumanEval
    ["assert add(2, 3) == 5", ...]                                                  the same, as in MBPP
    [{"fn_name": "add", "input": [2, 3], "output": 5}, ...]                         a function, as in DeepCoder's data

An entry_point names one function of the program or several, plain or as in LeetCode (Solution().add); where it is left
out beside `tests`, it is what they call and nobody else has defined. A text of `inputs` or `outputs` may also stand as
the list of its lines.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class StdinCase:
    """The program gets `input` and must print `output`."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class CallCase:
    """`function(*args, **kwargs)` must give `output`. exact: equal as Python's == says, without the tolerances. boxed:
    `output` is a list of one entry, which may stand for that entry."""

    function: str
    args: tuple[Any, ...]
    output: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    boxed: bool = False


@dataclass(frozen=True, slots=True)
class ScriptCase:
    """`code` runs apart from the program; in it, `names` are stand-ins for the program's functions."""

    code: str
    names: tuple[str, ...]


Case = StdinCase | CallCase | ScriptCase


def parse_tests(raw: Any) -> list[Case]:
    """The cases of a row. ValueError says what is wrong with it."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"tests: not JSON: {error}") from error
    if isinstance(raw, Mapping) and isinstance(raw.get("test_cases"), Sequence):
        raw = raw["test_cases"]
    if isinstance(raw, Mapping):
        # Arrow gives every row the keys of all others
        cases = _from_mapping({key: value for key, value in raw.items() if value is not None})
    elif isinstance(raw, list | tuple):
        cases = _from_list(raw)
    else:
        raise ValueError(
            f"tests: a {type(raw).__name__} is not allowed; a list or a mapping, see rewards/code_tests.py"
        )
    if not cases:
        raise ValueError("tests: there is no case")
    return cases


def _from_list(raw: Sequence[Any]) -> list[Case]:
    if all(isinstance(item, str) for item in raw):
        return _from_mapping({"tests": raw})
    name = raw[0].get("fn_name") if isinstance(raw[0], Mapping) else None
    if name is None or not all(isinstance(item, Mapping) and item.get("fn_name") == name for item in raw):
        return [_stdin_case(item) for item in raw]
    inputs, outputs = ([item.get(key) for item in raw] for key in ("input", "output"))
    return _from_mapping({"fn_name": name, "inputs": inputs, "outputs": outputs})


def _from_mapping(raw: Mapping[str, Any]) -> list[Case]:
    names = _names(raw.get("entry_point", raw.get("fn_name")))
    if "tests" in raw:
        return _from_test_code(raw["tests"], str(raw.get("setup") or ""), names)
    if "cases" in raw:
        if len(names) != 1 or not isinstance(raw["cases"], list | tuple):
            raise ValueError("tests: with `cases`, which is a list, one entry_point is needed")
        return [_call_case(names[0], item) for item in raw["cases"]]
    inputs, outputs = raw.get("inputs"), raw.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        raise ValueError(
            f"tests: keys {sorted(raw)}: `tests`, `cases`, or `inputs` and `outputs` of equal length are needed"
        )
    pairs = list(zip(inputs, outputs, strict=True))
    if not names:
        return [_stdin_case({"input": _joined(given), "output": _joined(wanted)}) for given, wanted in pairs]
    boxed = "fn_name" in raw and all(isinstance(output, list) and len(output) == 1 for output in outputs)
    return [replace(_call_case(names[0], {"args": args, "output": output}), boxed=boxed) for args, output in pairs]


def _names(raw: Any) -> tuple[str, ...]:
    names = (raw,) if isinstance(raw, str) else () if raw is None else raw
    if isinstance(names, list | tuple):
        names = [name.removeprefix("Solution().") if isinstance(name, str) else name for name in names]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"tests: entry_point: {raw!r} is not allowed; the name of a function")
    return tuple(names)


def _from_test_code(tests: Any, setup: str, names: tuple[str, ...]) -> list[Case]:
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list | tuple) or not all(isinstance(test, str) for test in tests):
        raise ValueError("tests: `tests` must be a list of Python texts")
    codes = [f"{setup}\n{test}" for test in tests]
    trees = list(map(_parsed, codes))
    names = names or _called_names(trees)
    if tests and not names:
        raise ValueError(
            "tests: an entry_point is needed, as the tests call no function that only the program can have"
        )
    return [_plain_assert(tree.body, names) or ScriptCase(code, names) for tree, code in zip(trees, codes, strict=True)]


def _parsed(code: str) -> ast.Module:
    """ValueError for a text that is no Python: it would fail every program."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests: {code.strip()[:80]!r} cannot be read: {type(error).__name__}: {error}") from error


def _called_names(trees: Sequence[ast.Module]) -> tuple[str, ...]:
    """What test code calls by names that neither it nor Python has defined. Where it calls nothing else and defines
    nothing, the program has a function called as one of Python's (MBPP's sum)."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    foreign = [name for name in called if name not in own and not hasattr(builtins, name)]
    return tuple(dict.fromkeys(foreign or ([] if own else called)))


def _plain_assert(body: Sequence[ast.stmt], names: Sequence[str]) -> CallCase | None:
    """`assert f(<constants>) == <constant>` as a call, which needs no process for the test; None for anything else."""
    if len(body) != 1 or not isinstance(body[0], ast.Assert) or not isinstance(body[0].test, ast.Compare):
        return None
    compare = body[0].test
    call = compare.left
    if len(compare.ops) != 1 or not isinstance(compare.ops[0], ast.Eq) or not isinstance(call, ast.Call):
        return None
    if not isinstance(call.func, ast.Name) or call.func.id not in names:
        return None
    try:
        args = tuple(ast.literal_eval(item) for item in call.args)
        keywords = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords if item.arg is not None}
        output = ast.literal_eval(compare.comparators[0])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if len(keywords) != len(call.keywords):
        return None
    return CallCase(call.func.id, args, output, keywords, exact=True)


def _joined(lines: Any) -> Any:
    is_lines = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    return "\n".join(lines) if is_lines else lines


def _stdin_case(item: Any) -> StdinCase:
    if (
        not isinstance(item, Mapping)
        or not isinstance(item.get("input"), str)
        or not isinstance(item.get("output"), str)
    ):
        raise ValueError(f"tests: case {str(item)[:80]!r} is not allowed; {{input: text, output: text}}")
    kind = item.get("type", item.get("testtype"))
    if kind not in (None, "stdin_stdout", "stdin"):
        raise ValueError(f"tests: case {str(item)[:80]!r}: the type {kind!r} is not allowed; stdin_stdout")
    return StdinCase(item["input"], item["output"])


def _call_case(name: str, item: Any) -> CallCase:
    if not isinstance(item, Mapping) or not isinstance(item.get("args"), list | tuple):
        raise ValueError(f"tests: case {str(item)[:80]!r} is not allowed; {{args: [...], output: value}}")
    if ("output" in item) == ("expected" in item):
        raise ValueError(f"tests: case {str(item)[:80]!r} needs either `output` or `expected`")
    kwargs = item.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"tests: case {str(item)[:80]!r}: kwargs: a mapping is needed")
    output = item["output"] if "output" in item else item["expected"]
    return CallCase(name, tuple(item["args"]), output, dict(kwargs))
