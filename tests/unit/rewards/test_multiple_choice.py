"""multiple_choice: choices in blocks and in free text, letters in words, hedging, options by text."""

from __future__ import annotations

import pytest

from rewards.multiple_choice import chosen_letter, multiple_choice_reward, read_options

OPTIONS = ["A) 3", "B) 4", "C) 5", "D) 6"]


def tagged(answer: str, gold: str = "B", options: object = None) -> float | None:
    text = f"<think>t</think><answer>{answer}</answer>"
    return multiple_choice_reward([], [text], answer=[gold], options=[options])[0].value


@pytest.mark.parametrize(
    "answer",
    ["B", "(B)", "b", "B.", "B)", "[B]", "$B$", "**B**", "\\boxed{B}", "\\boxed{\\text{(B) }4}", "\\text{B}", "B) 4",
     "B. 4", "B: 4", "Option B", "The answer is B.", "The correct answer is (B) 4.", "option (b)", "not A, B",
     "答案是B", "选B"],
)  # fmt: skip
def test_honest_answers(answer: str) -> None:
    assert tagged(answer) == 1.0
    assert tagged(answer, options=OPTIONS) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["A", "C", "A or B", "A and B", "Both A and B", "A, B", "B/C", "A B C D", "ABCD", "Both are bad, because",
     "None of the above", "(A) or (B)", "A) 3 B) 4", "\\boxed{A} \\boxed{B}", "\\boxed{AB}", "Banana", "not B",
     "It's not (B)", "",
     "the second one", "A car", "x" * 100_000, "B " * 50_000 + "A"],
)  # fmt: skip
def test_cheats(answer: str) -> None:
    assert tagged(answer) == 0.0
    assert tagged(answer, options=OPTIONS) == 0.0


def test_the_text_of_an_option_chooses_it() -> None:
    assert tagged("4", options=OPTIONS) == 1.0
    assert tagged("\\frac{8}{2}", options=OPTIONS) == 1.0
    assert tagged("4") == 0.0
    assert tagged("5", options=OPTIONS) == 0.0
    assert tagged("(B) 3", options=OPTIONS) == 0.0, "letter and text contradict each other"
    assert tagged("B", gold="4", options=OPTIONS) == 1.0, "the reference may be the text of an option"


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("So the correct answer is:\n\nB) 4", "B", 1.0),
        ("So the answer is B)4.", "B", 1.0),
        ("thinking about it I think the correct answer is C", "C", 1.0),
        ("It's not A because it makes no sense, therefore I think it's B", "B", 1.0),
        ("The answer is A. Wait, no: the answer is B.", "B", 1.0),
        ("The answer is B. Wait, no: the answer is A.", "B", 0.0),
        ("B不是 A", "B", 1.0),
        ("Option D) 6: too large.\n\nNone of the given options match.", "D", 0.0),
        ("There might be an error in the question or the answer options provided.", "A", 0.0),
        ("<think>B</think>I do not know.", "B", 0.0),
        ("<think>the answer is B", "B", 0.0),
        ("A quick note: the sum is 4.", "A", 0.0),
        ("45 - 30 = 15\nSo the correct option is (A).", "A", 1.0),
        ("C.P. of 1 kg is 5.\nTherefore, the answer is A.", "A", 1.0),
        ("Answer: D\n\nHence, option A is correct.", "A", 1.0),
        ("The answer is D/3, which is option A.", "A", 1.0),
        ("It is not A, C or D, so it must be B.", "B", 1.0),
        ("Both A and C are wrong; B is right.", "B", 1.0),
        ("The answer is D. Wait, no, it's B.", "B", 1.0),
        ("The answer is D. Wait, no, it's B.", "D", 0.0),
        ("A: The answer is B.", "B", 1.0),
    ],
)
def test_free_text(text: str, gold: str, value: float) -> None:
    assert multiple_choice_reward([], [text], answer=[gold], tagged=False)[0].value == value


def test_an_option_that_is_said_literally_is_meant() -> None:
    options = ["2% profit", "3% profit", "2% loss", "3% loss"]
    assert tagged("3% loss", gold="D", options=options) == 1.0
    assert tagged("The answer is 34, 62.", gold="A", options=["34, 62", "62, 34"]) == 1.0
    rupees = chosen_letter("The answer is Rs. 750.", read_options(["Rs. 7", "Rs. 750"]), strict=False)
    assert rupees.answer == "B"


def test_options_are_read_in_every_form() -> None:
    assert read_options(["A)A)59", "B)69"]).texts == {"A": "59", "B": "69"}
    assert read_options(["red", "blue"]).texts == {"A": "red", "B": "blue"}
    assert read_options({"a": 1, "b": 2}).texts == {"A": "1", "B": "2"}
    assert tagged("D", gold="D", options=["3", "4"]) is None, "the reference is no option: masked"


def test_missing_column() -> None:
    with pytest.raises(ValueError, match="'answer'"):
        multiple_choice_reward([], ["<answer>B</answer>"], gold=["B"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("La réponse est B", "B"),
        ("la bonne réponse est B.", "B"),
        ("答案是B", "B"),
        ("答案：B", "B"),
        ("答案是 (B)", "B"),
        ("正确答案是B。", "B"),
        ("选项B正确", "B"),
        ("因此选B", "B"),
        ("The answer is **B**.", "B"),
        ("**B**", "B"),
        ("B. 4", "B"),
        ("B: because 2+2=4", "B"),
        ("B, because 2+2=4. A is wrong.", "B"),
        ("I would choose B.", "B"),
        ("Answer: B", "B"),
        ("Answer:\nB", "B"),
        ("answer B", "B"),
        ("Option B is correct.", "B"),
        ("The correct choice is (b).", "B"),
        ("So it must be B", "B"),
        ("\\boxed{B}", "B"),
        ("The final answer is $\\boxed{B}$.", "B"),
        ("Not A, not C, so B.", "B"),
        ("A and C are wrong. The answer is B.", "B"),
        ("A is wrong; B is right.", "B"),
        ("B is the answer.", "B"),
        ("B is correct, A is not.", "B"),
        ("(B)", "B"),
        ("Ans: B", "B"),
        ("ANSWER: B", "B"),
        ("The answer is\n\nB", "B"),
        ("My answer is b", "B"),
        ("Die Antwort ist B", "B"),
        ("La respuesta es B", "B"),
        ("Ответ: B", "B"),
        ("答え：B", "B"),
        ("回答是B", "B"),
        ("Hence, option (B) is the right answer.", "B"),
        ("The answer is A or B", None),
        ("The answer is not B", None),
    ],
)
def test_stated_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text, read_options(None), strict=False).answer == letter
