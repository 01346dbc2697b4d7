"""The scorer: sums, masks, errors that stop or mask, parameters and columns, async functions, groups."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards.base import Score, TrainerState
from rewards.scorer import RewardError, RewardScorer, ScoredBatch, merge_batches

FUNCTIONS = """
import asyncio, math
from rewards.base import Score

def length(completions, **columns): return [float(len(text)) for text in completions]
def brevity(prompts, completions, completion_ids, limit=3, **columns):
    return [float(len(text) <= limit) for text in completions]
def equals(completions, answer): return [None if a is None else text == a for text, a in zip(completions, answer)]
def tokens(completion_ids): return [len(ids) for ids in completion_ids]
async def slow(completions, **columns):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)
def share(completions, group_ids): return [group_ids.count(g) for g in group_ids]
def one_short(completions): return [1.0] * (len(completions) - 1)
def scalar(completions): return 1.0
def words(completions): return ["1.0" for _ in completions]
def nans(completions): return [math.nan if "x" in text else 1.0 for text in completions]
def raises(completions): raise KeyError("gone")
async def raises_late(completions): raise OSError("refused")
def huge(completions): return [10**400 for _ in completions]
def explained(completions): return [Score(0.5, "half", extracted=text, rule="r") for text in completions]
def timed_out(completions): return [Score(0.0, "slow", rule="timeout") for text in completions]
def row_error(completions):
    return [Score(None, "bad row", rule="error") if text == "bad" else Score(1.0) for text in completions]
def hangs(completions):
    while completions[0] == "hang": pass
    return [2]
def allocates(completions): return [float(len(bytearray(600 << 20)) > 0) for _ in completions]
def messages(prompts, completions):
    whole = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}]
    return [float(pair == whole) for pair in zip(prompts, completions)]
def first_role_and_text(prompts, **columns):
    return [Score(1.0, "{role}: {content}".format(**messages[0])) for messages in prompts]
def everything(prompts, completions, completion_ids, **kwargs): return [float(len(kwargs))] * len(prompts)
class Tensor:
    def __init__(self, values): self.values = values
    def tolist(self): return self.values
def tensor(completions): return Tensor([0.25] * len(completions))
def wants_column(completions, missing_column): return [1.0] * len(completions)
def positional(completions, /): return []
def progress(completions, trainer_state):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]
class Scalar:  # as a number of numpy or torch
    def __init__(self, *values): self.values = values
    def item(self):
        if len(self.values) != 1: raise ValueError("only one element can be converted")
        return self.values[0]
class Mute(Exception):
    def __str__(self): raise OSError("no message")
    __repr__ = __str__
def scalars(completions): return [Scalar(0.5) for _ in completions]
def scores_of_scalars(completions): return [Score(Scalar(0.5), "half") for _ in completions]
def scores_of_truth(completions): return [Score(True) for _ in completions]
def vectors(completions): return [Scalar(0.5, 0.5) for _ in completions]
def enormous(completions): return [10**5000 for _ in completions]
def mute(completions): raise Mute()
def mutes(completions): return [Mute() for _ in completions]
async def cancels(completions): raise asyncio.CancelledError("by an inner task")
def number_as_text(completions): return [Score(1.0, extracted=4) for _ in completions]
def counts(completions, counters):
    counters.add(texts=len(completions))
    return [1.0] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def score(scorer: RewardScorer, texts: list[str], groups: list[int] | None = None, **columns: list[Any]) -> ScoredBatch:
    return scorer.score(
        ["p"] * len(texts), texts, [[0] * len(text) for text in texts], columns, groups or [0] * len(texts)
    )


def test_weighted_sum_and_metrics_by_hand(file: str) -> None:
    scorer = RewardScorer([f"{file}:length", f"{file}:equals"], [0.5, 2.0])
    batch = score(scorer, ["a", "bbb"], answer=["a", None])
    assert batch.rewards == [0.5 * 1 + 2.0 * 1, 0.5 * 3]  # None does not apply: the rest is the sum
    assert batch.by_function == {"length": [1.0, 3.0], "equals": [1.0, None]}
    metrics = batch.metrics
    assert metrics["rewards/length/mean"] == 2.0
    assert metrics["rewards/length/std"] == pytest.approx(math.sqrt(2))  # ((1-2)^2 + (3-2)^2) / (2 - 1)
    assert metrics["rewards/equals/none_frac"] == 0.5 and metrics["rewards/equals/error_frac"] == 0.0
    assert metrics["rewards/equals/std"] == 0.0 and metrics["rewards/length/latency_p95_s"] > 0


