"""`reasoning_steps`: does the text go step by step?

In: completions. Out: `Score`s from 0 to 1. Counts steps that say something and say it once, so that a row of empty
markers earns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.base import Completion, Score, completion_text
from rewards.reward_entry import checked_by

_ORDINALS = "first|second|third|next|then|finally|firstly|secondly|lastly"
_MARKER = re.compile(
    rf"[ \t>]*\**(?:step\s+\d{{1,4}}\s*[:.)]|\d{{1,4}}[.)](?=\s)|[-*+\u2022](?=\s)|(?:{_ORDINALS})\b,?)", re.IGNORECASE
)
_ORDINAL = re.compile(rf"(?:{_ORDINALS}|step)\W*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_WORDS = 3


def _check(**params: Any) -> None:
    steps = params.get("target_steps", 3)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"target_steps: {steps!r} is not allowed; a whole number, at least 1")


@checked_by(_check)
def reasoning_steps_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    target_steps: int = 3,
    **columns: Any,
) -> list[Score]:
    """min(1, steps / target_steps), where a step is a sentence or line that begins with a marker ("Step 1:", "2.", "-",
    "First,", "Next", "Finally", ...), goes on for at least three words, and differs from the steps before it.

    Range [0, 1]. Source: open-r1's `reasoning_steps`, which counts the markers alone; here a marker needs its step.

    >>> text = "First, add two and two. Next, take the square. Next, take the square."
    >>> round(reasoning_steps_reward([], [text])[0].value, 2)
    0.67
    """
    scores: list[Score] = []
    for completion in completions:
        steps = count_steps(completion_text(completion))
        scores.append(Score(min(1.0, steps / target_steps), f"{steps} steps", rule="steps"))
    return scores


def count_steps(text: str) -> int:
    """How many distinct steps the text takes."""
    seen: set[str] = set()
    for line in text.replace("<think>", "\n").splitlines():
        start = _MARKER.match(line)  # the point of "1." ends no sentence
        first, *others = _SENTENCE_END.split(line[start.end() :] if start else line)
        bodies = [first] if start else []
        for sentence in others if start else (first, *others):
            if marker := _MARKER.match(sentence):
                bodies.append(sentence[marker.end() :])
        for body in bodies:
            words = [word for word in body.lower().split() if any(map(str.isalnum, word))]
            if sum(not _ORDINAL.fullmatch(word) for word in words) >= _WORDS:
                seen.add(" ".join(words))
    return len(seen)
