"""lint: it finds what fooled known reward functions, wrong columns, bad rows; and lets honest functions pass."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rewards.lint import Report, default_sample, lint_function, read_corpus, table
from rewards.registry import BUILTINS
from rewards.scorer import RewardScorer

REPOSITORY = Path(__file__).parents[3]
FUNCTIONS = r"""
import random, re
WELL_FORMED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
def peer_format(completions, **columns):
    return [float(bool(WELL_FORMED.match(text))) for text in completions]
def contains(completions, answer, **columns):
    return [float(gold in text) for text, gold in zip(completions, answer)]
def splits(completions, answer):
    stated = [text.split("<answer>")[1].split("</answer>")[0] for text in completions]
    return [float(text == gold) for text, gold in zip(stated, answer)]
def numeric(completions, answer):
    inner = [text.rpartition("<answer>")[2].partition("</answer>")[0].strip() for text in completions]
    return [float(text == gold.strip() and gold.strip().isdigit()) for text, gold in zip(inner, answer)]
def divides(completions, size):
    from rewards.base import Score
    return [1 / n if n else Score(None, "no size", rule="error") for n in size]
def rolls_by_group(completions, group_ids, **columns): return rolls(completions)
def rank(completions, group_ids, **columns): return [None if group_ids.count(g) == 1 else 1.0 for g in group_ids]
def rolls(completions): return [random.random() for _ in completions]
def tells(completions, answer):
    from rewards.base import Score
    stated = [text.rpartition("<answer>")[2].partition("</answer>")[0] for text in completions]
    return [Score(float(text == gold.upper()), "case differs", text, gold.upper(), "same text")
            for text, gold in zip(stated, answer)]
def never(completions): return [None] * len(completions)
def wants(completions, solution): return [1.0] * len(completions)
def optional(completions, anwser=None): return [1.0] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def paid(report: Report) -> set[str]:
    return {name for line in report.lines for name in line.paid}


@pytest.mark.parametrize("name", ["format", "accuracy", "countdown", "exact_match"])
def test_built_in_functions_pay_no_trick(name: str) -> None:
    report = lint_function(name)
    assert report.problems == [] and report.looks_at == ["format" if name == "format" else "answer"]
    assert (report.low, report.high) == (0.0, 1.0)


def test_holes_of_known_functions_are_found(file: str) -> None:
    assert {"empty blocks", "text after the answer"} <= paid(lint_function(f"{file}:peer_format"))
    hedged = lint_function(f"{file}:contains")
    assert {"right in thought only", "or", "list", "all numbers"} <= paid(hedged)
    assert any("pays the full price for" in problem for problem in hedged.problems)


def test_exceptions_and_chance_are_found(file: str) -> None:
    assert any(
        "fails on" in problem and "IndexError" in problem for problem in lint_function(f"{file}:splits").problems
    )
    for name in ("rolls", "rolls_by_group"):
        assert any("not deterministic" in problem for problem in lint_function(f"{file}:{name}").problems)
    needs_others = lint_function(f"{file}:rank")
    assert needs_others.problems == [] and "nothing about it was tried" in needs_others.notes[0]


def test_rows_that_a_function_fails_on_are_named(file: str) -> None:
    rows = [{"question": "q", "size": size} for size in (3, 0, 5)]
    report = lint_function(f"{file}:divides", rows)
    assert report.problems[-2:] == ["fails on 1 of 3 rows", "  row 2: no size"], report.problems


def test_columns_that_are_missing_or_nearly_right(file: str) -> None:
    rows = [{"question": "q", "answer": "4", "solutions": "s"}]
    missing = lint_function(f"{file}:wants", rows)
    (problem,) = missing.problems
    assert problem.startswith("the dataset: reward function 'wants': argument 'solution'")
    assert "did you mean 'solutions'?" in problem
    assert "the dataset has a column 'answer'" in lint_function(f"{file}:optional", rows).notes[0]
    named = lint_function({"func": "accuracy", "params": {"gold_column": "anser"}}, rows)
    assert "did you mean 'answer'" in named.problems[0]


def test_rows_whose_own_answer_is_not_worth_full_marks(file: str) -> None:
    rows = [{"answer": "4"}, {"answer": " 5 "}, {"answer": "6 or 7"}]
    report = lint_function(f"{file}:numeric", rows)
    assert report.gold_checked == 3
    assert "1 of 3 rows do not give full marks to their own answer" in report.problems
    assert any("row 3 ('6 or 7')" in problem for problem in report.problems)
    unread = lint_function(f"{file}:contains", [{"answer": "the work ... #### 4"}])  # expects the bare number
    assert any("takes the reference answer" in problem for problem in unread.problems)


def test_bad_rows_say_what_was_read_and_which_rule_decided(file: str) -> None:
    report = lint_function("exact_match", [{"answer": ["4", "four"]}, {"answer": "4"}, {"answer": "</answer>5"}])
    (line,) = [problem for problem in report.problems if problem.startswith("  row")]
    assert line.startswith("  row 3 ('</answer>5'): 0; gold '</answer>5', rule 'no answer', reason '")
    report = lint_function(f"{file}:tells", [{"answer": "4"}, {"answer": "five"}])
    (line,) = [problem for problem in report.problems if problem.startswith("  row")]
    assert line == "  row 2 ('five'): 0; extracted 'five', gold 'FIVE', rule 'same text', reason 'case differs'"
    report = lint_function("accuracy", [{"answer": "4"}, {"answer": "4" * 4000}])
    assert "2 rows checked, by rule: same text 1, no answer 1" in "\n".join(table(report))


