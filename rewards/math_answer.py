"""`accuracy`: does the completion's answer equal the reference?

In: completions and a column of reference answers. Out: one `Score` each, 1.0 or 0.0, with the extracted answer, the
reference as understood and the rule that decided; None where the row has no reference.

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2 "accuracy rewards". Departures from math-verify, which open-r1
and TRL use: the answer is read from the answer block only, everything that can be settled by the exact rules of
`math_compare` is settled in this process within microseconds, and sympy runs only for the rest, in workers that are
killed at their limit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.answer_text import DENIED, Match
from rewards.base import Completion, Score, completion_text
from rewards.extract import after_thinking, free_answer
from rewards.latex_text import HostileText, plain_words
from rewards.math_compare import compare_texts
from rewards.phrases import Extraction
from rewards.pool import Outcome
from rewards.strict_answer import HEDGE, block_answer
from rewards.symbolic import verify_pairs, worth_trying
from rewards.tag_format import AnswerBlock, answer_block

MAX_ANSWER_CHARS = 3000
_WORD = re.compile(r"[^\W\d_]{3}")


@dataclass(frozen=True, slots=True)
class Case:
    """One pair to judge: the reference and the extraction from the completion."""

    gold: str
    found: Extraction


def reference_answer(value: object) -> str | None:
    """The reference as text: the value itself, or for a GSM8K solution what stands behind its last `####`. None for a
    missing reference.

    >>> reference_answer("6 * 7 = <<6*7=42>>42\\n#### 42"), reference_answer(0.5), reference_answer(None)
    ('42', '0.5', None)
    """
    if value is None or isinstance(value, (dict, list, tuple, bool)):
        return None
    text = str(value)
    _, marker, last = text.rpartition("####")
    text = (last if marker else text).strip()
    return text or None


@functools.lru_cache(maxsize=65536)
def judge_pair(gold: str, answer: str) -> Match:
    """`compare_texts` with a memory, since a group often repeats one answer."""
    return compare_texts(gold, answer)


def judge_cases(cases: Sequence[Case]) -> list[Score]:
    """Scores of many cases; those that the exact rules cannot settle go to the symbolic verifier in one batch."""
    scores: list[Score] = []
    open_cases: list[tuple[int, str, str]] = []
    for case in cases:
        score, undecided = _judge(case)
        if undecided and case.found.answer is not None:
            open_cases.append((len(scores), case.gold, case.found.answer))
        scores.append(score)
    if open_cases:
        outcomes = verify_pairs([(gold, answer) for _, gold, answer in open_cases])
        for (index, gold, answer), outcome in zip(open_cases, outcomes, strict=True):
            scores[index] = _verified(outcome, gold, answer)
    return scores


def _verified(outcome: Outcome, gold: str, answer: str) -> Score:
    if outcome.status == "ok":
        equal = outcome.value is True
        return Score(float(equal), "equal" if equal else "different", answer, gold, "math-verify")
    reason = f"math-verify: {outcome.error}"
    if outcome.status == "broken":  # the verifier does not work, which says nothing about the answer
        return Score(None, reason, answer, gold, "error")
    return Score(0.0, reason, answer, gold, f"math-verify {outcome.status}")


def _judge(case: Case) -> tuple[Score, bool]:
    gold, answer = case.gold, case.found.answer
    if answer is None:
        return Score(0.0, case.found.how, None, gold, "no answer"), False
    if len(answer) > MAX_ANSWER_CHARS:
        return Score(0.0, f"answer of {len(answer)} characters", answer[:200], gold, "too long"), False
    match = judge_pair(gold, answer)
    undecided = not match.equal and not match.decided and worth_trying(answer) and worth_trying(gold)
    verdict = "equals the reference" if match.equal else "does not equal the reference"
    return Score(float(match.equal), f"{verdict} ({case.found.how})", answer, gold, match.rule), undecided


def tagged_answer(text: str) -> Extraction:
    """What the one answer block of a completion states."""
    return _stated(answer_block(text))


def _stated(block: AnswerBlock) -> Extraction:
    return block_answer(block.content) if block.content is not None else Extraction(None, block.reason)


def _found(text: str, reference: str, tagged: bool) -> Extraction:
    if not tagged:
        found = free_answer(text)
        concluded = found.how == "last sentence" and _concludes_word(text, reference)
        return Extraction(reference, "last words") if concluded else found
    block = answer_block(text)
    if block.content is not None and len(block.content) <= MAX_ANSWER_CHARS and _same_words(reference, block.content):
        return Extraction(block.content, "answer block")  # `June 20`, `neither`: words that look like something else
    return _stated(block)


def _concludes_word(text: str, reference: str) -> bool:
    """Does the last sentence end by saying the word of the reference (`..., which is a Monday.`)?"""
    sentence = re.split(r"(?<=[.!?])\s|\n", after_thinking(text).strip()[-MAX_ANSWER_CHARS:])[-1]
    try:
        word, plain = plain_words(reference), plain_words(sentence)
    except HostileText:
        return False
    says = bool(_WORD.match(word)) and word.isalpha() and re.search(rf"(?:\b(?:is|are|was|were|on)|:) {word}\Z", plain)
    return bool(says) and "?" not in sentence and not HEDGE.search(plain) and not DENIED.search(plain)


def _same_words(reference: str, content: str) -> bool:
    try:
        words = plain_words(reference)
        return words == plain_words(content) and bool(_WORD.search(words)) and "\\boxed" not in content
    except HostileText:
        return False


def accuracy_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    *,
    gold_column: str = "answer",
    tagged: bool = True,
    **columns: Sequence[object],
) -> list[Score]:
    """1.0 when the stated answer equals the reference in column `gold_column`, else 0.0; None when the row has none,
    or when math-verify was needed and does not work (rule "error").

    Range: {0, 1}. `tagged`: the answer must stand in exactly one well-formed <answer> block outside of thinking; else
    the last answer stated after thinking counts. GSM8K solutions (`... #### 42`) are understood as references.
    Source: DeepSeek-R1, section 2.2.2. ValueError when the column is missing or has another length.

    >>> accuracy_reward([], ["<think>6 * 7</think><answer>42.0</answer>"], answer=["... #### 42"])[0].value
    1.0
    """
    golds = columns.get(gold_column)
    if golds is None or len(golds) != len(completions):
        found = f"{len(golds)} values" if golds is not None else f"only the columns {sorted(columns) or 'none'}"
        raise ValueError(f"accuracy: column {gold_column!r} with {len(completions)} values is needed, found {found}")
    references = [reference_answer(gold) for gold in golds]
    cases = [
        Case(reference, _found(completion_text(completion), reference, tagged))
        for reference, completion in zip(references, completions, strict=True)
        if reference is not None
    ]
    judged = iter(judge_cases(cases))
    missing = Score(None, "the row has no reference answer", rule="no reference")
    return [missing if reference is None else next(judged) for reference in references]
