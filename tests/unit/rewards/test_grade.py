"""scripts/grade.py: verdicts, labels, and errors with row numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewards.grading import check_row, completion_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def grade() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grade_script", ROOT / "scripts" / "grade.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


ROWS: list[dict[str, Any]] = [
    {"id": "a", "task": "gsm8k", "gold": "42", "completion": "The answer is 42.", "expected": True},
    {"id": "b", "task": "math", "gold": "\\frac{1}{2}", "completion": "\\boxed{0.5}", "expected": True, "hard": True},
    {"id": "c", "task": "multiple_choice", "gold": "B", "completion": "B) 4", "options": ["3", "4"], "expected": True},
    {"id": "d", "task": "countdown", "gold": {"numbers": [1, 2], "target": 3}, "completion": "1 + 2", "expected": True},
    {"id": "e", "task": "gsm8k", "gold": "42", "completion_spec": [["no ", 3], ["41", 1]], "expected": False},
]


def test_verdicts(grade: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "verdicts.jsonl"
    assert grade.main([str(write(tmp_path / "cases.jsonl", ROWS)), "--out", str(out)]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [verdict["id"] for verdict in verdicts] == list("abcde")
    assert [verdict["correct"] for verdict in verdicts] == [True, True, True, True, False]
    assert all({"extracted", "rule", "seconds"} <= verdict.keys() for verdict in verdicts)
    assert "format_ok" not in verdicts[0]
    assert "all" in capsys.readouterr().out


def test_tagged(grade: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "task": "gsm8k", "gold": "42", "completion": "<think>x</think><answer>42</answer>"},
        {"id": 2, "task": "gsm8k", "gold": "42", "completion": "Hi <think>x</think><answer>42</answer>"},
        {"id": 3, "task": "gsm8k", "gold": "42", "completion": "\\boxed{42}"},
    ]
    out = tmp_path / "v.jsonl"
    assert grade.main([str(write(tmp_path / "c.jsonl", rows)), "--out", str(out), "--tagged"]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(verdict["correct"], verdict["format_ok"]) for verdict in verdicts] == [
        (True, True), (True, False), (False, False),
    ]  # fmt: skip


def test_bad_rows_are_listed_with_numbers(
    grade: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["", ROWS[0], "{", {**ROWS[0], "task": "maths"}, {"id": "x", "task": "gsm8k", "gold": "1"}]
    assert grade.main([str(write(tmp_path / "c.jsonl", bad)), "--out", str(tmp_path / "v.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "3 bad rows" in message
    for part in ("row 3:", "row 4: task: 'maths' is not allowed; one of gsm8k, math", "row 5: completion:"):
        assert part in message
    assert not (tmp_path / "v.jsonl").exists()


def test_rows_that_could_not_be_graded_are_told(
    grade: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROWS[0], {"id": "p", "task": "code", "gold": "{", "completion": "```python\nprint(1)\n```"}]
    assert grade.main([str(write(tmp_path / "c.jsonl", rows)), "--out", str(tmp_path / "v.jsonl")]) == 1
    assert "1 rows could not be graded; p: tests: not JSON" in capsys.readouterr().err


def test_missing_and_empty_files(grade: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grade.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 2
    assert grade.main([str(write(tmp_path / "empty.jsonl", [])), "--out", str(tmp_path / "v.jsonl")]) == 2
    assert "no rows" in capsys.readouterr().err
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"id": "caf\xe9"}\n')
    assert grade.main([str(tmp_path / "latin.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 2
    assert "latin.jsonl: 1 bad rows\n  row 2: " in capsys.readouterr().err


def test_the_cases_are_not_written_over(grade: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = write(tmp_path / "cases.jsonl", ROWS)
    before = cases.read_bytes()
    assert grade.main([str(cases), "--out", f"{tmp_path}/../{tmp_path.name}/cases.jsonl"]) == 2
    assert "which would be lost" in capsys.readouterr().err and cases.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "an object is needed"),
        ({"task": "math"}, "id: None"),
        ({"id": 1, "task": "math", "completion": ""}, "gold: missing"),
        ({"id": 1, "task": "math", "gold": [], "completion": ""}, "gold: \\[\\] is no answer"),
        ({"id": 1, "task": "math", "gold": "1", "completion_spec": [["a", "b"]]}, "completion_spec"),
        ({"id": 1, "task": "math", "gold": "1", "completion_spec": [["a" * 100, 10**7]]}, "more than"),
        ({"id": 1, "task": "countdown", "gold": 24, "completion": ""}, "numbers and target"),
    ],
)
def test_check_row(row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_row(row)


def test_completion_spec_is_written_out() -> None:
    assert completion_of({"completion_spec": [["ab", 2], ["c", 1]]}) == "ababc"
