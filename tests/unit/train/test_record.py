"""The run's own record: torn lines, kill -9, cutting back, numbers that JSON does not know."""

import json
import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from rl.train.record import JsonLines, read_rows, to_json


def rows_of(*steps: int, stage: str = "grpo") -> list[dict[str, object]]:
    return [{"step": step, "stage": stage, "reward": step / 10} for step in steps]


def test_rows_come_back(tmp_path: Path) -> None:
    record = JsonLines(tmp_path / "run" / "metrics.jsonl")
    record.append(rows_of(1, 2))
    record.append(rows_of(3))
    assert read_rows(record.path) == rows_of(1, 2, 3)
    assert read_rows(tmp_path / "none.jsonl") == []
    record.close()


def test_truncate_after_cuts_the_stage_only_and_appending_goes_on(tmp_path: Path) -> None:
    record = JsonLines(tmp_path / "metrics.jsonl")
    record.append(rows_of(1, 2, 3, stage="sft") + rows_of(1, 2, 3))
    assert record.truncate_after(1, stage="grpo") == 2
    record.append(rows_of(2))
    assert read_rows(record.path) == rows_of(1, 2, 3, stage="sft") + rows_of(1, 2)
    assert record.truncate_after(5, stage="grpo") == 0
    record.close()


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 3, "sta', b"{", b'{"step": 3, "stage": "grpo", "reward": 0.3}', b"\xce", b'{"a": "' + b"x" * 200_000],
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    record = JsonLines(path)
    record.append(rows_of(1, 2))
    record.close()
    with open(path, "ab") as file:
        file.write(tail)
    assert read_rows(path) == rows_of(1, 2)
    again = JsonLines(path)
    again.append(rows_of(3))
    again.close()
    assert read_rows(path) == rows_of(1, 2, 3)


def test_a_record_is_opened_and_cut_back_without_being_held_in_memory(tmp_path: Path) -> None:
    record = JsonLines(tmp_path / "completions.jsonl")
    for step in range(200):
        record.append([{"step": step, "stage": "grpo", "completion": "x" * 50_000}])
    record.close()
    tracemalloc.start()
    again = JsonLines(record.path)
    assert again.truncate_after(150, stage="grpo") == 49
    again.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < record.path.stat().st_size / 10
    assert [row["step"] for row in read_rows(record.path)] == list(range(151))


def test_kill_9_keeps_every_row_that_append_returned_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ready, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        record = JsonLines(path)
        step = 0
        while True:
            step += 1
            record.append(rows_of(step))
            os.write(report, step.to_bytes(4, "big"))
    last = 0
    while last < 20:
        last = int.from_bytes(os.read(ready, 4), "big")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    steps = [row["step"] for row in read_rows(path)]
    assert len(steps) >= last and steps == list(range(1, len(steps) + 1))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        read_rows(path)


def test_to_json_writes_valid_json_for_anything(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "tensor": torch.tensor(0.5),
        "vector": torch.tensor([1.0, float("nan")]),
        "numpy": np.float32(0.25),
        "array": np.arange(3),
        "tuple": (1, None, True),
        "nested": {1: [np.int64(3)]},
        "path": Path("x"),
        "text": "δ",
    }
    expected = {
        "nan": "nan",
        "inf": "-inf",
        "tensor": 0.5,
        "vector": [1.0, "nan"],
        "numpy": 0.25,
        "array": [0, 1, 2],
        "tuple": [1, None, True],
        "nested": {"1": [3]},
        "path": "x",
        "text": "δ",
    }
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == expected
    record = JsonLines(tmp_path / "metrics.jsonl")
    record.append([{"step": 1, "stage": "grpo", **value}])
    record.close()
    assert float(read_rows(record.path)[0]["inf"]) == float("-inf")
