"""Tries reward functions out before they cost GPU time: on texts written to cheat, and on the dataset's own answers.

In: reward functions as a recipe names them, and sample rows. Out: `Report`s, one per function, which
`scripts/lint_rewards.py` prints: what each kind of trick scored, time, determinism, output range, columns, and rows
whose own answer is not worth full marks.

What a function looks at is found by trying: if a wrong answer scores less than the right one, it looks at the answer,
and a text that hides or hedges its answer must not reach the honest score; likewise for the format.
"""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.base import Score
from rewards.column_check import condition_text, missing_columns
from rewards.math_answer import reference_answer
from rewards.reward_entry import RewardEntry
from rewards.scorer import RewardScorer, ScoredBatch

CORPUS = Path(__file__).with_name("data") / "hostile.jsonl"
SLOW_S, TOO_SLOW_S = 1.0, 10.0
_SHOWN_ROWS = 5
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to score tricks on: its columns, a right answer and a wrong one."""

    columns: dict[str, Any]
    gold: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Trick:
    """breaks: what is dishonest about it, "answer" and/or "format"; nothing for the honest controls."""

    kind: str
    name: str
    text: str
    breaks: tuple[str, ...]


@dataclass(slots=True)
class KindLine:
    """One line of the table: all tricks of a kind. paid: tricks that earned the honest score and should not have."""

    kind: str
    count: int
    low: float | None
    high: float | None
    slowest_s: float
    paid: list[str]
    errors: list[str]


@dataclass(slots=True)
class Report:
    """What was found out about one function. problems: what should be mended before training; notes: good to know.
    rules: which of its rules decided about the dataset's own answers."""

    name: str
    lines: list[KindLine] = field(default_factory=list)
    looks_at: list[str] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    gold_checked: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_corpus(gold: str, wrong: str) -> list[Trick]:
    """The hostile texts with these answers in their places."""
    tricks = []
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "kind" in row:
            text = row["text"] if "text" in row else "".join(piece * times for piece, times in row["spec"])
            text = text.replace("{gold}", gold).replace("{wrong}", wrong)
            tricks.append(Trick(row["kind"], row["trick"], text, tuple(row["breaks"])))
    return tricks


def default_sample(function_name: str) -> Sample:
    """A row that suits the function where no data is given."""
    samples = [row for row in map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines()) if "sample" in row]
    chosen = next((row for row in samples if row["sample"] == function_name), samples[0])
    return Sample(chosen["columns"], chosen["gold"], chosen["wrong"])


def lint_function(
    setting: str | Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = (), *, task_column: str | None = None
) -> Report:
    """Try one function of a recipe out. rows: sample rows of the dataset, with the columns as the function will get
    them; those that `when` or the recipe's task column keep from it are left out.

    Raises ValueError when the setting itself is wrong.
    """
    scorer = RewardScorer([setting], on_error="mask")
    (entry,) = scorer.entries
    report = Report(entry.name)
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if _applies(entry, row, task_column)]
    if rows and len(numbered) < len(rows):
        told = report.notes if numbered else report.problems
        told.append(f"applies to {len(numbered)} of {len(rows)} rows ({condition_text(entry, task_column)})")
    sample = _sample(entry, [row for _, row in numbered] or rows)
    if _check_columns(entry, sample.columns, report, from_data=bool(rows)) and (numbered or not rows):
        _try_tricks(scorer, sample, report)
        if numbered:
            _check_golds(scorer, entry, numbered, report)
    scorer.close()
    return report


def _applies(entry: RewardEntry, row: Mapping[str, Any], task_column: str | None) -> bool:
    task = [entry.name] if task_column is None else row.get(task_column)
    return entry.holds_for(row) and entry.name in ([task] if isinstance(task, str) else task or ())


def _sample(entry: RewardEntry, rows: Sequence[Mapping[str, Any]]) -> Sample:
    suited = default_sample(entry.path.rpartition(":")[2].removesuffix("_reward"))
    for row in rows:
        gold = gold_text(entry, row)
        if gold is not None:
            wrong = suited.wrong if suited.wrong != gold else f"not {gold}"
            return Sample(dict(row), gold, wrong)
    if rows:
        return Sample(dict(rows[0]), suited.gold, suited.wrong)
    condition = {} if entry.when is None else {entry.when.column: entry.when.values[0]}
    return Sample(suited.columns | condition, suited.gold, suited.wrong)


def gold_text(entry: RewardEntry, row: Mapping[str, Any]) -> str | None:
    """What a policy that knows the answer would write between the answer tags; None when the row does not tell."""
    default = entry.named_arguments.get("gold_column")
    column = entry.params.get("gold_column", default.default if default is not None else "answer")
    if not isinstance(column, str) or (column in entry.columns.values() and column not in row):
        return None
    return reference_answer(row.get(column))