def test_no_function_applies_gives_none(file: str) -> None:
    batch = score(RewardScorer([f"{file}:equals"]), ["a"], answer=[None])
    assert batch.rewards == [None]
    assert "rewards/equals/mean" not in batch.metrics and batch.metrics["rewards/equals/none_frac"] == 1.0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("one_short", "returned 1 values for 2 completions"),
        ("scalar", "returned float 1.0, not a list of 2 values"),
        ("words", "returned str '1.0', which is not a number"),
        ("huge", "which is not finite"),
        ("nans", "returned float nan, which is not finite"),
        ("raises", "KeyError: 'gone'"),
        ("raises_late", "OSError: refused"),
        ("vectors", "returned Scalar <"),
        ("enormous", "returned int <no repr: ValueError>, which is not finite"),
        ("mute", "Mute, without a message: OSError"),
        ("mutes", "returned Mute <no repr: OSError>, which is not a number"),
        ("cancels", "CancelledError: by an inner task"),
        ("number_as_text", "returned a Score whose extracted is int 4, which is not text"),
    ],
)
def test_errors_stop_with_name_row_and_text_or_are_masked(file: str, function: str, says: str) -> None:
    texts = ["x-text", "other"]
    with pytest.raises(RewardError) as caught:
        score(RewardScorer([f"{file}:length", f"{file}:{function}"]), texts, answer=["gold", "b"])
    assert caught.value.function == function and caught.value.row == 0
    for part in (function, "row 0", says, "x-text", "'gold'"):
        assert part in str(caught.value)
    batch = score(RewardScorer([f"{file}:length", f"{file}:{function}"], on_error="mask"), texts)
    bad_rows = 1 if function == "nans" else 2
    assert batch.rewards[0] is None  # not the length alone: that would be a silent 0 for the other part
    assert batch.by_function[function][:bad_rows] == [None] * bad_rows
    assert batch.metrics[f"rewards/{function}/error_frac"] == bad_rows / 2


def test_only_the_bad_row_is_masked(file: str) -> None:
    batch = score(RewardScorer([f"{file}:row_error"], on_error="mask"), ["bad", "good"])
    assert batch.rewards == [None, 1.0] and batch.metrics["rewards/row_error/error_frac"] == 0.5
    with pytest.raises(RewardError, match="failed on row 1: bad row"):
        score(RewardScorer([f"{file}:row_error"]), ["good", "bad"])


def test_scores_keep_their_reasons_and_timeouts_are_counted(file: str) -> None:
    batch = score(RewardScorer([f"{file}:explained", f"{file}:timed_out"]), ["a"])
    assert batch.scores["explained"] == [Score(0.5, "half", extracted="a", rule="r")]
    assert batch.metrics["rewards/timed_out/timeout_frac"] == 1.0 and batch.rewards == [0.5]


def test_what_is_logged_of_a_row(file: str) -> None:
    batch = score(
        RewardScorer([f"{file}:explained", f"{file}:length", "accuracy"]), ["<answer>4</answer>"], answer=["4"]
    )
    told = {name: scores[0].explanation for name, scores in batch.scores.items()}
    assert told["explained"] == {"extracted": "<answer>4</answer>", "gold": None, "rule": "r", "reason": "half"}
    assert told["accuracy"]["extracted"] == told["accuracy"]["gold"] == "4" and told["accuracy"]["rule"]
    assert not any(told["length"].values())  # a bare number has no reason


def test_values_of_arrays_and_truth_values(file: str) -> None:
    batch = score(RewardScorer([f"{file}:tensor", f"{file}:equals"]), ["a", "b"], answer=["a", "a"])
    assert batch.rewards == [1.25, 0.25]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("function", ["scalars", "scores_of_scalars", "scores_of_truth"])
def test_numbers_of_other_libraries_become_plain_ones(file: str, function: str, isolate: bool) -> None:
    """A run's log could not be written with others, and a worker's reply not be read."""
    batch = score(RewardScorer([{"func": f"{file}:{function}", "isolate": isolate}]), ["a"])
    (value,) = batch.by_function[function]
    assert value == (1.0 if function == "scores_of_truth" else 0.5) and type(value) is float
    assert batch.scores[function][0].reason == ("half" if function == "scores_of_scalars" else "")


