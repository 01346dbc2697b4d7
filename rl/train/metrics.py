"""What a run tells: a line on the screen, its own record in the run folder, and wandb. Only rank 0 tells anything.

    <folder>/metrics.jsonl       every step and every evaluation: {"step": 3, "stage": "grpo", "reward": 0.25, ...}
    <folder>/completions.jsonl   what was asked, answered and scored
    <folder>/evaluations.jsonl   the answers of every evaluation
    <folder>/wandb/              the tracker's files, when `logging.report_to` names it

The record is the truth; the tracker is a guest. It never stops or stalls the run: without a key or a network it works
offline (decided before it is started; its own attempt takes 20 s and then raises), and if it fails later it is left out
with a warning. On resume the record is cut back to the resumed step, and the tracker goes on with the same run id.

This is the only file that imports wandb.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies

from tqdm import tqdm

from rl.config import Recipe
from rl.distributed import is_main_process
from rl.train.record import JsonLines, to_json

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
RUN_ID_FILE = "wandb_run_id"
_TABLE_ROWS = 64  # completions per step in the tracker; the record has all
_PROBE_S = 3.0
_INIT_TIMEOUT_S = 12.0

_PASS_AT = re.compile(r"eval/pass@\d+")
# label on the screen: metric, first that is there
_HEADLINE: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "reward": ("reward",),
    "accuracy": ("accuracy",),
    "length": ("completions/mean_length",),
    "entropy": ("entropy",),
    "kl": ("kl",),
    "mismatch_kl": ("mismatch_kl",),
    "grad_norm": ("grad_norm",),
    "tokens/s": ("rollout/tokens_per_s",),
    "step_s": ("time/step_s",),
}


class MetricsLogger:
    """Metrics of one stage ("sft", "grpo") of a run; a context manager, constructed on every rank.

    resume_step: steps done when this process starts, 0 for a new run; what the record says of later steps of the stage
    is removed.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, stage: str, resume_step: int = 0) -> None:
        self.stage = stage
        self._folder = folder
        self._records: dict[str, JsonLines] = {}
        self._tracker: WandbTracker | None = None
        self._tells = is_main_process()
        if not self._tells:
            return
        for name in (METRICS_FILE, COMPLETIONS_FILE, EVALUATIONS_FILE):
            if (folder / name).exists():
                self._record(name).truncate_after(resume_step if resume_step > 0 else -1, stage=stage)
        if "wandb" in recipe.logging.report_to:
            self._tracker = WandbTracker(
                folder,
                project=recipe.logging.project,
                name=f"{recipe.logging.run_name or recipe.name}-{stage}",
                config=recipe.model_dump(mode="json"),
                new=resume_step == 0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def log(self, step: int, metrics: Mapping[str, Any], *, shown: bool = True) -> None:
        """Numbers after `step` steps: to the record and, if they are to be shown, to the screen and the tracker."""
        self._write(METRICS_FILE, step, [metrics])
        if shown and self._tells:
            write_line(headline(self.stage, step, metrics))
        if shown and self._tracker:
            self._tracker.log(step, metrics)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """What was sampled in the step, one mapping a completion (all with the same keys)."""
        self._write(COMPLETIONS_FILE, step, rows)
        if self._tracker:
            self._tracker.log_table(step, "completions", rows)

    def log_evaluation(self, step: int, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Numbers of an evaluation after `step` steps, and the answers behind them."""
        self._write(METRICS_FILE, step, [metrics])
        self._write(EVALUATIONS_FILE, step, rows)
        if self._tells:
            write_line(evaluation_line(step, metrics))
        if self._tracker:
            self._tracker.log(step, metrics)
            self._tracker.log_table(step, "eval/completions", rows)

    def forget_evaluation(self, step: int) -> None:
        """Take the evaluation of a step, of a run that ended in it or after it, out of the record: it is made again."""
        if not self._tells:
            return

        def of_step(row: Mapping[str, Any]) -> bool:
            return row.get("stage") == self.stage and row["step"] == step

        self._record(EVALUATIONS_FILE).remove(of_step)
        self._record(METRICS_FILE).remove(lambda row: of_step(row) and any(name.startswith("eval/") for name in row))

    def close(self, *, failed: bool = False) -> None:
        """End the records and the tracker's run. Called by the context manager."""
        for record in self._records.values():
            record.close()
        if self._tracker:
            self._tracker.close(failed=failed)
            self._tracker = None

    def _write(self, file: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._tells and rows:
            self._record(file).append({"step": step, "stage": self.stage, **row} for row in rows)

    def _record(self, file: str) -> JsonLines:
        if file not in self._records:
            self._records[file] = JsonLines(self._folder / file)
        return self._records[file]


class Progress:
    """A progress bar on a terminal (nothing in a log file), with a few numbers behind it."""

    def __init__(self, name: str, *, total: int, initial: int = 0, disable: bool = False) -> None:
        # None: only when the stream is a terminal
        self._bar = tqdm(
            desc=name, total=total, initial=initial, unit="step", dynamic_ncols=True, disable=True if disable else None
        )
        self._silent = disable

    def update(self, **numbers: float | None) -> None:
        """One step further. Numbers that are None are left out."""
        shown = {name: format_number(value) for name, value in numbers.items() if value is not None}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def write(self, text: str) -> None:
        """Print above the bar."""
        if not self._silent:
            write_line(text)

    def close(self) -> None:
        self._bar.close()


def headline(stage: str, step: int, metrics: Mapping[str, Any]) -> str:
    """The line of a step: its main numbers, those that are there."""
    parts = [f"{stage} step {step:>5}"]
    for label, names in _HEADLINE.items():
        value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
        if value is not None:
            parts.append(f"{label} {format_number(value)}")
    return "  ".join(parts)


def evaluation_line(step: int, metrics: Mapping[str, Any]) -> str:
    """The line of an evaluation: its main numbers, each with its interval where `<name>_low` and `<name>_high` are
    given.

    Left to the record: shares, times, what reward functions count, and pass@k but for the largest k (pass@1 is the
    sampled accuracy and lends its interval)."""
    largest = max((int(name.split("@")[1]) for name in metrics if _PASS_AT.fullmatch(name)), default=1)
    parts = [f"eval at step {step}"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high", "_s", "_frac")) or name.startswith("eval/rewards/"):
            continue
        if _PASS_AT.fullmatch(name) and (largest == 1 or name != f"eval/pass@{largest}"):
            continue
        bounds = "eval/pass@1" if name == "eval/sampled_accuracy" else name
        low, high = metrics.get(f"{bounds}_low"), metrics.get(f"{bounds}_high")
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{name.removeprefix('eval/')} {format_number(value)}{interval}")
    return "  ".join(parts)


def format_number(value: Any) -> str:
    """Four digits that mean something: 0.1234, 12.34, 12,345, 1.2e-06."""
    number = float(value)
    if number != number or abs(number) == float("inf"):
        return str(number)
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}" if abs(number) >= 1e-3 or number == 0 else f"{number:.1e}"


def write_line(text: str) -> None:
    """Print without tearing a progress bar. Model text may hold anything: control characters are shown, not obeyed."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(safe.encode(encoding, errors="backslashreplace").decode(encoding))
    sys.stdout.flush()


class WandbTracker:
    """One wandb run. new: start another run; else go on with the one whose id the folder holds.

    Nothing here raises for what wandb, the network or the disk may do: a warning, and the tracker is out.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], new: bool) -> None:
        self._run: Any = None
        id_file = folder / RUN_ID_FILE
        known = id_file.read_text().strip() if id_file.exists() and not new else ""
        self.run_id = known or secrets.token_hex(4)
        id_file.write_text(self.run_id + "\n")
        reason = offline_reason()
        self.offline = reason is not None
        if reason is not None and os.environ.get("WANDB_MODE") is None:
            write_line(
                f"[aha] wandb runs offline ({reason}); upload later with `wandb sync {folder / 'wandb'}/offline-run-*`"
            )
        options = {"project": project, "name": name, "dir": str(folder), "config": redact(config)}
        self._guard(lambda: self._start(options), "start")
        if self._run is None and not self.offline:
            self.offline = True
            self._guard(self._stop_service, "stop")
            self._guard(lambda: self._start(options), "start offline")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one point; the x axis of every chart is `step`, so a resumed run continues where its record does."""
        numbers = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        self._guard(lambda: self._run.log({"step": step, **numbers}), "log")

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table of the first rows."""
        if rows:
            self._guard(lambda: self._log_table(step, name, rows), "log a table")

    def close(self, *, failed: bool = False) -> None:
        """End the run, successfully or not."""
        self._guard(lambda: self._run.finish(exit_code=int(failed)), "finish")
        self._run = None

    def _start(self, options: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=_INIT_TIMEOUT_S, login_timeout=_INIT_TIMEOUT_S, finish_timeout=60.0
        )
        mode = "offline" if self.offline else "online"
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        # "resume" means nothing offline, where wandb would warn; the id alone joins the pieces when they are synced
        resume = None if self.offline else "allow"
        run = wandb.init(**options, id=self.run_id, mode=mode, resume=resume, settings=settings)  # type: ignore[arg-type]
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run = run

    def _stop_service(self) -> None:
        """End wandb's service process: after a failed start it still holds the run id."""
        import wandb

        with suppress(SystemExit):  # it ends the program with the code of a service that was killed
            wandb.teardown()

    def _log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns = list(rows[0])
        data = [[_cell(row.get(column)) for column in columns] for row in rows[:_TABLE_ROWS]]
        table = wandb.Table(columns=["step", *columns], data=[[step, *cells] for cells in data], allow_mixed_types=True)
        self._run.log({"step": step, name: table})

    def _guard(self, action: Callable[[], None], what: str) -> None:
        """Run one call into wandb. What is raised inside wandb ends the tracking; a bug of ours passes through."""
        if self._run is None and not what.startswith(("start", "stop")):
            return
        try:
            action()
        except Exception as error:
            if not isinstance(error, ImportError) and not _raised_in_wandb(error):
                raise
            self._run = None
            write_line(
                f"[aha] wandb could not {what}: {type(error).__name__}: {error}; the record in the run folder goes on"
            )
            if isinstance(error, ConnectionError) and what != "stop":
                self._guard(self._stop_service, "stop")  # its service died: forget it, or its exit hook fails too


def offline_reason() -> str | None:
    """Why wandb has to work offline, or None when it can go online. Takes at most a few seconds."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}"
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    address = urlsplit(url)
    host = address.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _netrc_has(host):
        return f"no API key for {host}: set WANDB_API_KEY or run `wandb login`"
    if getproxies():
        return None  # only the proxy can say whether the host answers
    try:
        socket.create_connection((host, address.port or (443 if address.scheme == "https" else 80)), _PROBE_S).close()
    except OSError as error:
        return f"{host} does not answer: {error}"
    return None


_SECRET_KEY = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|authorization|api_?key|access_?key|private_?key)$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|\b[0-9a-f]{40}\b"
    r"|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)
_HARMLESS_KEY = re.compile(r"(^|_)(pad|eos|bos|unk|stop|mask|sep|cls)_token$", re.IGNORECASE)
REDACTED = "[redacted]"


def redact(value: Any, *, key: str = "") -> Any:
    """The configuration without secrets: by the name of the key, by the look of the value, and values of secret
    variables.

    >>> redact({"hub_token": "abc", "micro_batch_tokens": 4096, "eos_token": "</s>", "path": "https://me:pw@host/x"})
    {'hub_token': '[redacted]', 'micro_batch_tokens': 4096, 'eos_token': '</s>', 'path': 'https://[redacted]@host/x'}
    """
    if isinstance(value, Mapping):
        return {str(name): redact(entry, key=str(name)) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(entry, key=key) for entry in value]
    if _SECRET_KEY.search(key) and not _HARMLESS_KEY.search(key) and isinstance(value, (str, bytes)) and value:
        return REDACTED
    if isinstance(value, str):
        for secret in _environment_secrets():
            value = value.replace(secret, REDACTED)
        return _SECRET_VALUE.sub(REDACTED, value)
    return value


def _environment_secrets() -> list[str]:
    return [value for name, value in os.environ.items() if _SECRET_KEY.search(name) and len(value) >= 8]


def _netrc_has(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _raised_in_wandb(error: Exception) -> bool:
    """By the frames: its errors are of many classes, some private, some Python's own."""
    frame = error.__traceback__
    while frame is not None:
        if str(frame.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "wandb":
            return True
        frame = frame.tb_next
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _cell(value: Any) -> Any:
    """What a table may hold: numbers and text; anything else as JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(to_json(value), ensure_ascii=False)
