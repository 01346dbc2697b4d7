"""scripts/bench_rewards.py runs, on small sizes, and prints a JSON line for each figure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

# One after the other: a fork bomb of one test uses up the processes that another may have.
pytestmark = pytest.mark.xdist_group("sandbox")

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_rewards.py"


def test_all_figures_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_rewards_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.main(["--completions", "60", "--latex", "40", "--programs", "2"]) == 0
    lines = {line["bench"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines["gsm8k_style"]["completions"] == 60 and lines["gsm8k_style"]["right"] == 40  # every third is wrong
    assert lines["math_style"]["completions"] == 40 and lines["math_style"]["by_math_verify"] > 0
    assert all(lines[name][key] > 0 for name in ("gsm8k_style", "math_style") for key in ("seconds", "median_ms"))
    if "skipped" not in lines["code"]:
        assert lines["code"]["programs_per_s"] > 0 and lines["sandbox_start"]["median_s"] > 0
    (tmp_path / "gsm8k_train.jsonl").write_text("{")
    assert bench.main(["--data", str(tmp_path)]) == 2 and "--data" in capsys.readouterr().err
