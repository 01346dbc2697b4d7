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


_OPTION = re.compile(
    r"\A\W*(?:\\(?:text(?:bf|rm|it)?|mathbf|mathrm|bf)\s*\{?\s*)?"
    r"(?:\([A-H]\)|[A-H][).:])\s*\}?(?:\\[ ,;:]|[\s~])*(?=\S)"
)
_SHARE = re.compile(r"(\d+) out of (\d+)")
_LEAD = re.compile(r"(?:it is|it's|this is|on|in|at)\s+(?=[a-z]{3})(.+)")
_SAYS = re.compile(r"(?:[a-z]+ ){1,5}(?:is|are|was) ([a-z]{3,})")
_VERDICT = re.compile(r"(?=yes, \w+ \w+\Z|no, \w+ (?:\w+ not|\w+n't)\Z)(yes|no), (?:it|he|she|they|this|that|there) .+")
DENIED = re.compile(r"\b(?:not|never|neither|nor|no|if|unless|false|wrong|untrue|doubt)\b")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?\s?([ap]m)?")
_LABELLED = re.compile(r"\(?([A-H])[).:]\s*(?=\S)(.+)|\(([A-H])\)\s*(.+)", re.DOTALL)


def same_clock(gold: str, answer: str) -> Match | None:
    """Times of day, at least one of them with am or pm, or a full hour: `9 am` is `9:00 a.m.`, and `9` is `9:00`; a
    missing half of the day is forgiven."""
    left, right = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if left is None or right is None or not (left.group(2) or right.group(2)):
        return None
    if not (left.group(3) or right.group(3)) and (left.group(2) or right.group(2) != "00"):
        return None
    same_time = int(left.group(1)) == int(right.group(1)) and (left.group(2) or "00") == (right.group(2) or "00")
    halves = {left.group(3), right.group(3)} - {None}
    return Match(same_time and len(halves) == 1, "time of day")


def option_value(text: str) -> str | None:
    """What stands behind the letter of an option, or None.

    >>> option_value(r"\\textbf{(C)}\\ 15"), option_value("15")
    ('15', None)
    """
    label = _OPTION.match(text)
    value = text[label.end() :].strip() if label is not None else ""
    return (value.removesuffix("}") if value.count("}") > value.count("{") else value) or None


def reworded(answer: str) -> str | None:
    """Another reading of an answer that no rule found equal: without an option's letter, a share as a fraction, words
    without their preposition or sentence (`(C) 15`, `5 out of 36`, `on Tuesday`, `the function is even`)."""
    plain = plain_words(answer)
    if share := _SHARE.fullmatch(plain):
        return f"{share.group(1)}/{share.group(2)}"
    if lead := _LEAD.fullmatch(plain) or (_SAYS.fullmatch(plain) if not DENIED.search(plain) else None):
        return lead.group(1)
    if verdict := _VERDICT.fullmatch(plain):
        return verdict.group(1)
    return option_value(answer)


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