def _check_columns(entry: RewardEntry, columns: Mapping[str, Any], report: Report, *, from_data: bool) -> bool:
    """Whether the function has the columns that it needs."""
    where = "the dataset" if from_data else "the built-in sample row (give --data)"
    missing = missing_columns(entry, columns)
    report.problems += [f"{where}: {problem}" for problem in missing]
    if from_data and not missing:
        _note_near_misses(entry, columns, report)
    return not missing


def _note_near_misses(entry: RewardEntry, columns: Mapping[str, Any], report: Report) -> None:
    """An optional argument that nearly has a column's name may be meant for it."""
    for key in entry.column_arguments:
        if key in columns or key in entry.columns:
            continue
        near = difflib.get_close_matches(
            key, [column for column in columns if column not in entry.named_arguments], 1, 0.8
        )
        if near:
            report.notes.append(f"argument {key!r} keeps its default; the dataset has a column {near[0]!r}")


def _score(scorer: RewardScorer, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> ScoredBatch:
    """Score texts, each with its row and a group of its own, all in one call. A token is taken for four characters."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    prompts = [str(row.get("prompt", row.get("question", ""))) for row in rows]
    ids = [range(len(text) // 4 + 1) for text in texts]
    return scorer.score(prompts, texts, ids, columns, range(len(texts)))


def _try_tricks(scorer: RewardScorer, sample: Sample, report: Report) -> None:
    tricks = read_corpus(sample.gold, sample.wrong)
    values: list[float | None] = []
    seconds: list[float] = []
    errors: list[str] = []
    for trick in tricks:
        started = time.monotonic()
        batch = _score(scorer, [trick.text], [sample.columns])
        seconds.append(time.monotonic() - started)
        values.append(batch.by_function[report.name][0])
        failed = batch.statuses[report.name][0] in ("error", "timeout") and values[-1] is None
        errors.append(batch.scores[report.name][0].reason if failed else "")
    given = [value for value in values if value is not None]
    report.low, report.high = min(given, default=None), max(given, default=None)
    if not given:
        told = report.notes if scorer.entries[0].wants_groups else report.problems  # it may need more than one text
        told.append("gives no value for any text (None: does not apply): nothing about it was tried")
    by_name = {trick.name: value for trick, value in zip(tricks, values, strict=True)}
    honest = by_name["right, well formed"]
    for aspect, control in (("answer", "wrong, well formed"), ("format", "right, without tags")):
        if not report.looks_at and _less(by_name[control], honest):
            report.looks_at.append(aspect)
    if "answer" in scorer.entries[0].named_arguments and "answer" not in report.looks_at:
        report.problems.append(
            f"takes the reference answer, but {sample.gold[:40]!r} scores {_told(honest)} and {sample.wrong[:40]!r} "
            f"scores {_told(by_name['wrong, well formed'])}; is the column what the function expects?"
        )
    for kind in dict.fromkeys(trick.kind for trick in tricks):
        chosen = [index for index, trick in enumerate(tricks) if trick.kind == kind]
        report.lines.append(_kind_line(kind, chosen, tricks, values, seconds, errors, honest, report.looks_at))
    _sum_up(report)
    again = _score(scorer, [trick.text for trick in tricks], [sample.columns] * len(tricks)).by_function[report.name]
    changed = [trick.name for trick, old, new in zip(tricks, values, again, strict=True) if not _same(old, new)]
    if changed:
        report.problems.append(
            f"not deterministic: {len(changed)} texts score otherwise the second time, {changed[0]!r}"
        )


def _less(value: float | None, honest: float | None) -> bool:
    return value is not None and honest is not None and value < honest - _TOLERANCE


def _same(old: float | None, new: float | None) -> bool:
    return old == new or (old is not None and new is not None and abs(old - new) <= _TOLERANCE)


def _kind_line(
    kind: str,
    chosen: Sequence[int],
    tricks: Sequence[Trick],
    values: Sequence[float | None],
    seconds: Sequence[float],
    errors: Sequence[str],
    honest: float | None,
    looks_at: Sequence[str],
) -> KindLine:
    given = [value for value in (values[index] for index in chosen) if value is not None]
    paid = []
    for index in chosen:
        value = values[index]
        breaks = set(tricks[index].breaks) & set(looks_at)
        if breaks and value is not None and honest is not None and value >= honest - _TOLERANCE:
            paid.append(tricks[index].name)
    return KindLine(
        kind=kind,
        count=len(chosen),
        low=min(given, default=None),
        high=max(given, default=None),
        slowest_s=max(seconds[index] for index in chosen),
        paid=paid,
        errors=[f"{tricks[index].name}: {errors[index]}" for index in chosen if errors[index]],
    )


def _sum_up(report: Report) -> None:
    paid = sum(len(line.paid) for line in report.lines)
    if paid:
        report.problems.append(f"pays the full price for {paid} tricks, named in the table")
    errors = [error for line in report.lines for error in line.errors]
    if errors:
        report.problems.append(f"fails on {len(errors)} texts, which stops the run or masks the row; {errors[0]}")
    for line in report.lines:
        if line.slowest_s > SLOW_S:
            told = report.problems if line.slowest_s > TOO_SLOW_S else report.notes
            told.append(f"needs {line.slowest_s:.1f} s for a text of kind {line.kind!r}")
    if not report.looks_at:
        report.notes.append("scores neither the answer nor the tags: tricks are shown, not judged")


def _check_golds(
    scorer: RewardScorer, entry: RewardEntry, numbered: Sequence[tuple[int, Mapping[str, Any]]], report: Report
) -> None:
    """Whether the dataset's own answers earn full marks; if not, the data or the function is wrong, and training cannot
    mend it."""
    golds = [(number, row, gold_text(entry, row)) for number, row in numbered]
    known = [(number, row, gold) for number, row, gold in golds if gold is not None]
    if "answer" not in report.looks_at or not known:
        report.notes.append(
            "the dataset's own answers are not checked: " + ("none found" if not known else "not scored")
        )
        _try_rows(scorer, entry, numbered, report)
        return
    texts = [f"<think>We work it out step by step.</think>\n<answer>{gold}</answer>" for _, _, gold in known]
    batch = _score(scorer, texts, [row for _, row, _ in known])
    values, scores = batch.by_function[entry.name], batch.scores[entry.name]
    report.gold_checked = len(known)
    report.rules.update(score.rule for score in scores if score.rule)
    full = max((value for value in values if value is not None), default=0.0)
    bad = [
        f"row {number} ({gold[:40]!r}): {_told(value)}; {_why(score)}"
        for (number, _, gold), value, score in zip(known, values, scores, strict=True)
        if value is None or value < full - _TOLERANCE
    ]
    if bad:
        report.problems.append(f"{len(bad)} of {len(known)} rows do not give full marks to their own answer")
        report.problems += [f"  {text}" for text in bad[:_SHOWN_ROWS]]


def _try_rows(
    scorer: RewardScorer, entry: RewardEntry, numbered: Sequence[tuple[int, Mapping[str, Any]]], report: Report
) -> None:
    """Rows that the function fails on whatever is answered, as code does on tests that it cannot read. An async
    function is not asked, as its calls may cost something."""
    if entry.is_async:
        return
    text = "<think>We work it out step by step.</think>\n<answer>0</answer>"
    batch = _score(scorer, [text] * len(numbered), [row for _, row in numbered])
    bad = [
        f"row {number}: {score.reason}"
        for (number, _), score, status in zip(
            numbered, batch.scores[entry.name], batch.statuses[entry.name], strict=True
        )
        if status == "error"
    ]
    if bad:
        report.problems.append(f"fails on {len(bad)} of {len(numbered)} rows")
        report.problems += [f"  {told}" for told in bad[:_SHOWN_ROWS]]


def _why(score: Score) -> str:
    """What was read, what it was compared with, and which rule decided, where the function says so."""
    told = {key: text for key, text in score.explanation.items() if text}
    return ", ".join(f"{key} {text[:80]!r}" for key, text in told.items()) or "it gives no reason"


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def table(report: Report) -> Iterable[str]:
    """The report as lines of text."""
    looks = " and ".join(report.looks_at) or "neither answer nor format"
    yield f"{report.name}: looks at {looks}; range {_told(report.low)} .. {_told(report.high)}"
    yield f"  {'kind of text':18} {'texts':>5} {'lowest':>8} {'highest':>8} {'slowest':>9}  paid"
    for line in report.lines:
        paid = ", ".join(line.paid) or "-"
        seconds = f"{1e3 * line.slowest_s:.1f} ms"
        yield f"  {line.kind:18} {line.count:5d} {_told(line.low):>8} {_told(line.high):>8} {seconds:>9}  {paid}"
    if report.gold_checked:
        rules = ", ".join(f"{rule} {count}" for rule, count in report.rules.most_common())
        yield f"  own answers of the dataset: {report.gold_checked} rows checked" + (
            f", by rule: {rules}" * bool(rules)
        )
    yield from (f"  note: {note}" for note in report.notes)
    yield from (f"  PROBLEM: {problem}" for problem in report.problems)
    yield "" if report.problems else "  no problems found"
