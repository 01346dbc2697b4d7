"""`majority`: self-reward by agreement with the most frequent answer of the group, without any reference.

In: the completions of whole groups, and `group_ids`. Out: `Score`s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rewards.base import Completion, Score, completion_text
from rewards.extract import free_answer
from rewards.math_answer import judge_pair, tagged_answer
from rewards.reward_entry import checked_by

_MAX_ANSWER_CHARS = 500


def _check(**params: Any) -> None:
    share = params.get("min_share", 0.0)
    if not 0 <= share <= 1:
        raise ValueError(f"min_share: {share!r} is not allowed; from 0 to 1")


@checked_by(_check)
def majority_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    group_ids: Sequence[int],
    tagged: bool = True,
    min_share: float = 0.0,
    **columns: Any,
) -> list[Score]:
    """1 / k for a completion whose answer is one of the k most frequent answers of its group, else 0; without an answer
    0.

    Range [0, 1]; k is 1 unless there is a tie. Answers are the same when the exact rules of `accuracy` say so.
    min_share: where the most frequent answer has a smaller share of the group, the group is not judged (None).
    Source: TTRL (arXiv 2504.16084), section 2.2; departure: ties share, there the first wins.

    >>> texts = ["<answer>0.5</answer>", "<answer>1/2</answer>", "<answer>3</answer>"]
    >>> [score.value for score in majority_reward([], texts, group_ids=[0, 0, 0])]
    [1.0, 1.0, 0.0]
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(group_ids):
        rows_of[group].append(row)
    scores = [Score(None)] * len(completions)
    for rows in rows_of.values():
        texts = [completion_text(completions[row]) for row in rows]
        for row, score in zip(rows, _score_group(texts, tagged, min_share), strict=True):
            scores[row] = score
    return scores


def _score_group(texts: Sequence[str], tagged: bool, min_share: float) -> list[Score]:
    answers = [(tagged_answer if tagged else free_answer)(text).answer for text in texts]
    kinds: list[str] = []  # one answer of each kind
    kind_of: list[str | None] = []
    for answer in answers:
        if answer is None or len(answer) > _MAX_ANSWER_CHARS:
            kind_of.append(None)
            continue
        kind = next((kind for kind in kinds if kind == answer or judge_pair(kind, answer).equal), answer)
        if kind is answer and answer not in kinds:
            kinds.append(answer)
        kind_of.append(kind)
    votes = {kind: kind_of.count(kind) for kind in kinds}
    most = max(votes.values(), default=0)
    if most < min_share * len(texts):
        return [Score(None, f"no answer has a share of {min_share:g}", rule="majority")] * len(texts)
    winners = [kind for kind in kinds if votes[kind] == most]
    told = f"{most} of {len(texts)} answers"
    return [
        Score(1 / len(winners) if kind in winners else 0.0, told, answer, " or ".join(winners)[:200], "majority")
        if kind is not None
        else Score(0.0, "no answer", rule="no answer")
        for kind, answer in zip(kind_of, answers, strict=True)
    ]
