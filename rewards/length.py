"""Rewards of length: `cosine` scales correctness by it, `soft_overlong_punishment` discourages reaching the limit.

In: `completion_ids`, whose lengths in tokens count. Out: `Score`s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewards.base import Completion, Score
from rewards.math_answer import accuracy_reward
from rewards.reward_entry import checked_by


def _check_cosine(**params: Any) -> None:
    length = params.get("max_len", 1000)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"max_len: {length!r} is not allowed; a number of tokens, at least 1")


@checked_by(_check_cosine)
def cosine_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_len: int = 1000,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    gold_column: str = "answer",
    tagged: bool = True,
    **columns: Sequence[Any],
) -> list[Score]:
    """Correct answers are worth more when short, wrong ones cost less when long:

        start + (end - start) * (1 - cos(pi * min(tokens / max_len, 1))) / 2

    with (start, end) = (max_value_correct, min_value_correct) for a correct answer and (min_value_wrong,
    max_value_wrong) for a wrong one. Range: between the four values. What is correct is decided by `accuracy`; None
    where that gives None. Source: Yeo et al. 2025 (arXiv 2502.03373), section 4.1; names as in open-r1's `cosine`.
    Departures: length in tokens, not characters, and constant beyond max_len, where open-r1's cosine rises again.

    >>> texts, ids = ["<answer>4</answer>"] * 3, [range(0), range(50), range(200)]
    >>> [round(score.value, 2) for score in cosine_reward([], texts, ids, max_len=100, answer=["4"] * 3)]
    [1.0, 0.75, 0.5]
    """
    verdicts = accuracy_reward(prompts, completions, completion_ids, gold_column=gold_column, tagged=tagged, **columns)
    scores: list[Score] = []
    for verdict, tokens in zip(verdicts, map(len, completion_ids), strict=True):
        if verdict.value is None:
            scores.append(verdict)
            continue
        correct = verdict.value == 1.0
        start, end = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
        value = start + (end - start) * (1 - math.cos(math.pi * min(tokens / max_len, 1.0))) / 2
        reason = f"{'correct' if correct else 'wrong'} with {tokens} of {max_len} tokens; {verdict.reason}"
        scores.append(Score(value, reason, verdict.extracted, verdict.gold, verdict.rule))
    return scores


def _check_overlong(**params: Any) -> None:
    length, cache = params.get("max_completion_len"), params.get("soft_punish_cache")
    if not isinstance(length, int) or not isinstance(cache, int) or not 0 < cache <= length:
        raise ValueError(
            f"soft_punish_cache: {cache!r} with max_completion_len: {length!r} is not allowed; "
            "whole numbers of tokens, 0 < soft_punish_cache <= max_completion_len"
        )


@checked_by(_check_overlong)
def soft_overlong_punishment_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_len: int,
    soft_punish_cache: int,
    **columns: Any,
) -> list[Score]:
    """0 up to max_completion_len - soft_punish_cache tokens, falling linearly to -1 at max_completion_len, -1 beyond.

    Range [-1, 0]. Source: DAPO (arXiv 2503.14476), equation 13; names as in TRL's get_soft_overlong_punishment.

    >>> limits, ids = {"max_completion_len": 100, "soft_punish_cache": 20}, [range(80), range(90), range(101)]
    >>> [round(score.value, 2) for score in soft_overlong_punishment_reward([], [""] * 3, ids, **limits)]
    [0.0, -0.5, -1.0]
    """
    scores = []
    for tokens in map(len, completion_ids):
        over = tokens - (max_completion_len - soft_punish_cache)
        value = min(0.0, max(-1.0, -over / soft_punish_cache))
        scores.append(Score(value, f"{tokens} tokens of at most {max_completion_len}", rule="length"))
    return scores