def test_a_failure_without_a_message_is_told_from_a_worker_too(file: str) -> None:
    batch = score(RewardScorer([{"func": f"{file}:mute", "isolate": True}], on_error="mask"), ["a"])
    assert batch.scores["mute"][0].reason == "Mute, without a message: OSError"


def test_conversational_prompts_are_those_of_the_dataset(file: str) -> None:
    """TRL's come without the words of a template; `prompt` is the question before it."""
    scorer = RewardScorer([{"func": f"{file}:first_role_and_text", "conversational": True}])
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    batch = scorer.score(["User: q\nAssistant:"] * 2, ["a", "b"], [[0]] * 2, {"prompt": ["q", system]}, [0, 1])
    assert [score.reason for score in batch.scores["first_role_and_text"]] == ["user: q", "system: Be brief."]


def test_parameters_columns_and_row_arguments(file: str) -> None:
    scorer = RewardScorer(
        [
            {"func": f"{file}:brevity", "params": {"limit": 5}},
            {"func": f"{file}:equals", "columns": {"answer": "gold"}},
            f"{file}:tokens",
            {"func": f"{file}:messages", "conversational": True},
            f"{file}:everything",
        ]
    )
    batch = score(scorer, ["a"], gold=["a"], other=[1], limit=[0])
    assert batch.by_function == {
        "brevity": [1.0],
        "equals": [1.0],
        "tokens": [1.0],
        "messages": [1.0],
        "everything": [3.0],
    }


@pytest.mark.parametrize(
    ("setting", "text", "columns", "value"),
    [
        ("language_consistency", "We add two", {"language": ["fr"]}, 1.0),  # English, the default
        ({"func": "language_consistency", "params": {"language_column": "language"}}, "We", {"language": ["zh"]}, 0.0),
        ({"func": "regex", "params": {"pattern": "[a-z]"}}, "<answer>a</answer>", {"pattern": ["B"]}, 1.0),
        ({"func": "regex", "params": {"pattern_column": "pattern"}}, "<answer>a</answer>", {"pattern": ["B"]}, 0.0),
        (
            {"func": "json_schema", "params": {"schema_column": "schema"}},
            "<answer>3</answer>",
            {"schema": ['{"type": "integer"}'], "tagged": [False]},
            1.0,
        ),
        ({"func": "accuracy", "params": {"gold_column": "tagged"}}, "<answer>4</answer>", {"tagged": ["4"]}, 1.0),
        ("repetition_penalty", "a b a b", {"ngram_size": [None], "max_penalty": ["x"]}, 0.0),
    ],
)
def test_a_column_never_replaces_a_setting_of_a_built_in(
    setting: Any, text: str, columns: dict[str, list[Any]], value: float
) -> None:
    batch = score(RewardScorer([setting]), [text], **columns)
    assert batch.rewards == [value]


def test_rows_are_chosen_by_condition_and_by_task_column(file: str) -> None:
    scorer = RewardScorer(
        [{"func": f"{file}:length", "when": {"column": "task", "in": ["code", "math"]}}, f"{file}:brevity"]
    )
    batch = score(scorer, ["aaaaa", "bb", "cc"], task=["math", "chat", "code"])
    assert batch.by_function["length"] == [5.0, None, 2.0] and batch.rewards == [5.0, 1.0, 3.0]
    latencies = batch.latencies["length"]  # one a row, so that rows can be put into another order
    assert latencies[1] is None and latencies[0] == latencies[2] == batch.metrics["rewards/length/latency_p95_s"]
    by_task = RewardScorer([f"{file}:length", f"{file}:brevity"], task_column="use")
    batch = score(by_task, ["aaaaa", "bb", "cc"], use=["length", ["length", "brevity"], []])
    assert batch.rewards == [5.0, 3.0, None]
    with pytest.raises(ValueError, match=r"row 0, column 'use': 'lenght' is not allowed.*length, brevity"):
        score(by_task, ["a"], use=["lenght"])
    with pytest.raises(ValueError, match="task_column: there is no column 'use'"):
        score(by_task, ["a"])


