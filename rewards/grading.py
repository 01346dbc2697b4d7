"""Offline grading: rows of completions in, verdicts out, with the same functions that score a training run.

In: rows with `id`, `task` (gsm8k, math, multiple_choice, countdown, code), `gold`, `completion` (text) or
`completion_spec` (a list of [text, times], joined), and `options` where they apply. Out: for each row `id`,
`correct`, `extracted`, `gold`, `rule`, `reason`, `seconds`, and with tagged=True also `format_ok`. scripts/grade.py
is the command line of this file.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rewards.base import Score
from rewards.countdown import read_gold, score_countdown
from rewards.math_answer import accuracy_reward, reference_answer
from rewards.multiple_choice import multiple_choice_reward
from rewards.tag_format import format_fault

Row = dict[str, Any]
_MAX_COMPLETION_CHARS = 50_000_000


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file, checked. ValueError lists what is wrong, with row numbers (from 1, blank lines
    count)."""
    rows: list[Row] = []
    faults: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                check_row(row)
                rows.append(row)
            except ValueError as error:
                faults.append(f"row {number}: {error}")
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path}: {len(faults)} bad rows\n  " + "\n  ".join(faults[:20]) + more)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def check_row(row: object) -> None:
    """ValueError naming the key, its value and what is allowed, when `row` cannot be graded."""
    if not isinstance(row, dict):
        raise ValueError(f"an object is needed, not {type(row).__name__}")
    if not isinstance(row.get("id"), (str, int)):
        raise ValueError(f"id: {row.get('id')!r} is not allowed; a text or a number is needed")
    if row.get("task") not in GRADERS:
        raise ValueError(f"task: {row.get('task')!r} is not allowed; one of {', '.join(GRADERS)}")
    if "gold" not in row or row["gold"] is None:
        raise ValueError("gold: missing")
    completion_of(row)
    if row["task"] in ("gsm8k", "math") and reference_answer(row["gold"]) is None:
        raise ValueError(f"gold: {row['gold']!r} is no answer; a text or a number is needed")
    if row["task"] == "countdown":
        score_countdown("", *read_gold(row["gold"]), True)


def completion_of(row: Mapping[str, Any]) -> str:
    """The completion: `completion` itself, or `completion_spec` written out. ValueError for neither or a malformed
    one."""
    text, spec = row.get("completion"), row.get("completion_spec")
    if isinstance(text, str):
        return text
    if text is not None or not isinstance(spec, list):
        raise ValueError("completion: a text is needed, or completion_spec: a list of [text, times]")
    pieces: list[str] = []
    for item in spec:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and type(item[1]) is int):
            raise ValueError(f"completion_spec: {item!r} is not allowed; [text, times] is needed")
        pieces.append(item[0] * item[1])
        if sum(map(len, pieces)) > _MAX_COMPLETION_CHARS:
            raise ValueError(f"completion_spec: more than {_MAX_COMPLETION_CHARS} characters")
    return "".join(pieces)


def _grade_math(row: Row, text: str, tagged: bool) -> Score:
    return accuracy_reward([], [text], answer=[row["gold"]], tagged=tagged)[0]


def _grade_choice(row: Row, text: str, tagged: bool) -> Score:
    return multiple_choice_reward([], [text], answer=[row["gold"]], options=[row.get("options")], tagged=tagged)[0]


def _grade_countdown(row: Row, text: str, tagged: bool) -> Score:
    return score_countdown(text, *read_gold(row["gold"]), tagged)


def _grade_code(row: Row, text: str, tagged: bool) -> Score:
    from rewards.code import code_reward  # only rows with programs need the sandbox

    return code_reward([], [text], tests=[row["gold"]], scoring="all", tagged=tagged)[0]


GRADERS: dict[str, Callable[[Row, str, bool], Score]] = {
    "gsm8k": _grade_math,
    "math": _grade_math,
    "multiple_choice": _grade_choice,
    "countdown": _grade_countdown,
    "code": _grade_code,
}


def grade_row(row: Row, *, tagged: bool) -> Row:
    """The verdict on one checked row.

    >>> grade_row({"id": 1, "task": "gsm8k", "gold": "42", "completion": "The answer is 42."}, tagged=False)["correct"]
    True
    """
    text = completion_of(row)
    started = time.perf_counter()
    fault = format_fault(text) if tagged else None
    score = GRADERS[row["task"]](row, text, tagged)
    seconds = time.perf_counter() - started
    verdict: Row = {"id": row["id"], "correct": score.value == 1.0, "extracted": score.extracted, "gold": score.gold}
    verdict |= {"rule": score.rule, "reason": score.reason, "seconds": round(seconds, 6)}
    if tagged:
        verdict |= {"format_ok": fault is None}
    return verdict


def grade_rows(rows: Iterable[Row], *, tagged: bool) -> Iterator[Row]:
    """Verdicts in the order of the rows."""
    for row in rows:
        yield grade_row(row, tagged=tagged)


def agreement(rows: Iterable[Row], verdicts: Iterable[Row]) -> list[str]:
    """Lines that compare the verdicts with the labels of the rows (`expected` or `correct`, and `format_ok`), by
    source and for rows marked `hard`; empty when there are no labels."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for row, verdict in zip(rows, verdicts, strict=True):
        label = row.get("expected", row.get("correct"))
        groups = [
            "all",
            *(["hard"] if row.get("hard") else []),
            str(row.get("source", row.get("category", row["task"]))),
        ]
        if isinstance(label, bool):
            total.update(groups)
            right.update(groups if verdict["correct"] == label else [])
        if isinstance(row.get("format_ok"), bool) and "format_ok" in verdict:
            total["format"] += 1
            right["format"] += verdict["format_ok"] == row["format_ok"]
    return [
        f"{name:20} {right[name]:6d} of {total[name]:6d}  {100 * right[name] / total[name]:6.2f} %" for name in total
    ]
