"""`repetition_penalty`: a text that says the same again and again is punished by the share of repeated n-grams.

In: completions. Out: `Score`s from max_penalty to 0. Works for scripts without blanks between words, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.base import Completion, Score, completion_text
from rewards.reward_entry import checked_by

_ONE_BY_ONE = (
    "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Thai, kana, Han: no blanks between words
)
_UNIT = re.compile(rf"[{_ONE_BY_ONE}]|[^\W{_ONE_BY_ONE}]+|[^\w\s]")


def _check(**params: Any) -> None:
    size, penalty = params.get("ngram_size", 3), params.get("max_penalty", -1.0)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"ngram_size: {size!r} is not allowed; a whole number, at least 1")
    if penalty > 0:
        raise ValueError(f"max_penalty: {penalty!r} is not allowed; at most 0")


@checked_by(_check)
def repetition_penalty_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[Score]:
    """max_penalty * (1 - distinct n-grams / all n-grams) over the words of the text, in lower case.

    Range [max_penalty, 0]; a text shorter than one n-gram gives 0. Source: Yeo et al. 2025 (arXiv 2502.03373),
    appendix; names and formula as in open-r1. Departures: a character of a script without blanks and a punctuation mark
    count as words, so that neither hides a repetition.

    >>> repetition_penalty_reward([], ["a b c a b c"])[0].value      # abc bca cab abc: 3 of 4 are distinct
    -0.25
    """
    scores: list[Score] = []
    for completion in completions:
        units = [unit.lower() for unit in _UNIT.findall(completion_text(completion))]
        grams = list(zip(*(units[start:] for start in range(ngram_size)), strict=False))
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        reason = f"{repeated:.0%} of {len(grams)} {ngram_size}-grams are repetitions"
        scores.append(Score(max_penalty * repeated if repeated else 0.0, reason, rule="ngrams"))
    return scores