def test_groups_are_seen_whole(file: str) -> None:
    batch = score(RewardScorer([f"{file}:share"]), ["a", "b", "c"], groups=[7, 7, 8])
    assert batch.rewards == [2.0, 2.0, 1.0]


def test_a_function_can_count(file: str) -> None:
    scorer = RewardScorer([f"{file}:counts", {"func": f"{file}:counts", "name": "again"}])
    batches = [score(scorer, ["a"]), score(scorer, ["a", "b"], counters=[1, 2])]
    assert [batch.metrics["rewards/counts/texts"] for batch in batches] == [1.0, 2.0]
    assert merge_batches(batches).metrics["rewards/again/texts"] == 3.0
    with pytest.raises(ValueError, match="isolate is not possible for a function that counts"):
        RewardScorer([{"func": f"{file}:counts", "isolate": True}])


@pytest.mark.parametrize("isolate", [False, True])
def test_a_function_can_ask_how_far_the_training_is(file: str, isolate: bool) -> None:
    scorer = RewardScorer([{"func": f"{file}:progress", "isolate": isolate}])
    scorer.check_columns([], source="data.train")  # it needs no column of that name
    assert score(scorer, ["a"]).rewards == [0.0]
    scorer.trainer_state = TrainerState(global_step=3, max_steps=4)
    assert score(scorer, ["a", "b"]).rewards == [0.75, 0.75]
    with pytest.raises(ValueError, match="params: 'trainer_state' is not allowed"):
        RewardScorer([{"func": f"{file}:progress", "params": {"trainer_state": 1}}])


def test_isolated_functions_are_killed_row_by_row(file: str) -> None:
    settings = {"func": f"{file}:hangs", "isolate": True, "time_limit_s": 0.3}
    texts = ["fine", "hang", "fine"]
    with pytest.raises(RewardError, match=r"killed after 0\.3 s"):
        score(RewardScorer([settings]), texts)
    masked = score(RewardScorer([settings], on_error="mask"), texts)
    assert masked.rewards == [2.0, None, 2.0]
    assert masked.metrics["rewards/hangs/timeout_frac"] == pytest.approx(1 / 3)
    paid = score(RewardScorer([{**settings, "timeout_score": -1}]), texts)
    assert paid.rewards == [2.0, -1.0, 2.0]


def test_the_memory_of_an_isolated_function_is_a_setting(file: str) -> None:
    settings = {"func": f"{file}:allocates", "isolate": True}
    assert score(RewardScorer([settings]), ["a"]).rewards == [1.0]
    with pytest.raises(RewardError, match="more memory than its limit"):
        score(RewardScorer([{**settings, "memory_limit_mb": 512}]), ["a"])
    paid = score(RewardScorer([{**settings, "memory_limit_mb": 512, "timeout_score": 0.0}]), ["a"])
    assert paid.rewards == [0.0] and paid.statuses == {"allocates": ["timeout"]}


def _main_thread(call: Callable[[], ScoredBatch]) -> ScoredBatch:
    return call()


def _other_thread(call: Callable[[], ScoredBatch]) -> ScoredBatch:
    results: list[ScoredBatch] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def _inside_a_loop(call: Callable[[], ScoredBatch]) -> ScoredBatch:
    async def run() -> ScoredBatch:
        return call()

    return asyncio.run(run())


def _in_an_executor(call: Callable[[], ScoredBatch]) -> ScoredBatch:
    async def run() -> ScoredBatch:
        return await asyncio.get_running_loop().run_in_executor(None, call)

    return asyncio.run(run())


@pytest.mark.parametrize("place", [_main_thread, _other_thread, _inside_a_loop, _in_an_executor])
def test_async_functions_work_from_everywhere(
    file: str, place: Callable[[Callable[[], ScoredBatch]], ScoredBatch]
) -> None:
    scorer = RewardScorer([f"{file}:slow", f"{file}:length"])
    assert place(lambda: score(scorer, ["a", "bb"])).rewards == [2.0, 3.0]
    scorer.close()


def test_groups_scored_one_by_one_merge_to_the_same(file: str) -> None:
    scorer = RewardScorer([f"{file}:length", f"{file}:equals"])
    futures = [
        scorer.submit(["p"], [text], [[0]], {"answer": [text]}, [group])
        for group, text in enumerate(["a", "bb", "ccc"])
    ]
    merged = merge_batches([future.result() for future in futures])
    whole = score(scorer, ["a", "bb", "ccc"], answer=["a", "bb", "ccc"], groups=[0, 1, 2])
    assert merged.rewards == whole.rewards and merged.by_function == whole.by_function
    assert merged.metrics["rewards/length/std"] == whole.metrics["rewards/length/std"]
    scorer.close()


