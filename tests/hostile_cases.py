"""The hostile completions of the shared data, where that lies beside the repository, and what is wrong with a verdict.

Used by the unit tests, from every place that a trainer may call from, and by both ranks of the integration test. What
the rows say of language and repetition is tested with those rewards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewards.grading import grade_row
from rewards.math_answer import judge_pair
from rewards.sandbox import SandboxUnavailable, isolation_method
from tests.clock import pace

FILE = Path(__file__).parents[2] / "shared" / "data" / "adversarial_cases.jsonl"


def hostile_cases(file: Path = FILE) -> list[dict[str, Any]]:
    """All rows, but no programs where nothing isolates, since they are refused there. None of the files that they try
    to make is there, and verdicts of earlier calls are forgotten."""
    judge_pair.cache_clear()
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    try:
        isolation_method()
    except SandboxUnavailable:
        rows = [row for row in rows if row["task"] != "code"]
    for row in rows:
        if row.get("must_not_create"):
            Path(row["must_not_create"]).unlink(missing_ok=True)
    return rows


def faults(row: dict[str, Any]) -> list[str]:
    """Grade the row as a trainer would; what is wrong with the verdict."""
    verdict, limit = grade_row(row, tagged=True), row.get("max_seconds_code", row["max_seconds"])
    seconds = verdict["seconds"]
    for _ in range(2):  # a machine that was busy with something else is asked again, for the time alone
        if seconds <= limit:
            break
        judge_pair.cache_clear()
        seconds = min(seconds, grade_row(row, tagged=True)["seconds"])
    found = [
        f"{key} is {verdict[key]}, not {row[key]}"
        for key in ("correct", "format_ok")
        if row[key] is not None and verdict[key] != row[key]
    ]
    if verdict["rule"] == "error":
        found.append("not graded")
    if seconds > limit * pace():
        found.append(f"took {seconds:.1f} s")
    if row.get("must_not_create") and Path(row["must_not_create"]).exists():
        found.append(f"made {row['must_not_create']}")
    return [f"{row['id']}: {fault} ({verdict['reason']})" for fault in found]
