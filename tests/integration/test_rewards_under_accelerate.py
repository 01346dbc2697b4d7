"""Rewards under `accelerate launch` with two ranks: gloo initialised, torch's threads running, bombs in every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hostile_cases import FILE, hostile_cases

REPOSITORY = Path(__file__).parents[2]
RANK = """
import json, sys, threading, time
from pathlib import Path

import torch
from accelerate import Accelerator

from rewards.pool import shared_pool
from rewards.scorer import RewardScorer
from rl.distributed import end_program
from tests.hostile_cases import faults, hostile_cases

accelerator = Accelerator(cpu=True)
torch.ones(64, 64) @ torch.ones(64, 64)  # starts torch's threads
torch.distributed.all_reduce(torch.ones(1))
scorer = RewardScorer(["format", "accuracy", {"func": "regex", "params": {"pattern": "(a+)+"}}])
answers = ["42", "41", "9^{9^{9^{9}}}", "a" * 60 + "b", "1/0", "\\\\boxed{" * 500 + "42" + "}" * 500]
texts = [f"<think>t</think><answer>{answer}</answer>" for answer in answers]

def score():
    rows = len(texts)
    return scorer.score(["p"] * rows, texts, [[0]] * rows, {"answer": ["42"] * rows}, [0] * rows)

started = time.monotonic()
first = score().by_function
results = []
thread = threading.Thread(target=lambda: results.append(score().by_function))
thread.start()
thread.join()
seconds = time.monotonic() - started
hostile = hostile_cases(Path(sys.argv[1])) if Path(sys.argv[1]).exists() else []
accelerator.wait_for_everyone()  # the files that hostile texts may make are gone for both
found = [fault for row in hostile for fault in faults(row)]
Path(f"rank{accelerator.process_index}.json").write_text(json.dumps({
    "rank": accelerator.process_index, "workers": shared_pool().workers,
    "same": results == [first], "seconds": seconds, "accuracy": first["accuracy"], "regex": first["regex"],
    "hostile": len(hostile), "faults": found,
}))
end_program()
"""


def test_two_ranks_score_alike_and_in_time(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    config = REPOSITORY / "recipes" / "accelerate_configs" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", str(script), str(FILE)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert [report["rank"] for report in reports] == [0, 1]
    for report in reports:
        assert report["accuracy"][:3] == [1.0, 0.0, 0.0] and report["regex"][3] == 0.0
        assert report["same"] and report["seconds"] < 20, report
        assert report["faults"] == [] and report["hostile"] == (len(hostile_cases()) if FILE.exists() else 0)
        assert report["workers"] == max(1, len(os.sched_getaffinity(0)) // 2)
    print(reports)
