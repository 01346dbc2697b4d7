"""Rewards for programs: `code` runs the tests of a row, `code_format` looks at the form only.

In: completions, and the dataset column `tests` in one of the forms of `rewards.code_tests`. Out: `Score`s. The program
is taken from the answer block: its one fenced block marked python, py or nothing, else the whole block. It runs in a
sandbox (`rewards.sandbox`); on a machine where nothing isolates, RuntimeError says so and nothing is run.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

from rewards.base import Completion, Score, completion_text
from rewards.code_runner import Limits
from rewards.code_tests import Case, parse_tests
from rewards.pool import MEMORY_LIMIT_MB, Outcome, VerifierPool, shared_pool
from rewards.reward_entry import checked_by
from rewards.sandbox import SandboxLimits, SandboxUnavailable, isolation_method
from rewards.tag_format import answer_block, format_fault

_FENCE = "```"
_PYTHON = ("", "python", "py", "python3")
_START_ALLOWANCE_S = 30.0
_RUN = "rewards.code_runner:run_program"


def _check(**params: Any) -> None:
    if params.get("scoring", "fraction") not in ("fraction", "all"):
        raise ValueError(f"scoring: {params['scoring']!r} is not allowed; fraction or all")
    for key in ("time_limit_s", "program_limit_s"):
        if not params.get(key, 1.0) > 0:
            raise ValueError(f"{key}: {params[key]!r} is not allowed; more than 0")
    memory, most = params.get("memory_limit_mb", 512), MEMORY_LIMIT_MB / 2  # the worker's own limit holds for it, too
    if not 64 <= memory <= most:
        raise ValueError(f"memory_limit_mb: {memory!r} is not allowed; 64 to {most:g}")


@checked_by(_check, machine=isolation_method)
def code_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    tests: Sequence[Any],
    scoring: Literal["fraction", "all"] = "fraction",
    tagged: bool = True,
    time_limit_s: float = 2.0,
    program_limit_s: float = 10.0,
    memory_limit_mb: float = 512,
    pool: VerifierPool | None = None,
    **columns: Any,
) -> list[Score]:
    """passed / total of the row's tests ("fraction"), or 1 if all passed else 0 ("all"). Range [0, 1].

    tests: one entry per row; None where the row has no code task (None comes back). tagged: take the program from the
    answer block only; False: from the text after thinking. time_limit_s: per case, or per call where test code makes
    several; program_limit_s: all cases of a program. memory_limit_mb: address space of one process; all of a program
    together may hold twice that. A program finds Python's standard library and no other.

    Source: DeepSeek-R1 (2025), 2.2.2, which runs predefined test cases; the fraction is that of open-r1's code_reward.
    Tests that cannot be read are an error of that row, and so is a run that the machine killed twice. Raises
    RuntimeError where nothing isolates.

        completion "<think>t</think><answer>print(input())</answer>"
        tests      [{"input": "a", "output": "a"}, {"input": "b", "output": "c"}]     ->  0.5
    """
    sandbox = SandboxLimits(memory_bytes=int(memory_limit_mb * 2**20))
    limits = Limits(case_s=time_limit_s, program_s=program_limit_s, sandbox=sandbox)
    scores = [Score(None, "the row has no tests")] * len(completions)
    jobs: dict[int, tuple[str, list[Case], Limits, bool]] = {}
    for row, (completion, raw) in enumerate(zip(completions, tests, strict=True)):
        if raw is None:
            continue
        program, reason = extract_program(completion_text(completion), tagged=tagged)
        try:
            cases = parse_tests(raw)
        except ValueError as error:
            scores[row] = Score(None, str(error), rule="error")
            continue
        if program is None:
            scores[row] = Score(0.0, reason, rule="no program")
        else:
            jobs[row] = (program, cases, limits, scoring == "all")
    limit_s = program_limit_s + _START_ALLOWANCE_S
    outcomes = (pool or shared_pool()).map(_RUN, list(jobs.values()), time_limit_s=limit_s, tries=2)
    for (row, job), outcome in zip(jobs.items(), outcomes, strict=True):
        if outcome.error.startswith(f"{SandboxUnavailable.__name__}: "):
            raise RuntimeError(outcome.error)
        scores[row] = _score(job[0], outcome, scoring)
    return scores


def _score(program: str, outcome: Outcome, scoring: str) -> Score:
    if outcome.status in ("error", "broken"):  # a fault of ours or of the machine, never of the program, which is below
        return Score(None, outcome.error, extracted=program, rule="error")
    if outcome.status != "ok":  # the pool's own limits, which are there for the case that ours fail
        return Score(0.0, f"the run was killed: {outcome.error}", extracted=program, rule=outcome.status)
    result: dict[str, Any] = outcome.value
    passed, total = result["passed"], result["total"]
    value = passed / total if scoring == "fraction" else float(passed == total)
    reason = f"{passed} of {total} tests passed" + (f"; {result['failure']}" if result["failure"] else "")
    return Score(value, reason, extracted=program, rule="timeout" if result["timed_out"] else "tests")


def code_format_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Any] = (), **columns: Any
) -> list[Score]:
    """1 when the completion is well formed (see `format`) and its answer is one fenced Python block and nothing else,
    else 0. Range {0, 1}.

    Source: open-r1's code_format reward, which looks for the fence with a regular expression; here by parts.

    >>> answers = ["```python\\nprint(1)\\n```", "print(1)"]
    >>> texts = [f"<think>t</think><answer>{answer}</answer>" for answer in answers]
    >>> [score.value for score in code_format_reward([], texts)]
    [1.0, 0.0]
    """
    return [_score_form(completion_text(completion)) for completion in completions]


def _score_form(text: str) -> Score:
    fault = format_fault(text)
    if fault:
        return Score(0.0, fault, rule="format")
    content = answer_block(text).content or ""
    blocks = fenced_blocks(content)
    lines = content.strip().splitlines()
    if len(blocks) != 1 or not lines[0].startswith(_FENCE) or lines[-1].strip() != _FENCE:
        return Score(0.0, "the answer is not one fenced block", rule="code_format")
    if blocks[0][0] not in _PYTHON[1:]:
        return Score(0.0, f"the fence says {blocks[0][0]!r}, not python", rule="code_format")
    return Score(1.0, "one fenced Python block", rule="code_format")


def extract_program(text: str, *, tagged: bool) -> tuple[str | None, str]:
    """The program of a completion, or None and why there is none."""
    if tagged:
        block = answer_block(text)
        if block.content is None:
            return None, block.reason
        text = block.content
    else:
        text = text.rpartition("</think>")[2]
    programs = [body for language, body in fenced_blocks(text) if language in _PYTHON]
    if tagged and len(programs) > 1:
        return None, f"{len(programs)} programs in the answer"
    if programs:
        return programs[-1], ""
    if not tagged or _FENCE in text:
        return None, "no fenced Python block"
    return text, ""


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, body) of every closed block between lines that start with three backticks. A body that
    stands indented as a whole, as in a list, loses that."""
    blocks: list[tuple[str, str]] = []
    language: str | None = None
    body: list[str] = []
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if language is None and mark.startswith(_FENCE) and _FENCE not in mark[3:]:
            language, body = mark[3:].strip().lower(), []
        elif language is not None and mark == _FENCE:
            inner = "".join(body)
            blocks.append((language, textwrap.dedent(inner) if inner.lstrip("\n").startswith(" ") else inner))
            language = None
        elif language is not None:
            body.append(line)
    return blocks
