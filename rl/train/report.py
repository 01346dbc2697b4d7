"""What is left to look at when a run has ended: summary.json (its numbers) and curves.png (how it learned).

In: the run folder with its metrics.jsonl, the cold start's subfolder when the run has one, and the evaluations before
and after GRPO. The picture has reward, accuracy, completion length and entropy over GRPO steps; the cold start is the
shaded strip on the left, drawn at a fixed width whatever its number of steps, since it has often ten times as many.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rl.config import Recipe
from rl.train.checkpoint import save_json
from rl.train.metrics import COMPLETIONS_FILE, METRICS_FILE
from rl.train.record import read_rows, to_json

SUMMARY_FILE = "summary.json"
CURVES_FILE = "curves.png"
PACKAGES = ("aha-rl", "torch", "transformers", "accelerate", "deepspeed", "datasets")
_STRIP = 0.3  # width of the cold start beside that of GRPO


@dataclass(frozen=True, slots=True)
class Curve:
    """metric: what is drawn. dots: as single points, with the interval `<interval>_low`, `<interval>_high` if there is
    one; interval: `metric`, if not given."""

    metric: str
    label: str
    color: str
    dots: bool = False
    interval: str | None = None


PANELS: tuple[tuple[str, tuple[Curve, ...]], ...] = (
    ("reward (training)", (Curve("reward", "reward", "tab:blue"),)),
    (
        "accuracy",
        (
            Curve("accuracy", "training, sampled", "tab:blue"),
            # pass@1 is the sampled accuracy, by definition
            Curve("eval/sampled_accuracy", "held out, sampled", "tab:orange", dots=True, interval="eval/pass@1"),
            Curve("eval/accuracy", "held out, greedy", "tab:green", dots=True),
        ),
    ),
    (
        "completion length (tokens)",
        (
            Curve("completions/mean_length", "training, sampled", "tab:blue"),
            Curve("eval/sampled_mean_length", "held out, sampled", "tab:orange", dots=True),
            Curve("eval/greedy_mean_length", "held out, greedy", "tab:green", dots=True),
        ),
    ),
    ("entropy (nats per token)", (Curve("entropy", "entropy", "tab:blue"),)),
)


def write_run_report(
    folder: Path,
    recipe: Recipe,
    *,
    first: Mapping[str, float] | None,
    last: Mapping[str, float] | None,
    train_seconds: float,
    dropped: Mapping[str, int],
    cold_start: str = "cold_start",
) -> dict[str, Any]:
    """Write summary.json and curves.png into the run folder; call on one rank. Returns the summary.

    first, last: metrics of the evaluations before the first GRPO step (after a cold start, if there was one) and after
    the last; None where there was none. train_seconds: of GRPO, evaluations included. dropped: how many rows were left
    out, by name; the cold start's are read from its summary.
    """
    grpo = read_rows(folder / METRICS_FILE)
    sft = read_rows(folder / cold_start / METRICS_FILE)
    before = _cold_start_summary(folder / cold_start / SUMMARY_FILE)
    summary = summarize_run(
        grpo,
        seed=recipe.seed,
        first=first,
        last=last,
        grpo_seconds=train_seconds,
        cold_start_seconds=before.get("train_seconds"),
    )
    summary |= {"name": recipe.name, **dropped}
    summary |= {name: count for name, count in before.items() if name.startswith("overlong_")}
    save_json(folder / SUMMARY_FILE, to_json(summary))
    draw_curves(grpo, folder / CURVES_FILE, cold_start=sft, title=f"{recipe.name}, seed {recipe.seed}")
    return summary


def summarize_run(
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    first: Mapping[str, float] | None,
    last: Mapping[str, float] | None,
    grpo_seconds: float,
    cold_start_seconds: float | None = None,
) -> dict[str, Any]:
    """The numbers of a run. Accuracies are of held-out problems: sampled where samples were drawn, else greedy; the
    greedy ones also under `..._greedy`. `cold_start_...`: before GRPO. Lengths: mean tokens of these completions. What
    is not known is None. `tokens_per_s`: sampled tokens per second of sampling, over the steps in `rows`."""
    steps = [row for row in rows if "reward" in row]
    rollout_s = sum(float(row.get("time/rollout_s", 0.0)) for row in steps)
    tokens = sum(float(row.get("num_tokens", 0.0)) for row in steps)
    before, after = _held_out(first), _held_out(last)
    return {
        **{f"cold_start_{name}": value for name, value in before.items()},
        **{f"final_{name}": value for name, value in after.items()},
        "train_seconds": grpo_seconds + (cold_start_seconds or 0.0),
        "cold_start_seconds": cold_start_seconds,
        "grpo_seconds": grpo_seconds,
        "tokens_per_s": tokens / rollout_s if rollout_s > 0 else None,
        "grpo_steps": max((int(row["step"]) for row in steps), default=0),
        "seed": seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers; those installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    cold_start: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> None:
    """Draw the panels from the rows of metrics.jsonl (GRPO) and of the cold start's; panels without numbers say so."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True).flatten()
    last = max((float(row["step"]) for row in rows), default=1.0) or 1.0
    sft_last = max((float(row["step"]) for row in cold_start), default=0.0)
    squeezed = [{**row, "step": (float(row["step"]) / sft_last - 1) * _STRIP * last} for row in cold_start if sft_last]
    for axis, (name, curves) in zip(axes, PANELS, strict=True):
        drawn = [_draw(axis, curve, [*squeezed, *rows]) for curve in curves]
        axis.set_title(name, fontsize=11)
        axis.grid(alpha=0.3)
        if not any(drawn):
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="gray")
        elif sum(drawn) > 1:
            axis.legend(fontsize=8)
        if name == "accuracy":
            axis.set_ylim(-0.03, 1.03)
        if squeezed:
            _mark_cold_start(axis, last, int(sft_last))
    for axis in axes[2:]:
        axis.set_xlabel("GRPO step")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw(axis: Axes, curve: Curve, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Draw one curve, False if it has no finite number. The cold start and GRPO are not joined by a line."""
    points = [(float(row["step"]), float(row[curve.metric]), row) for row in rows if row.get(curve.metric) is not None]
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return False
    if curve.dots:
        label: str | None = curve.label
        for x, y, row in points:
            interval = curve.interval or curve.metric
            low, high = float(row.get(f"{interval}_low", y)), float(row.get(f"{interval}_high", y))
            errors = [[max(0.0, y - low)], [max(0.0, high - y)]]
            axis.errorbar([x], [y], yerr=errors, fmt="o", ms=4, capsize=2, color=curve.color, label=label)
            label = None
        return True
    for part, label in (([p for p in points if p[0] <= 0], None), ([p for p in points if p[0] > 0], curve.label)):
        if part:
            marker = "o" if len(part) == 1 else ""  # a line through one point would not be seen
            xs, ys = [p[0] for p in part], [p[1] for p in part]
            axis.plot(xs, ys, color=curve.color, lw=1.4, marker=marker, ms=4, label=label)
    return True


def _mark_cold_start(axis: Axes, last: float, steps: int) -> None:
    axis.axvspan(-_STRIP * last, 0, color="gray", alpha=0.12, lw=0)
    axis.axvline(0, color="gray", lw=0.8)
    axis.set_xlim(-_STRIP * last, last * 1.02)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= last])
    axis.text(
        -_STRIP * last / 2, 0.97, f"cold start\n{steps} steps", transform=axis.get_xaxis_transform(), ha="center",
        va="top", fontsize=8, color="dimgray",
    )  # fmt: skip


def _held_out(metrics: Mapping[str, float] | None) -> dict[str, float | None]:
    found = metrics or {}
    greedy, sampled = found.get("eval/accuracy"), found.get("eval/sampled_accuracy")
    length = found.get("eval/sampled_mean_length", found.get("eval/greedy_mean_length"))
    return {
        "accuracy": greedy if sampled is None else sampled,
        "accuracy_greedy": greedy,
        "mean_length": length,
        "truncated_frac": found.get("eval/sampled_truncated_frac", found.get("eval/greedy_truncated_frac")),
    }


def _cold_start_summary(path: Path) -> dict[str, Any]:
    """What the cold start left; {} where there was none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def closing_text(summary: Mapping[str, Any], folder: Path) -> str:
    """What a run says last: held-out accuracy and length before and after, time, and where to look; only what the run
    measured and wrote."""
    lines = ["", f"Run {summary['name']}, seed {summary['seed']}: {summary['train_seconds']:.0f} s of training"]
    before, after = "before GRPO", "after GRPO"
    for label, prefix in ((before, "cold_start"), (after, "final")):
        accuracy, length = summary[f"{prefix}_accuracy"], summary[f"{prefix}_mean_length"]
        if accuracy is not None:
            greedy = summary[f"{prefix}_accuracy_greedy"]
            also = "" if greedy is None or greedy == accuracy else f" ({greedy:.1%} greedy)"
            lines.append(f"  held-out accuracy {label:<12} {accuracy:>6.1%}{also}, {length:.1f} tokens a completion")
    lines.append(f"  everything is in  {folder}")
    for label, name, note in (
        ("the curves", CURVES_FILE, ""),
        ("what it says", COMPLETIONS_FILE, ""),
        ("the policy", "policy", " (opens with transformers)"),
    ):
        if (folder / name).exists():
            lines.append(f"  {label:<16}  {folder / name}{note}")
    return "\n".join(lines)
