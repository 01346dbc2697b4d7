"""Answers that are compared as text, before anything is parsed: times of day, option letters, lists of large numbers.

In: two texts, reference first. Out: a `Match`, or None when the rule does not apply.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.latex_text import plain_letters, plain_words, strip_edges


@dataclass(frozen=True, slots=True)
class Match:
    """equal: the answer states the reference. decided: False when neither side could be settled by our own rules (the
    symbolic verifier may try). rule: what decided."""

    equal: bool
    rule: str
    decided: bool = True


_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?\s?([ap]m)?")
_LABELLED = re.compile(r"\(?([A-H])[).:]\s*(?=\S)(.+)|\(([A-H])\)\s*(.+)", re.DOTALL)


def same_clock(gold: str, answer: str) -> Match | None:
    """Times of day, at least one of them with am or pm: `9 am` is `9:00 a.m.`; a missing half of the day is
    forgiven."""
    left, right = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if left is None or right is None or not (left.group(3) or right.group(3)) or not (left.group(2) or right.group(2)):
        return None
    same_time = int(left.group(1)) == int(right.group(1)) and (left.group(2) or "00") == (right.group(2) or "00")
    halves = {left.group(3), right.group(3)} - {None}
    return Match(same_time and len(halves) == 1, "time of day")


def same_choice(gold: str, answer: str) -> Match | None:
    """The reference is an option's letter and the answer is `(C) 12`: the letter decides."""
    letter = re.fullmatch(r"\(?([A-H])\)?", plain_words(gold).upper())
    labelled = _LABELLED.fullmatch(plain_letters(answer))
    if letter is None or labelled is None:
        return None
    return Match((labelled.group(1) or labelled.group(3)) == letter.group(1), "option letter")


def same_spaced_list(gold: str, answer: str) -> Match | None:
    """`100,200` may be a list or a number; it is the list `100, 200` when the answer writes it so."""
    if not re.search(r"\d,\d{3}(?!\d)", gold) or not re.search(r"\d,\s", answer):
        return None
    same = re.sub(r",\s+", ",", strip_edges(gold)) == re.sub(r",\s+", ",", strip_edges(answer))
    return Match(True, "same list") if same else None
