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

from rewards.code_outputs import same_output, same_value
from rewards.code_tests import CallCase, Case, ScriptCase, StdinCase
from rewards.sandbox import RunResult, Sandbox, SandboxLimits
from rewards.sandbox_values import decode, encode
from rewards.shown import shown

_COMPILE_LIMIT_S = 5.0
_sandboxes: dict[tuple[str, SandboxLimits], Sandbox] = {}


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of wall time. case_s: one case, or one call of a test's code. program_s: all cases of a program."""

    case_s: float = 2.0
    program_s: float = 10.0
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)


def run_program(program: str, cases: Sequence[Case], limits: Limits, stop_at_failure: bool = False) -> dict[str, Any]:
    """How many cases passed, of how many; the first failure in words; whether time ran out.

    Raises SandboxUnavailable when this machine isolates nothing, and ValueError for a test that calls no program.
    """
    run = _ProgramRun(program, limits)
    passed, first_failure, timed_out = 0, "", False
    try:
        for index, case in enumerate(cases):
            failure = run.check(case)
            if failure == "":
                passed += 1
                continue
            timed_out = timed_out or failure.startswith("timeout")
            first_failure = first_failure or (failure if run.broken else f"case {index}: {failure}")
            if stop_at_failure or run.broken or failure is _OUT_OF_TIME:
                break
    finally:
        run.end()
    return {"passed": passed, "total": len(cases), "failure": first_failure, "timed_out": timed_out}


_OUT_OF_TIME = "timeout: the time for all cases together was used up"


def _warm_sandbox(role: str, limits: SandboxLimits) -> Sandbox:
    if (role, limits) not in _sandboxes:
        _sandboxes[role, limits] = Sandbox(limits)
    return _sandboxes[role, limits]


class _ProgramRun:
    """A program in its sandbox. Cases that read standard input each start it anew; function calls go to one started
    program, as they would in one test session, and to a fresh one after a call that broke it."""

    def __init__(self, program: str, limits: Limits) -> None:
        self._program = program
        self._limits = limits
        self._deadline = time.monotonic() + limits.program_s
        self._sandbox = _warm_sandbox("program", limits.sandbox)
        self._loaded = False
        self._open = False
        self.broken = False  # it does not even compile

    def check(self, case: Case) -> str:
        """Why the case failed; empty when it passed."""
        if self._left() <= 0:
            return _OUT_OF_TIME
        if not self._loaded:
            result = self._sandbox.load(self._program, limit_s=min(self._left(), _COMPILE_LIMIT_S))
            self._loaded = result.status == "ok"
            self.broken = not self._loaded
            if self.broken:
                return _told(result)
        if isinstance(case, StdinCase):
            result = self._sandbox.run(case.input, limit_s=self._left())
            self._loaded = self._sandbox.running  # a new sandbox knows nothing of the program
            if result.status != "ok":
                return _told(result)
            return "" if same_output(result.stdout, case.output) else f"wrong output: printed {result.stdout[:80]!r}"
        return self._check_call(case) if isinstance(case, CallCase) else self._check_test(case)

    def end(self) -> None:
        self._sandbox.clean()

    def _left(self) -> float:
        return min(self._limits.case_s, self._deadline - time.monotonic())

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """What the program answered, or why it did not."""
        if not self._open:
            result = self._sandbox.open_program(limit_s=self._left(), total_s=self._limits.program_s)
            self._open = result.status == "ok"
        if self._open:
            result = self._sandbox.send(json.dumps(request), limit_s=max(self._left(), 0.01))
            self._open = result.status == "ok"
        self._loaded = self._sandbox.running
        return (_read_reply(result.stdout), "") if self._open else ({}, _told(result))

    def _check_call(self, case: CallCase) -> str:
        keywords = {key: encode(item) for key, item in case.kwargs.items()}
        reply, failure = self._call(
            {"call": case.function, "args": [encode(item) for item in case.args], "kwargs": keywords}
        )
        if failure:
            return failure
        if "raised" in reply:
            return f"raised {reply['raised']}: {reply['message']}"
        value = decode(reply["value"])
        same = bool(value == case.output) if case.exact else same_value(value, case.output)
        same = same or (case.boxed and same_value(value, case.output[0]))
        return "" if same else f"wrong value: returned {shown(value)}"

    def _check_test(self, case: ScriptCase) -> str:
        """Carry calls from the test to the program and data back, until the test says how it went. ValueError for a
        test that says the same of every program, since it calls none."""
        test = _warm_sandbox("test", self._limits.sandbox)
        result = test.open_test(case.code, list(case.names), limit_s=self._left(), total_s=self._limits.program_s)
        called = False
        try:
            while result.status == "ok":
                message = json.loads(result.stdout)
                if "passed" in message:
                    if not called:
                        problem = f"never calls {' or '.join(case.names)}; {message['error']}".rstrip("; ")
                        raise ValueError(f"tests: {case.code.strip()[:80]!r} {problem}")
                    return "" if message["passed"] is True else str(message["error"])
                called = True
                if self._left() <= 0:
                    return _OUT_OF_TIME
                reply, failure = self._call(message)
                if failure:
                    return failure
                result = test.send(json.dumps(reply), limit_s=max(self._left(), 0.01))
            return f"the test itself: {_told(result)}"
        finally:
            test.clean()


def _told(result: RunResult) -> str:
    return f"{result.status}: {result.error}" if result.error else result.status


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
