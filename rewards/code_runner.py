"""Runs a program against its cases. Lives in a worker of the pool; the program lives in sandboxes below it.

In: the program's text, its cases, limits. Out: `CodeResult` as a dict. The expected outputs stay here; test code that
holds some runs in a second sandbox, in which the program's functions are stand-ins: their arguments go to the program's
sandbox, the returned data comes back. So nothing that a program does in its own process (frames, patched builtins, an
`__eq__` of its own, exit codes) can see or change the comparison.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.code_tests import CallCase, Case, StdinCase, TestCodeCase, same_output, same_value
from rewards.sandbox import Sandbox, SandboxLimits
from rewards.sandbox_values import decode, encode

_COMPILE_LIMIT_S = 5.0
_sandboxes: dict[tuple[str, SandboxLimits], Sandbox] = {}


@dataclass(frozen=True, slots=True)
class Limits:
    """case_s: one case. program_s: all cases of a program together. Seconds of wall time."""

    case_s: float = 2.0
    program_s: float = 10.0
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)


def run_program(program: str, cases: Sequence[Case], limits: Limits, stop_at_failure: bool = False) -> dict[str, Any]:
    """How many cases passed, of how many; the first failure in words; whether time ran out.

    Raises SandboxUnavailable when this machine isolates nothing.
    """
    sandbox = _warm_sandbox("program", limits.sandbox)
    deadline = time.monotonic() + limits.program_s
    passed, first_failure, timed_out = 0, "", False
    loaded = sandbox.load(program, limit_s=min(limits.program_s, _COMPILE_LIMIT_S))
    if loaded.status != "ok":
        sandbox.clean()
        return _result(0, len(cases), loaded.error or loaded.status, loaded.status == "timeout")
    for index, case in enumerate(cases):
        left = deadline - time.monotonic()
        failure = _run_case(sandbox, case, min(limits.case_s, left), limits) if left > 0 else _OUT_OF_TIME
        if failure == "":
            passed += 1
            continue
        timed_out = timed_out or failure.startswith("timeout")
        first_failure = first_failure or f"case {index}: {failure}"
        if stop_at_failure or failure is _OUT_OF_TIME:
            break
        if failure.startswith("died"):  # a new sandbox knows nothing of the program
            sandbox.load(program, limit_s=_COMPILE_LIMIT_S)
    sandbox.clean()
    return _result(passed, len(cases), first_failure, timed_out)


_OUT_OF_TIME = "timeout: the time for all cases together was used up"


def _result(passed: int, total: int, failure: str, timed_out: bool) -> dict[str, Any]:
    return {"passed": passed, "total": total, "failure": failure, "timed_out": timed_out}


def _warm_sandbox(role: str, limits: SandboxLimits) -> Sandbox:
    if (role, limits) not in _sandboxes:
        _sandboxes[role, limits] = Sandbox(limits)
    return _sandboxes[role, limits]


def _run_case(sandbox: Sandbox, case: Case, limit_s: float, limits: Limits) -> str:
    """Why the case failed; empty when it passed."""
    if isinstance(case, StdinCase):
        result = sandbox.run(case.input, limit_s=limit_s)
        if result.status != "ok":
            return _told(result.status, result.error)
        return "" if same_output(result.stdout, case.output) else f"wrong output: printed {result.stdout[:80]!r}"
    opened = sandbox.open_program(limit_s=limit_s)
    if opened.status != "ok":
        return _told(opened.status, opened.error)
    if isinstance(case, CallCase):
        return _check_call(sandbox, case)
    return _check_test(sandbox, case, limit_s, limits)


def _told(status: str, error: str) -> str:
    return f"{status}: {error}" if error else status


def _check_call(sandbox: Sandbox, case: CallCase) -> str:
    keywords = {key: encode(item) for key, item in case.kwargs.items()}
    request = {"call": case.function, "args": [encode(item) for item in case.args], "kwargs": keywords}
    result = sandbox.send(json.dumps(request))
    if result.status != "ok":
        return _told(result.status, result.error)
    reply = _read_reply(result.stdout)
    if "raised" in reply:
        return f"raised {reply['raised']}: {reply['message']}"
    value = decode(reply["value"])
    return "" if same_value(value, case.output) else f"wrong value: returned {repr(value)[:80]}"


def _check_test(program: Sandbox, case: TestCodeCase, limit_s: float, limits: Limits) -> str:
    """Carry calls from the test to the program and data back, until the test says how it went."""
    test = _warm_sandbox("test", limits.sandbox)
    result = test.open_test(case.code, list(case.names), limit_s=limit_s)
    try:
        while result.status == "ok":
            message = json.loads(result.stdout)
            if "passed" in message:
                return "" if message["passed"] is True else str(message["error"])
            answer = program.send(json.dumps(message))
            if answer.status != "ok":
                return _told(answer.status, answer.error)
            result = test.send(json.dumps(_read_reply(answer.stdout)))
        return f"the test itself: {_told(result.status, result.error)}"
    finally:
        test.clean()


def _read_reply(line: str) -> dict[str, Any]:
    """What the program's process answered, which may be anything: checked here, before it goes any further."""
    try:
        reply = json.loads(line)
        if isinstance(reply, dict) and isinstance(reply.get("raised"), str):
            return {"raised": reply["raised"][:100], "message": str(reply.get("message", ""))[:500]}
        if isinstance(reply, dict) and "value" in reply and isinstance(reply.get("args"), list):
            for item in (reply["value"], *reply["args"]):
                decode(item)
            return {"value": reply["value"], "args": reply["args"]}
    except (ValueError, RecursionError):
        pass
    return {"raised": "RuntimeError", "message": "the answer could not be read"}
