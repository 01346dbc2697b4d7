"""Answers made to be expensive: every one is refused within milliseconds, in this process, without recursion errors."""

from __future__ import annotations

import random

import pytest

from rewards.math_answer import accuracy_reward, judge_pair
from rewards.math_compare import compare_texts
from rewards.math_eval import TooLarge, evaluate, exact_value
from rewards.math_parse import parse_math
from rewards.math_tokens import MathSyntaxError
from tests.clock import assert_takes_less

GOLDS = [
    "42",
    "x^2+1",
    "(1,2)",
    "\\{1,2,3\\}",
    "x=5",
    "[0,1)",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "3:4",
    "\\sum_{i=1}^n i",
]
BOMBS = [
    "9**9**9", "9^{9^{9^{9}}}", "10^{10^{10}}", "10.0^{10.0^{10.0}}", "(9^9)^9", "0.0000001^{99999999}",
    "e^{10^{9}}", "e^{e^{e^{10}}}",
    "(10^{9})!", "1999!!", "2000!^{1000}", "100!!!!", "\\binom{10^{9}}{5 \\cdot 10^{8}}", "1e999999999", "1e-999999999",
    "7^{10^{100}} \\bmod 1000", "\\sin(10^{100000})", "\\sin(10^{50})", "\\tan(\\frac{\\pi}{2})", "\\zeta(1+10^{-300})",
    "\\sum_{i=1}^{500}\\sum_{j=1}^{500}\\sum_{k=1}^{500} i", "\\sum_{i=1}^{10^9} i", "\\prod_{i=1}^{500} i!",
    "(x+y)^{1000}",
    "x^{x^{x^{x}}}", "\\lim_{n \\to \\infty} \\frac{n!}{n^{n}}",
    "\\int " * 200 + "x" + " dx" * 200, "1" * 1000, "0." + "1" * 390,
    "1+" * 290 + "1", "1+" * 100_000 + "1", "1:" * 280 + "1", "1/" * 280 + "1", "2^" * 290 + "2", "-" * 590 + "7",
    "5" + "!" * 500,
    "5" + "%" * 500, "(" * 300 + "5" + ")" * 300, "{" * 290 + "5" + "}" * 290, "\\sqrt" * 300 + "2",
    "\\sqrt{" * 2000 + "2" + "}" * 2000,
    "\\frac" * 300, "\\frac{1}{1+" * 500 + "1" + "}" * 500, "\\sin" * 300 + "x",
    "|" * 500, "x_" * 290, "[1," * 200, "\\pm" * 200 + "1",
    "\\{" + ",".join(["\\pm1"] * 90) + "\\}", "42, " * 100_000 + "43", "(1,2)\\cup" * 60 + "(1,2)", "x<" * 250 + "1",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}" * 20, "\\begin{" * 100, "\\text{" * 100, "f(" * 100 + "x" + ")" * 100,
    "and " * 290,
    "\\log_{2}{" * 100 + "2" + "}" * 100, "\\boxed{" * 300, "\\operatorname{RootOf}(x^{5000}+x+1, 17)", "\ud800",
    "\x00", "\x1b[31m42",
    "4\u200b2", "\u202e24\u202c", "ⅩⅬⅡ", "٤٢", "nan", "inf", "0^0", "1/0", "\\infty-\\infty", "\\arccos(x^{999})",
    "$" * 2000,
]  # fmt: skip
CODE = [
    "__import__('os').system('touch {path}')", "open('{path}','w').write('x')", "exec(\"open('{path}','w')\")",
    "Lambda(x, 0)(open('{path}','w'))", "[y:=open('{path}','w'), 42][1]", "f\"{{open('{path}','w')}}\"",
    "\\immediate\\write18{{touch {path}}} 42", "eval('42') or open('{path}', 'w')", "lambda: open('{path}', 'w')",
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb: str) -> None:
    def refuse() -> None:
        judge_pair.cache_clear()
        for gold in GOLDS:
            assert not compare_texts(gold, bomb).equal
        score = accuracy_reward([], [f"<think>t</think><answer>{bomb}</answer>"], answer=["42"])[0]
        assert score.value == 0.0

    assert_takes_less(1.5, refuse)


@pytest.mark.parametrize("code", CODE)
def test_code_is_text(code: str, tmp_path: object) -> None:
    path = f"{tmp_path}/made"
    answer = code.format(path=path)
    accuracy_reward([], [f"<think>t</think><answer>{answer}</answer>", answer], answer=["42", "42"])
    assert accuracy_reward([], [answer], answer=["42"], tagged=False)[0].value in (0.0, 1.0)
    with pytest.raises(FileNotFoundError):
        open(path).close()


def test_a_list_much_longer_than_the_reference_is_refused() -> None:
    assert compare_texts("42", "42, 42").equal
    assert not compare_texts("42", "42, " * 50 + "42").equal


@pytest.mark.parametrize("hidden", ["\u200b", "\u202e", "\u2066", "\x00", "\ud800", "\u00ad"])
def test_hidden_characters_are_named(hidden: str) -> None:
    match = compare_texts("42", f"4{hidden}2")
    assert not match.equal
    assert match.rule == f"character U+{ord(hidden):04X} inside the answer"


def test_limits_are_named() -> None:
    with pytest.raises(TooLarge):
        evaluate(parse_math("9^{9^{9^9}}"), {})
    assert exact_value(parse_math("9^{99999}")) is None
    assert exact_value(parse_math("2^{100}")) == 2**100
    with pytest.raises(MathSyntaxError, match=r"nested|levels"):
        parse_math("(" * 100 + "1" + ")" * 100)
    assert compare_texts("2^{123456789}", "2^{123456789}").equal, "the same expression needs no evaluation"
    assert not compare_texts("2^{123456789}", "2^{123456788}").equal


PIECES = [
    "1", "2", "42", "x", "\\frac", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "^", "_", "+", "-", "*", "/", "=",
    "<", "\\le", "\\in",
    "\\cup", ",", ";", "!", "%", "\\sqrt", "\\pi", "\\sin", "|", ":", "\\text{a}", "\\pm", "and",
    "\\begin{pmatrix}", "\\end{pmatrix}",
    "&", "\\\\", " ", ".", "\\circ", "'", "$", "\\boxed", "i", "e", "\\infty", "\\sum", "\\ldots", "\\mathbb{R}",
    "apple", "the",
]  # fmt: skip


def test_random_text_never_raises() -> None:
    random.seed(17)
    for _ in range(3000):
        text = "".join(random.choice(PIECES) for _ in range(random.choice([2, 4, 8, 16, 40])))
        compare_texts(random.choice(GOLDS), text)
        accuracy_reward([], [text], answer=["42"], tagged=False)


def test_a_deep_stack_of_the_caller_is_no_problem() -> None:
    def call(depth: int) -> bool:
        return compare_texts("42", "(" * 15 + "42" + ")" * 15).equal if depth == 0 else call(depth - 1)

    assert call(450)
