"""`exact_match`: the answer is the reference, character for character up to case and white space (both optional)."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.base import Completion, Score, completion_text
from rewards.tag_format import answer_block


def exact_match_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    *,
    gold_column: str = "answer",
    tagged: bool = True,
    ignore_case: bool = False,
    **columns: Sequence[object],
) -> list[Score]:
    """1.0 when the answer equals the reference after runs of white space are made one blank, else 0.0; None when the
    row has no reference.

    Range: {0, 1}. `tagged`: compare the content of the one answer block, else the whole completion. A reference that
    is a list allows each of its members. ValueError when the column is missing or has another length. Source: exact
    match of SQuAD (arXiv 1606.05250), with several references as there; departures: punctuation and articles count,
    and so does case unless `ignore_case`.

    >>> exact_match_reward([], ["<think>...</think><answer> Paris </answer>"], answer=["Paris"])[0].value
    1.0
    """
    golds = columns.get(gold_column)
    if golds is None or len(golds) != len(completions):
        raise ValueError(f"exact_match: column {gold_column!r} with {len(completions)} values is needed")
    return [
        _score(completion_text(completion), gold, tagged=tagged, ignore_case=ignore_case)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _score(text: str, gold: object, *, tagged: bool, ignore_case: bool) -> Score:
    allowed = [str(item) for item in gold] if isinstance(gold, (list, tuple)) else [str(gold)]
    if gold is None or not allowed:
        return Score(None, "the row has no reference", rule="no reference")
    answer: str | None = text
    reason = ""
    if tagged:
        block = answer_block(text)
        answer, reason = block.content, block.reason
    if answer is None:
        return Score(0.0, reason, None, allowed[0], "no answer")
    stated = _normalised(answer, ignore_case)
    equal = bool(stated) and any(stated == _normalised(item, ignore_case) for item in allowed)
    return Score(float(equal), "equal" if equal else "different", answer[:500], allowed[0], "exact")


def _normalised(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