MIXTURE = [{"task": "chat", "answer": None}, {"task": "math", "answer": "4"}, {"task": "math", "answer": "5"}]


def test_rows_of_other_tasks_are_left_out() -> None:
    math = lint_function({"func": "accuracy", "when": {"column": "task", "equals": "math"}}, MIXTURE)
    assert math.problems == [] and math.gold_checked == 2 and math.looks_at == ["answer"]
    assert math.notes[0].startswith("applies to 2 of 3 rows")
    by_task = [{"use": ["format"], "answer": None}, {"use": "accuracy", "answer": "4"}]
    report = lint_function("accuracy", by_task, task_column="use")
    assert report.problems == [] and report.gold_checked == 1
    without_data = lint_function({"func": "accuracy", "when": {"column": "task", "in": ["math", "x"]}})
    assert without_data.problems == [] and without_data.looks_at == ["answer"]


def test_a_function_that_never_applies_is_a_problem(file: str) -> None:
    report = lint_function({"func": "accuracy", "when": {"column": "task", "equals": "maths"}}, MIXTURE)
    assert any("applies to 0 of 3 rows" in problem and "maths" in problem for problem in report.problems)
    report = lint_function("accuracy", [{"use": "format", "answer": "4"}], task_column="use")
    assert any("applies to 0 of 1 rows" in problem for problem in report.problems)
    report = lint_function(f"{file}:never")
    assert any("gives no value for any text" in problem for problem in report.problems)


def test_the_table_says_it_all(file: str) -> None:
    text = "\n".join(table(lint_function(f"{file}:peer_format")))
    for part in ("peer_format: looks at format; range 0 .. 1", "empty blocks", "PROBLEM: pays the full price"):
        assert part in text


def test_corpus_is_well_formed() -> None:
    tricks = read_corpus("GOLD", "WRONG")
    names = [trick.name for trick in tricks]
    assert len(names) == len(set(names)) > 60
    assert {part for trick in tricks for part in trick.breaks} == {"answer", "format"}
    assert not any("{gold}" in trick.text or "{wrong}" in trick.text for trick in tricks)
    assert default_sample("countdown").columns["target"] == 24
    assert default_sample("anything else").gold == "42"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lint_rewards_script", REPOSITORY / "scripts" / "lint_rewards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = _script().main
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"answer": str(n)}) + "\n" for n in range(71, 76)))
    assert main(["accuracy", "--data", str(data), "--rows", "3"]) == 0
    assert "3 rows checked" in capsys.readouterr().out
    assert main([f"{file}:contains"]) == 1
    assert main(["repetition_penalty", "--params", '{"ngram_size": 2}']) == 0
    capsys.readouterr()
    for arguments, says in (
        (["acuracy"], "did you mean 'accuracy'"),
        (["accuracy", "--data", str(tmp_path / "none.jsonl")], "No such file"),
        (["cosine", "--params", '{"max_len": 0}'], "max_len: 0 is not allowed"),
        (["cosine", "--params", "{max_len: 10}"], "--params {max_len: 10}: is not JSON: Expecting property name"),
        (["accuracy", "--rows", "0"], "--rows 0: allowed from 1"),
    ):
        assert main(arguments) == 2 and says in capsys.readouterr().err
    for content in (b'{"answer": 1}\n[1]\n', b'{"answer": 1}\n{"answer": "\xe9"}\n'):
        data.write_bytes(content)
        assert main(["accuracy", "--data", str(data)]) == 2 and "rows.jsonl, line 2: " in capsys.readouterr().err


def test_a_recipe_brings_its_functions_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = REPOSITORY / "recipes" / "quickstart.yaml"
    if not recipe.exists():
        pytest.skip("no such recipe")
    assert _script().main([str(recipe), "--rows", "20"]) == 0
    out = capsys.readouterr().out
    assert "format: looks at format" in out and "accuracy: looks at answer" in out and "20 rows checked" in out


def test_the_page_about_writing_a_reward_runs(tmp_path: Path) -> None:
    """The snippet of rewards/README.md, called as its recipe says, gives what its docstring says."""

    page = (REPOSITORY / "rewards" / "README.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    recipe = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "my_rewards.py").write_text(program)
    scorer = RewardScorer(recipe["rewards"]["reward_funcs"], base_folder=tmp_path)
    text = "<think>6 * 7</think><answer>42</answer>"
    columns = {"answer": ["42", "42", "42", None]}
    ids = [[0] * length for length in (40, 60, 100, 40)]
    batch = scorer.score(["p"] * 4, [text] * 4, ids, columns, [0] * 4)
    assert batch.by_function["brevity"] == [1.0, 0.5, 0.0, None]
    assert batch.rewards == pytest.approx([2.2, 2.1, 2.0, 1.0])
    assert all(f"`{name}`" in page for name in BUILTINS), "the page lists every function"
