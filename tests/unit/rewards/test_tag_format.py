"""format, format_prefilled, tag_count and the answer block: tables of (text, score), hostile rows included."""

from __future__ import annotations

import pytest

from rewards.tag_format import (
    answer_block,
    format_fault,
    format_prefilled_reward,
    format_reward,
    is_blank,
    tag_count_reward,
)
from tests.clock import assert_takes_less

GOOD = "<think>6 * 7 = 42.</think>\n<answer>42</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        ("\n  " + GOOD + "  \n", 1.0),
        (GOOD.replace("\n", "\r\n"), 1.0),
        (GOOD + "<|im_end|>\n", 1.0),
        (GOOD + "<|im_end|><|endoftext|>", 1.0),
        ("<think>六乘七 🙂 <b>x</b></think><answer>4</answer>", 1.0),
        ("", 0.0),
        ("42", 0.0),
        ("<think></think><answer>42</answer>", 0.0),
        ("<think> \n\t</think><answer>42</answer>", 0.0),
        ("<think>\u200b</think><answer>42</answer>", 0.0),
        ("<think>x</think><answer></answer>", 0.0),
        ("<think>x</think><answer>\u200b\ufeff</answer>", 0.0),
        ("Sure! " + GOOD, 0.0),
        ("<think>x</think> so <answer>42</answer>", 0.0),
        (GOOD + " Done.", 0.0),
        (GOOD + "<|im_end|> more", 0.0),
        (GOOD + "<answer>41</answer>", 0.0),
        (GOOD + GOOD, 0.0),
        ("<answer>42</answer><think>x</think>", 0.0),
        ("<think>x<answer>42</answer></think>", 0.0),
        ("<think>a<think>b</think>c</think><answer>42</answer>", 0.0),
        ("<think>x</think><answer>42", 0.0),
        ("<think>x</think>42</answer>", 0.0),
        ("x</think><answer>42</answer>", 0.0),
        ("<Think>x</Think><Answer>42</Answer>", 0.0),
        ("< think >x</ think ><answer>42</answer>", 0.0),
        ('<think id="1">x</think><answer>42</answer>', 0.0),
        ("<think>x</think><\u0430nswer>42</\u0430nswer>", 0.0),
        ("&lt;think&gt;x&lt;/think&gt;&lt;answer&gt;42&lt;/answer&gt;", 0.0),
        ("<think>x</think><answer>42<answer></answer>", 0.0),
    ],
)
def test_format(text: str, value: float) -> None:
    assert format_reward([], [text])[0].value == value


def test_format_says_why() -> None:
    assert format_fault("<think></think><answer>1</answer>") == "the think block is empty"
    assert format_fault(GOOD + "!") == "text after </answer>"
    assert format_reward([], [GOOD])[0].reason == "well formed"


def test_prefilled_adds_the_opening_tag_of_the_prompt() -> None:
    scores = format_prefilled_reward([], ["x</think><answer>42</answer>", GOOD, "</think><answer>42</answer>"])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        ("", 0.0),
        ("<think>x", 0.25),
        ("<think>x</think>", 0.5),
        ("<think>x</think><answer>", 0.75),
        ("<think>x</think><answer>4", 0.75),
        ("x</think><answer>4</answer>", 0.5),
        ("<think></think><answer></answer>", 0.5),
        ("<think>x</think><answer>4</answer><answer>5</answer>", 0.5),
        ("</answer></think><answer><think>", 0.25),
        ("<think>" * 100, 0.0),
    ],
)
def test_tag_count(text: str, value: float) -> None:
    assert tag_count_reward([], [text])[0].value == value


def test_tag_count_prefilled() -> None:
    assert tag_count_reward([], ["x</think><answer>4</answer>"], prefilled=True)[0].value == 1.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (GOOD, "42"),
        ("<answer>42</answer>", "42"),
        ("Sure! " + GOOD + " Done.", "42"),
        ("6 * 7</think><answer>42</answer>", "42"),
        ("is it <answer>41</answer>?</think><answer>42</answer>", "42"),
        ("<think>x</think></think><answer>42</answer>", "42"),
        ("<think>is it <answer>41</answer>?</think><answer>42</answer>", "42"),
        ("<think>x</think><answer>41</answer><answer>42</answer>", None),
        ("<answer>42</answer><think>x</think><answer>41</answer>", None),
        ("<think>x</think><answer>41</answer></think><answer>42</answer>", None),
        ("<think>x</think><!-- <answer>41</answer> --><answer>42</answer>", None),
        ("<think><answer>42</answer></think>", None),
        ("<think>x<answer>42</answer>", None),
        ("<think>x</think><answer>42</answer><think>y", None),
        ("<think>x</think><answer>4<think>2</think></answer>", None),
        ("<think>x</think></answer>42<answer>", None),
        ("<think>x</think><answer><answer>42</answer></answer>", None),
        ("<think>x</think><answer> \n </answer>", None),
        ("42", None),
    ],
)
def test_answer_block(text: str, content: str | None) -> None:
    assert answer_block(text).content == content


def test_conversational_completions_are_read() -> None:
    messages = [{"role": "assistant", "content": GOOD}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]
    assert [score.value for score in format_reward([], [messages, parts])] == [1.0, 1.0]


def test_blank() -> None:
    assert is_blank(" \n\u200b\u00a0\x00")
    assert not is_blank(" .")


@pytest.mark.parametrize(
    "piece",
    ["<", "<think>", "</think>", "<answer>", "<answer></answer>", " ", "\n", "</answer>\n", "<|im_end|>", "<thin"],
)
def test_time_is_linear(piece: str) -> None:
    """300,000 characters of anything are parsed within tenths of a second, also behind a well-formed head."""
    text = piece * (300_000 // len(piece))

    def parse() -> None:
        for candidate in (text, "<think>" + text, GOOD + text):
            format_reward([], [candidate])
            answer_block(candidate)

    assert_takes_less(3.0, parse)