@pytest.mark.parametrize(
    ("entries", "weights", "says"),
    [
        ([], None, "at least one"),
        ("format", None, "a list"),
        (["format", "format"], None, "the name 'format' stands twice"),
        (["formt"], None, r"reward_funcs\[0\].*did you mean 'format'"),
        (["format"], [1.0, 2.0], "reward_weights has 2 entries, reward_funcs has 1"),
        (["format"], [math.nan], "weight: nan"),
        ([{"func": "format", "weight": 1.0}], [1.0], "weight stands both"),
        ([{"func": "format", "wieght": 1.0}], None, "unknown key 'wieght'; did you mean 'weight'"),
        ([{"func": "cosine", "params": {"max_lenn": 1}}], None, "no argument 'max_lenn'; did you mean 'max_len'"),
        ([{"func": "cosine", "params": {"max_len": 0}}], None, "max_len: 0 is not allowed"),
        ([{"func": "soft_overlong_punishment"}], None, "soft_punish_cache: None"),
        ([{"func": "regex", "params": {"pattern": "("}}], None, "no regular expression"),
        ([{"func": "format", "when": {"column": "task"}}], None, "when: .* is not allowed"),
        ([{"func": "format", "timeout_score": 1.0}], None, "no effect without `isolate"),
        ([{"func": "format", "memory_limit_mb": 9e3}], None, "memory_limit_mb has no effect without `isolate"),
        ([{"func": "format", "isolate": True, "memory_limit_mb": 9}], None, "memory_limit_mb: 9 is not .* least 256"),
        ([{"func": "format", "time_limit_s": 0}], None, "time_limit_s: 0 is not allowed; more than 0"),
        ([{"func": "format", "time_limit_s": None}], None, "time_limit_s: None is not allowed"),
        ([{"func": "majority", "isolate": True}], None, "needs whole groups"),
        ([{"func": 3}], None, "func: 3 is not allowed"),
        ([{"func": "format", "conversational": "no"}], None, "conversational: 'no' is not allowed; true or false"),
        ([{"func": "format", "isolate": 0}], None, "isolate: 0 is not allowed; true or false"),
        ([{"func": "format", "isolate": None}], None, "isolate: None is not allowed"),
        ([{"func": "accuracy", "params": {"tagged": "off"}}], None, "params: tagged: 'off' is not allowed"),
        (
            [{"func": "code", "params": {"time_limit_s": "2"}}],
            None,
            "params: time_limit_s: '2' is not .* finite number",
        ),
        ([{"func": "majority", "params": {"min_share": None}}], None, "params: min_share: None is not allowed"),
        ([{"func": "accuracy", "columns": {"gold_column": "gold"}}], None, "'gold_column' is a setting"),
        ([{"func": "accuracy", "params": {"completions": ["x"]}}], None, "'completions' is not allowed"),
        ([{"func": "code", "columns": {"tests": "cases"}, "params": {"tests": []}}], None, "both in params and"),
    ],
)
def test_wrong_recipes_are_told_at_construction(entries: Any, weights: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RewardScorer(entries, weights)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        RewardScorer(["formt", {"func": "accuracy", "parms": {}}])
    assert "reward_funcs[0]" in str(caught.value) and "reward_funcs[1]" in str(caught.value)


def test_columns_that_are_missing_or_short(file: str) -> None:
    with pytest.raises(ValueError, match=r"'wants_column': .*no column 'missing_column'; The columns are: answer"):
        score(RewardScorer([f"{file}:wants_column"], on_error="mask"), ["a"], answer=["a"])
    with pytest.raises(ValueError, match="answer has 2 entries for 1 completions"):
        score(RewardScorer([f"{file}:length"]), ["a"], answer=["a", "b"])
    with pytest.raises(ValueError, match="by position only"):
        RewardScorer([f"{file}:positional"])
    with pytest.raises(ValueError, match="gold_column: there is no column 'solution'"):
        score(
            RewardScorer([{"func": "accuracy", "params": {"gold_column": "solution"}}], on_error="mask"),
            ["a"],
            answer=["a"],
        )
