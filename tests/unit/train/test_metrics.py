"""The logger: screen, record, resume; and the tracker with no key, no network, a hanging host, and a dead service."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.config import Recipe, load_recipe
from rl.train import metrics as metrics_module
from rl.train.metrics import (
    MetricsLogger,
    Progress,
    WandbTracker,
    evaluation_line,
    format_number,
    headline,
    offline_reason,
    redact,
    write_line,
)
from rl.train.record import read_rows

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, list(overrides))


def test_record_screen_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, recipe("--logging.report_to=[]"), stage="grpo") as log:
        log.log_evaluation(0, {"eval/accuracy": 0.25}, [{"text": "a"}])
        for step in (1, 2, 3):
            log.log(step, {"reward": step / 4, "rollout/tokens_per_s": 5300.4, "kl": float("nan")})
            log.log_completions(step, [{"completion": "x", "reward": 1.0}, {"completion": "y", "reward": None}])
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "completions.jsonl", "evaluations.jsonl", "metrics.jsonl",
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "eval at step 0  accuracy 0.25"
    assert printed[1] == "grpo step     1  reward 0.25  kl nan  tokens/s 5,300"
    with MetricsLogger(tmp_path, recipe("--logging.report_to=[]"), stage="grpo", resume_step=2) as log:
        log.log(3, {"reward": 9.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("reward")) for row in rows] == [(0, None), (1, 0.25), (2, 0.5), (3, 9.0)]
    assert rows[1] == {"step": 1, "stage": "grpo", "reward": 0.25, "rollout/tokens_per_s": 5300.4, "kl": "nan"}
    assert [row["step"] for row in read_rows(tmp_path / "completions.jsonl")] == [1, 1, 2, 2]
    assert read_rows(tmp_path / "evaluations.jsonl") == [{"step": 0, "stage": "grpo", "text": "a"}]


def test_an_evaluation_that_is_made_again_is_recorded_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, recipe(), stage="grpo") as log:
        for step in (2, 4):
            log.log(step, {"reward": 0.5})
            log.log_evaluation(step, {"eval/accuracy": step / 8}, [{"text": "a"}, {"text": "b"}])
    with MetricsLogger(tmp_path, recipe(), stage="grpo", resume_step=4) as log:
        log.forget_evaluation(4)
        log.log_evaluation(4, {"eval/accuracy": 0.75}, [{"text": "c"}])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("reward"), row.get("eval/accuracy")) for row in rows] == [
        (2, 0.5, None), (2, None, 0.25), (4, 0.5, None), (4, None, 0.75),
    ]  # fmt: skip
    assert [row["text"] for row in read_rows(tmp_path / "evaluations.jsonl")] == ["a", "b", "c"]


def test_steps_that_are_not_shown_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, recipe("--logging.report_to=[]"), stage="grpo") as log:
        log._tracker = tracker = _Tracked()  # type: ignore[assignment]
        for step in (1, 2, 3):
            log.log(step, {"skipped_updates": step / 2}, shown=step == 2)
    assert [row["skipped_updates"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.5, 1.0, 1.5]
    assert capsys.readouterr().out == "grpo step     2\n" and tracker.steps == [2]


class _Tracked:
    """A tracker that remembers the steps it was told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, metrics: object) -> None:
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        assert not failed


def test_a_new_run_starts_an_empty_record(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLogger(tmp_path, recipe("--logging.report_to=[]"), stage="grpo") as log:
            log.log_evaluation(0, {"eval/accuracy": 0.5})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["metrics.jsonl"]  # nothing to say, no file


def test_other_ranks_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with MetricsLogger(tmp_path / "run", recipe("--logging.report_to=[wandb]"), stage="grpo") as log:
        log.log(1, {"reward": 1.0})
        log.log_completions(1, [{"completion": "x"}])
        log.log_evaluation(1, {"eval/accuracy": 1.0}, [{"text": "x"}])
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_lines() -> None:
    assert headline("sft", 12, {"loss": 0.12345, "grad_norm": None}) == "sft step    12  loss 0.1235"
    assert headline("grpo", 1, {"nothing/known": 1.0}) == "grpo step     1"
    values = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6, "time/eval_s": 3.0}
    assert evaluation_line(4, values) == "eval at step 4  accuracy 0.5 [0.400, 0.600]"
    values = {"eval/sampled_accuracy": 0.5, "eval/sampled_truncated_frac": 0.1, "eval/rewards/judge/calls": 3.0}
    for k in (1, 2, 4):
        values |= {f"eval/pass@{k}": k / 5, f"eval/pass@{k}_low": k / 10, f"eval/pass@{k}_high": 1.0}
    assert (
        evaluation_line(0, values) == "eval at step 0  sampled_accuracy 0.5 [0.100, 1.000]  pass@4 0.8 [0.400, 1.000]"
    )
    numbers = [0, 0.5, 1e-6, 12.3456, 12345.6, -0.25, float("inf"), float("nan"), 3]
    assert [format_number(n) for n in numbers] == [
        "0", "0.5", "1.0e-06", "12.35", "12,346", "-0.25", "inf", "nan", "3",
    ]  # fmt: skip


def test_model_text_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write_line("a\x1b[2Jb\rc\nδ\ttab\x00\udc80")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x0dc\nδ\ttab\\x00\\xdc80\n"


