"""Chain arithmetic: right answers, honest traces, and held-out problems that nothing trains on."""

from __future__ import annotations

import re

import pytest

from rl.config import DataSection, DataSource, GeneratedTokenizer, TemplateSection
from rl.data import chain_arithmetic as chain
from rl.data.problems import load_train_and_eval
from rl.data.tokenizer import build_tokenizer


def slow_answer(prompt: str) -> int:
    """Left to right on the whole number, one modulo at the end of each step."""
    value = int(prompt[1])
    for sign, operand in re.findall(r"[b-j]([-+*])(\d)", prompt):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[sign] % 10
    return value


def test_steps_worked_out_by_hand() -> None:
    assert chain.steps("a5b-2c*6d+0e+9f-3g*7=") == ["a5", "b5-2=3", "c3*6=8", "d8+0=8", "e8+9=7", "f7-3=4", "g4*7=8"]
    assert chain.steps("a1b-3=") == ["a1", "b1-3=8"]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_problems_are_right_different_and_of_their_split(split: chain.Split) -> None:
    rows = list(chain.problems(split, 300, seed=1))
    assert len({row["prompt"] for row in rows}) == 300
    for row in rows:
        assert re.fullmatch(r"a\d(?:[b-g][-+*]\d){6}=", row["prompt"])
        assert row["answer"] == str(slow_answer(row["prompt"]))
        assert chain.is_held_out(row["prompt"]) == (split == "eval")


def test_seeds_reproduce_and_differ() -> None:
    first, again, other = (list(chain.problems("train", 20, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert list(chain.traces(20, seed=1)) == list(chain.traces(20, seed=1)) != list(chain.traces(20, seed=2))


def test_held_out_problems_are_never_trained_on() -> None:
    # three operations: 270,000 problems, few enough that unsplit draws of these sizes would meet
    held_out = {row["prompt"] for seed in range(3) for row in chain.problems("eval", 400, seed, operations=3)}
    trained = {row["prompt"] for seed in range(3) for row in chain.problems("train", 2000, seed, operations=3)}
    traced = {row["prompt"] for seed in range(3) for row in chain.traces(2000, seed, operations=3)}
    assert not held_out & (trained | traced)
    assert trained & {row["prompt"] for row in chain.problems("train", 2000, 0, operations=3)}


def test_about_a_tenth_is_held_out() -> None:
    every = [
        f"a{a}b{s}{b}c{t}{c}=" for a in range(10) for s in "+-*" for b in range(10) for t in "+-*" for c in range(10)
    ]
    assert 0.09 < sum(map(chain.is_held_out, every)) / len(every) < 0.11


def test_traces_reason_to_the_end_or_guess() -> None:
    full, guessed, right_guesses, steps_said = 0, 0, 0, {0: 0, 1: 0}
    for row in chain.traces(2000, seed=3):
        found = re.fullmatch(r"<think>(.+)</think><answer>(\d)</answer>", row["completion"])
        assert found is not None
        said, answer = found.group(1).split(";"), found.group(2)
        truth = chain.steps(row["prompt"])
        assert said == truth[: len(said)] and row["answer"] == str(slow_answer(row["prompt"]))
        if len(said) == 7:
            full += 1
            assert answer == row["answer"]
        else:
            guessed += 1
            steps_said[len(said) - 1] += 1
            right_guesses += answer == row["answer"]
    assert 0.57 < guessed / 2000 < 0.63 and full == 2000 - guessed
    assert 0.45 < steps_said[0] / guessed < 0.55
    assert 0.07 < right_guesses / guessed < 0.13


def test_giving_up_anywhere_and_never() -> None:
    lengths = {row["completion"].count(";") for row in chain.traces(300, guess_fraction=1.0, max_guess_steps=5)}
    assert lengths == {0, 1, 2, 3, 4, 5}
    assert {row["completion"].count(";") for row in chain.traces(50, guess_fraction=0.0)} == {6}


def test_a_full_trace_has_fifty_tokens() -> None:
    tokenizer = build_tokenizer(GeneratedTokenizer(type="characters", alphabet=chain.ALPHABET))
    row = next(iter(chain.traces(1, guess_fraction=0.0)))
    ids = tokenizer(row["completion"] + "<eos>")["input_ids"]
    assert len(ids) == 50 and tokenizer.unk_token_id not in ids
    assert len(tokenizer(row["prompt"])["input_ids"]) == 21
    assert len(tokenizer) == 32


def test_factors_limit_what_is_multiplied_by() -> None:
    rows = list(chain.problems("train", 200, factors="37"))
    assert set(re.findall(r"\*(\d)", "".join(row["prompt"] for row in rows))) == {"3", "7"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test", "size": 1}, "split = 'test': allowed: train, eval"),
        ({"split": "train", "size": 0}, "size = 0: allowed from 1"),
        ({"split": "train", "size": 1, "operations": 10}, "operations = 10: allowed from 1 to 9"),
        ({"split": "train", "size": 1, "factors": "x"}, "factors = 'x': allowed: digits"),
        ({"split": "eval", "size": 200, "operations": 1}, "there are not so many eval problems with 1 operations"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        list(chain.problems(**arguments))  # type: ignore[arg-type]
    for wrong in ({"guess_fraction": 1.5}, {"max_guess_steps": 6}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
            list(chain.traces(1, **wrong))  # type: ignore[arg-type]


def test_the_task_loads_through_a_recipe_section() -> None:
    def source(split: str) -> DataSource:
        return DataSource(source="rl.data.chain_arithmetic:problems", params={"split": split, "size": 30})

    data = DataSection(train=source("train"), eval=source("eval"), template=TemplateSection(kind="raw"))
    tokenizer = build_tokenizer(GeneratedTokenizer(type="characters", alphabet=chain.ALPHABET))
    train, held_out = load_train_and_eval(data, tokenizer, seed=7)
    assert held_out is not None and len(train) == len(held_out) == 30
    assert load_train_and_eval(data, tokenizer, seed=8)[0][0].prompt != train[0].prompt
