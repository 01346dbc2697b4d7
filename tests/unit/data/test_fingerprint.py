"""What a checkpoint remembers of its data: everything that decides the order and the words of a run, and no more."""

from __future__ import annotations

from dataclasses import replace

from rl.data import SFTRow, fingerprint
from rl.types import Problem

PROBLEMS = [Problem("a", "1+1=", (1, 2), {"answer": "2", "level": 3}), Problem("b", "2+2=", (3, 2), {"answer": "4"})]


def test_equal_rows_have_equal_digests_whatever_their_other_columns_say() -> None:
    again = [replace(PROBLEMS[0], columns={"answer": "2", "level": object()}), PROBLEMS[1]]
    assert fingerprint(PROBLEMS) == fingerprint(again) == fingerprint(iter(PROBLEMS))
    assert len(fingerprint(PROBLEMS)) == 16


def test_every_change_of_rows_changes_the_digest() -> None:
    first, second = PROBLEMS
    others = [
        [],
        [first],
        [second, first],
        [*PROBLEMS, replace(first, id="c")],
        [replace(first, id="c"), second],
        [replace(first, prompt_ids=(1, 3)), second],
        [replace(first, columns={"answer": "3"}), second],
        [SFTRow("1+1=", (1, 2), (0, 1))],
        [SFTRow("1+1=", (1, 2), (1, 1))],
        [SFTRow("1+1=", (1, 3), (0, 1))],
    ]
    assert len({fingerprint(rows) for rows in [PROBLEMS, *others]}) == len(others) + 1