def test_progress_bar_is_silent_in_a_log_file_and_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for disable in (False, True):
        bar = Progress("GRPO", total=3, initial=1, disable=disable)
        bar.update(reward=0.5, accuracy=None)
        bar.write("hello")
        bar.close()
    captured = capsys.readouterr()
    assert captured.out == "hello\n" and captured.err == ""


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value-of-mine")
    config: dict[str, Any] = {
        "hub_token": "abc",
        "nested": [{"password": "x", "api_key": "y"}, {"wandb_api_key": "z", "secret": ""}],
        "eos_token": "</s>",
        "stop_token_ids": [1, 2],
        "micro_batch_tokens": 4096,
        "command": "curl -H hf_abcdefghijklmnopqrstuvwx",
        "path": "https://me:pw@host/data",
        "mine": "x=s3cr3t-value-of-mine",
        "rate": 1e-6,
        "none": None,
    }
    found = redact(config)
    text = str(found)
    for secret in ("'abc'", "'x'", "'y'", "'z'", "hf_abc", "me:pw", "s3cr3t"):
        assert secret not in text
    assert found["eos_token"] == "</s>" and found["stop_token_ids"] == [1, 2] and found["micro_batch_tokens"] == 4096
    assert found["path"] == "https://[redacted]@host/data" and found["rate"] == 1e-6 and found["none"] is None
    assert redact(recipe().model_dump(mode="json")) == recipe().model_dump(mode="json")


def test_offline_is_decided_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = time.monotonic()
    assert "no API key" in (offline_reason() or "")
    (tmp_path / "netrc").write_text("machine localhost login user password 0123456789\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")  # the discard port: nobody listens
    assert "does not answer" in (offline_reason() or "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert offline_reason() == "WANDB_MODE=offline"
    assert time.monotonic() - began < 20
    monkeypatch.delenv("WANDB_MODE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{server.getsockname()[1]}")
        assert offline_reason() is None


def test_without_a_key_the_tracker_writes_an_offline_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe("--logging.report_to=[wandb]")
    with MetricsLogger(tmp_path, wanted, stage="grpo") as log:
        log.log(1, {"reward": 1.0, "kl": float("nan")})
        log.log_completions(
            1, [{"completion": "x", "reward": 1.0, "why": {"a": 1}}, {"completion": "y", "reward": None}]
        )
    first = (tmp_path / "wandb_run_id").read_text()
    with MetricsLogger(tmp_path, wanted, stage="grpo", resume_step=1) as log:
        log.log(2, {"reward": 2.0})
    assert (tmp_path / "wandb_run_id").read_text() == first
    offline = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 2 and all(path.stem == f"run-{first.strip()}" for path in offline)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions*.json"))
    printed = capsys.readouterr().out
    assert "wandb runs offline (no API key" in printed and "could not" not in printed
    assert [row["reward"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


@pytest.fixture
def hanging_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    taken: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                taken.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield
    server.close()
    for connection in taken:
        connection.close()


def test_a_host_that_hangs_costs_seconds_and_then_it_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging_host: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_module, "_INIT_TIMEOUT_S", 2.0)
    began = time.monotonic()
    tracker = WandbTracker(tmp_path, project="p", name="n", config={}, new=True)
    tracker.log(1, {"reward": 1.0})
    tracker.close()
    assert time.monotonic() - began < 40
    assert tracker.offline and list((tmp_path / "wandb").glob("offline-run-*"))
    assert "wandb could not start: " in capsys.readouterr().out


def test_a_dead_tracker_is_left_out_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, recipe("--logging.report_to=[wandb]"), stage="grpo") as log:
        log.log(1, {"reward": 1.0})
        children = subprocess.run(
            ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
        )
        for line in children.stdout.splitlines():
            pid, name = line.split(maxsplit=1)
            if "wandb" in name:
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.5)
        log.log(2, {"reward": 2.0})
        log.log(3, {"reward": 3.0})
    assert [row["reward"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    assert capsys.readouterr().out.count("wandb could not log") == 1


def test_our_own_bugs_pass_through_and_those_of_wandb_do_not(tmp_path: Path) -> None:
    tracker = WandbTracker(tmp_path, project="p", name="n", config={}, new=True)
    with pytest.raises(ZeroDivisionError):
        tracker._guard(lambda: print(1 / 0), "log")
    tracker._guard(lambda: tracker._run.log("not a dict"), "log")  # wandb's own TypeError or the like
    assert tracker._run is None
    tracker.close()


@pytest.mark.parametrize("raised", ["RuntimeError('gone')", "AssertionError('Already torn down.')", "SystemExit(-9)"])
def test_a_service_that_cannot_even_be_ended_does_not_end_the_run(
    raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = WandbTracker(tmp_path, project="p", name="n", config={}, new=True)
    run = tracker._run
    inside: dict[str, Any] = {"__name__": "wandb.sdk.somewhere"}  # errors count as wandb's by where they are raised
    exec(f"def teardown(): raise {raised}\ndef log(): raise ConnectionResetError('the service died')", inside)
    with monkeypatch.context() as patched:
        patched.setattr("wandb.teardown", inside["teardown"])
        tracker._guard(inside["log"], "log")
    assert tracker._run is None
    printed = capsys.readouterr().out
    assert printed.count("wandb could not log: ConnectionResetError") == 1
    assert printed.count("wandb could not stop: ") == ("SystemExit" not in raised)
    tracker.log(1, {"reward": 1.0})
    tracker.close()
    run.finish()
