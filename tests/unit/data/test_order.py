"""The order of problems: a pure function of the step, each problem once an epoch, none twice in a step."""

from __future__ import annotations

from collections import Counter

import pytest

from rl.data.order import ProblemOrder

SIZES = [(1, 1), (5, 2), (7, 7), (64, 16), (10, 4), (7, 5), (9, 8), (100, 33)]


@pytest.mark.parametrize(("problems", "per_step"), SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_problem_once_an_epoch_and_never_twice_in_a_step(problems: int, per_step: int, shuffle: bool) -> None:
    order = ProblemOrder(problems, seed=3, prompts_per_step=per_step, shuffle=shuffle)
    steps = [order.indices(step) for step in range(4 * problems)]
    assert all(len(set(indices)) == per_step for indices in steps)
    stream = [index for indices in steps for index in indices]
    for start in range(0, len(stream) - problems + 1, problems):
        assert sorted(stream[start : start + problems]) == list(range(problems))


def test_a_step_needs_no_steps_before_it() -> None:
    forward = ProblemOrder(10, seed=1, prompts_per_step=4)
    seen = [forward.indices(step) for step in range(60)]
    for step in (59, 0, 31, 58):
        assert ProblemOrder(10, seed=1, prompts_per_step=4).indices(step) == seen[step]


def test_seeds_and_epochs_give_other_orders() -> None:
    one, two = (ProblemOrder(50, seed=seed, prompts_per_step=50).indices(0) for seed in (1, 2))
    assert one != two and one != list(range(50))
    assert ProblemOrder(50, seed=1, prompts_per_step=50).indices(1) != one


def test_order_is_the_same_on_every_machine() -> None:
    assert ProblemOrder(6, seed=0, prompts_per_step=3).indices(0) == [4, 0, 3]


def test_steps_larger_than_the_data_set_repeat_evenly() -> None:
    order = ProblemOrder(3, seed=0, prompts_per_step=8)
    counts = Counter(order.indices(0))
    assert sorted(counts.values()) == [2, 3, 3]


def test_without_shuffling_rows_come_in_their_order() -> None:
    order = ProblemOrder(5, seed=0, prompts_per_step=2, shuffle=False)
    assert [order.indices(step) for step in range(3)] == [[0, 1], [2, 3], [4, 0]]


def test_epochs_completed() -> None:
    assert ProblemOrder(20, seed=5, prompts_per_step=8).epoch(5) == 2.0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        ProblemOrder(0, seed=0, prompts_per_step=1)
    with pytest.raises(ValueError, match="count from 0"):
        ProblemOrder(3, seed=0, prompts_per_step=1).indices(-1)
