"""One step's experience: what a mixture of tasks, several ranks and functions that count for themselves leave of it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from rewards.scorer import RewardScorer
from rl.train import experience as module
from rl.train.experience import Experience, TextOf, collect
from rl.types import Problem, SamplingParams
from tests.unit.train.spoken import TOKENIZER, Spoken, answered

# Four problems of two tasks, three completions each: two problems a rank on two ranks.
PROBLEMS = [
    Problem("m0", "0", (3,), {"task": "math", "answer": "1/2"}),
    Problem("w1", "1", (3,), {"task": "word", "answer": "abc"}),
    Problem("w2", "2", (3,), {"task": "word", "answer": "dad"}),
    Problem("m3", "3", (3,), {"task": "math", "answer": "7"}),
]
SAID = {
    "m0": [answered("0.5"), answered("2"), "0"],
    "w1": [answered("abc"), answered("abc"), answered("cab")],
    "w2": [answered("bad"), answered("dad"), answered("dad")],
    "m3": [answered("7"), answered("7.0"), answered("8")],
}
RIGHT = [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]]
MIXTURE: list[Any] = [
    {"func": "accuracy", "when": {"column": "task", "equals": "math"}},
    {"func": "exact_match", "name": "word", "when": {"column": "task", "equals": "word"}},
]


def no_clock(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


def collected(functions: list[Any] = MIXTURE, *, task_column: str | None = None) -> Experience:
    scorer = RewardScorer(functions, task_column=task_column)
    found = collect(
        PROBLEMS,
        engine=Spoken(SAID),
        params=SamplingParams(32),
        num_generations=3,
        seed=0,
        step=0,
        scorer=scorer,
        decode=TextOf(TOKENIZER, [1]),
        scale_rewards="group",
        clock=no_clock,
    )
    scorer.close()
    return found


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, functions: list[Any]) -> list[Experience]:
    """Two ranks as two threads that meet in gather_objects."""
    me, meeting, items = threading.local(), threading.Barrier(2, timeout=60), [None, None]
    results: list[Any] = [None, None]

    def gather(item: Any) -> list[Any]:
        items[me.rank] = item
        meeting.wait()
        found = list(items)
        meeting.wait()
        return found

    monkeypatch.setattr(module, "rank", lambda: me.rank)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "gather_objects", gather)

    def run(rank: int) -> None:
        me.rank = rank
        results[rank] = collected(functions)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results), "a rank failed"
    return results


def test_a_mixture_keeps_every_row_in_its_place() -> None:
    found = collected()
    assert found.rewards.tolist() == RIGHT
    assert found.scored.by_function["accuracy"] == [1, 0, 0, *[None] * 6, 1, 1, 0]
    assert found.scored.by_function["word"] == [*[None] * 3, 1, 1, 0, 0, 1, 1, *[None] * 3]
    metrics = found.scored.metrics
    assert metrics["rewards/accuracy/mean"] == 3 / 6 and metrics["rewards/accuracy/none_frac"] == 0.5
    assert metrics["rewards/word/mean"] == 4 / 6 and metrics["rewards/word/latency_p95_s"] > 0


def test_two_ranks_have_the_experience_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = collected()
    first, second = on_two_ranks(monkeypatch, MIXTURE)
    assert (first.positions, second.positions) == ([0, 2], [1, 3])
    assert [group.problem.id for group in second.groups] == ["w1", "m3"]
    for found in (first, second):
        assert found.table() == alone.table()
        statuses = found.scored.statuses
        assert statuses == alone.scored.statuses
        assert [s is None for s in found.scored.latencies["word"]] == [s == "none" for s in statuses["word"]]


def test_a_task_column_says_which_functions_apply() -> None:
    functions = [{"func": "accuracy", "name": "math"}, {"func": "exact_match", "name": "word"}]
    assert collected(functions, task_column="task").rewards.tolist() == RIGHT


def test_every_decision_says_why(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def plain(completions):\n    return [1.0] * len(completions)\n")
    table = collected([*MIXTURE, f"{tmp_path}/own.py:plain"]).table()
    right, wrong, bare = (row["explanations"]["accuracy"] for row in table[:3])
    assert right == {
        "extracted": "0.5", "gold": "1/2", "rule": "number", "reason": "equals the reference (answer block)",
    }  # fmt: skip
    assert (wrong["extracted"], wrong["gold"], wrong["rule"]) == ("2", "1/2", "different")
    assert bare["extracted"] is None and bare["gold"] == "1/2" and bare["rule"] == "no answer" and bare["reason"]
    assert table[0]["explanations"]["word"]["reason"] == "does not apply"
    assert table[0]["rewards/plain"] == 1.0 and "plain" not in table[0]["explanations"]


COUNTING = """
def costly(completions, counters):
    counters.add(calls=len(completions), cost_usd=len(completions) / 4)
    return [1.0] * len(completions)
"""


def test_what_functions_count_reaches_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(COUNTING)
    function = f"{tmp_path}/own.py:costly"
    for found in (collected([function]), *on_two_ranks(monkeypatch, [function])):
        assert found.scored.metrics["rewards/costly/calls"] == 12
        assert found.scored.metrics["rewards/costly/cost_usd"] == 3.0
