"""pass@k, maj@k and intervals against enumeration, published values, and coverage in simulation."""

import itertools

import numpy as np
import pytest

from rewards.math_answer import judge_pair
from rl.train.evaluation_stats import (
    Vote,
    bootstrap_mean,
    majority_accuracy,
    majority_vote,
    pass_at_k,
    pass_at_k_interval,
    wilson_interval,
)
from tests.clock import assert_takes_less


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(num_samples: int) -> None:
    for right in range(num_samples + 1):
        samples = [True] * right + [False] * (num_samples - right)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(right, num_samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_for_large_numbers() -> None:
    assert pass_at_k(1, 10_000, 5_000) == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k(0, 10_000, 5_000) == 0.0 and pass_at_k(6_000, 10_000, 5_000) == 1.0


def test_pass_at_k_is_unbiased() -> None:
    """p = 0.3: the true pass@3 is 1 - 0.7^3 = 0.657; the plug-in estimate from n = 4 would average 0.552."""
    generator = np.random.default_rng(0)
    counts = generator.binomial(4, 0.3, size=20_000).tolist()
    assert pass_at_k_interval([(count, 4) for count in counts[:200]], 3).value == pytest.approx(0.657, abs=0.06)
    assert sum(pass_at_k(count, 4, 3) for count in counts) / len(counts) == pytest.approx(0.657, abs=0.01)


def test_wilson_against_published_values() -> None:
    """0 of 10, 8 of 10 and 15 of 148: the examples of Newcombe 1998 and of common tables."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_covers() -> None:
    generator = np.random.default_rng(1)
    counts = generator.binomial(100, 0.93, size=2000)
    covered = sum(low <= 0.93 <= high for low, high in (wilson_interval(int(c), 100) for c in counts))
    assert 0.92 <= covered / 2000 <= 0.98


def test_problems_may_have_different_numbers_of_samples() -> None:
    """Of 1 in 2 and 1 in 4 samples: pass@1 is (1/2 + 1/4) / 2, pass@2 is (1 + 1/2) / 2."""
    assert pass_at_k_interval([(1, 2), (1, 4)], 1).value == pytest.approx(3 / 8)
    assert pass_at_k_interval([(1, 2), (1, 4)], 2).value == pytest.approx(3 / 4)


VOTES: list[tuple[list[Vote], float]] = [
    ([("7", True), ("8", False), ("7", True)], 1.0),
    ([("7", True), ("8", False), ("8", False)], 0.0),
    ([("7", True), ("8", False)], 0.5),
    ([("7", True), ("8", False), ("9", False)], 1 / 3),
    ([("7", True), (None, False), (None, False)], 1.0),  # those without an answer do not outvote
    ([(None, False), (None, False)], 0.0),
    ([("7", True), ("7", False)], 0.5),  # judged differently
    ([("7", True)], 1.0),
    # one right answer, written in three ways, against two and three times the same wrong one
    ([("1/2", True), ("0.5", True), (r"\frac{1}{2}", True), ("2", False), ("2", False)], 1.0),
    ([("1/2", True), ("0.5", True), ("3", False), ("3.0", False), ("$3$", False)], 0.0),
    ([("1/2", True), ("50%", True), ("3/4", False), ("0.75", False), (r"\dfrac{3}{4}", False), ("1", False)], 0.0),
    ([("1", True), ("x+1", False), ("1 + x", False)], 0.0),
    ([("1", True), ("north", False), ("North.", False)], 0.0),
    ([("1", True), ("north", False), ("south", False)], 1 / 3),
    ([(None, True), (None, True), ("2", False), ("3", False), ("4", False)], 1.0),
    # what could go wrong while answers are compared
    ([("1", True), ("1/0", False), ("0/0", False)], 1 / 3),
    ([("1", True), ("9" * 400 + "^" + "9" * 99, False), ("9^{9^{9^{9}}}", False)], 1 / 3),
    ([("1", True), ("x" * 100_000, False), ("x" * 100_000, False), ("y" * 100_000, False)], 0.0),
    ([("1", True), ("\u202e42", False), ("", False), ("٣", False)], 1 / 4),
]


@pytest.mark.parametrize(("votes", "expected"), VOTES)
def test_majority_vote(votes: list[Vote], expected: float) -> None:
    assert majority_vote(votes) == pytest.approx(expected)
    assert majority_vote(votes[::-1]) == pytest.approx(expected)


def test_plain_numbers_are_told_apart_as_the_accuracy_rules_do() -> None:
    """The short cut for numbers against the rules themselves."""
    numbers = ["3", "3.0", "-3", "03", "6/2", "1/3", "0.333", "0.5", "1/2", "-0.5", "123456.789", "1000", "999999999"]
    for first, second in itertools.product(numbers, numbers):
        expected = 0.0 if judge_pair(first, second).equal else 1 / 3
        assert majority_vote([("x", True), (first, False), (second, False)]) == pytest.approx(expected), (first, second)


def test_a_thousand_different_answers_cost_seconds_at_most() -> None:
    answers = [f"{top}/{bottom}" for top in range(1, 40) for bottom in range(41, 67)]

    def vote() -> None:
        judge_pair.cache_clear()
        majority_vote([("1", True), *((answer, False) for answer in answers)])

    assert_takes_less(3.0, vote)


def test_majority_accuracy_is_the_mean_over_problems() -> None:
    right, wrong = ("1", True), ("2", False)
    votes: list[list[Vote]] = [[right, right, wrong, wrong, wrong], [right, wrong], [right]]
    assert majority_accuracy(votes).value == pytest.approx((0 + 0.5 + 1) / 3)


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = ([0.0] * 30 + [1.0] * 70) * 2
    first, again, other = bootstrap_mean(values), bootstrap_mean(values), bootstrap_mean(values, seed=1)
    assert first == again and first != other
    assert first.value == pytest.approx(0.7)
    half = 1.96 * (0.7 * 0.3 / 200) ** 0.5
    assert (first.low, first.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.01)
    assert bootstrap_mean([1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_all_right_or_all_wrong_is_not_certainty() -> None:
    assert pass_at_k_interval([(4, 4)] * 10, 2)[1:] == pytest.approx((0.7225, 1.0), abs=5e-5)
    assert majority_accuracy([[("1", False)]] * 10)[1:] == pytest.approx((0.0, 0.2775), abs=5e-5)
    # nor is one problem of which half of the samples are right: as wide as for 1 of 2 trials, or wider
    value, low, high = pass_at_k_interval([(4, 8)], 1)
    assert value == 0.5 and low < 0.0945 and high > 0.9055


def test_bootstrap_covers_the_mean_over_problems() -> None:
    """Problems differ in difficulty (Beta(1, 1)): the interval must cover 0.5, however many samples a problem has."""
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        counts = generator.binomial(16, generator.beta(1, 1, size=60)).tolist()
        found = bootstrap_mean([count / 16 for count in counts], seed=trial, resamples=300)
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_user_errors_are_named() -> None:
    with pytest.raises(ValueError, match="k=5"):
        pass_at_k(1, 4, 5)
    with pytest.raises(ValueError, match="right=5"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="confidence=95"):
        wilson_interval(1, 4, confidence=95)
    with pytest.raises(ValueError, match="no problems"):
        bootstrap_mean([])
