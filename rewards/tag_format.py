"""The tag format of R1-Zero: `<think>...</think>` and then `<answer>...</answer>`, and nothing else but white space.

In: completion text. Out: `Score` of `format`, `format_prefilled` and `tag_count`, and the content of the answer block
for the other rewards. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2 "format rewards"; the paper does not say
how strict its check was. Departures: thinking and answer must not be empty, each tag occurs exactly once, and tags are
case-sensitive.

One regular expression finds the tags in a single linear pass; everything else walks that list of tags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rewards.base import Completion, Score, completion_text

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
WELL_FORMED = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

_TAG = re.compile(r"</?(?:think|answer)>")
# Tokens that chat templates put after a finished turn; they are no part of what the model said.
_END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end|eom_id)\|>|</s>|<｜end▁of▁sentence｜>|\s+")


class Tag(NamedTuple):
    """One tag as found in the text: its literal, where it begins and where the text after it begins."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class AnswerBlock:
    """The content of the one answer block outside of thinking, or None with the reason why there is none."""

    content: str | None
    reason: str = ""


def find_tags(text: str) -> list[Tag]:
    """All think and answer tags in order of appearance; O(len(text))."""
    return [Tag(match.group(), *match.span()) for match in _TAG.finditer(text)]


def is_blank(text: str) -> bool:
    """True when the text shows nothing: only white space, control, zero-width or other format characters."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def format_fault(text: str) -> str | None:
    """None when `text` is exactly one non-empty think block and then exactly one non-empty answer block, else what is
    wrong with it.

    >>> format_fault("<think>6 * 7</think> <answer>42</answer>") is None
    True
    >>> format_fault("<think></think><answer>42</answer>")
    'the think block is empty'
    """
    tags = find_tags(text)
    if tuple(tag.name for tag in tags) != WELL_FORMED:
        if len(tags) > len(WELL_FORMED):
            return f"{len(tags)} tags instead of {len(WELL_FORMED)}"
        return f"tags are {' '.join(tag.name for tag in tags) or 'missing'}"
    think_open, think_close, answer_open, answer_close = tags
    if text[: think_open.start].strip():
        return "text before <think>"
    if text[think_close.end : answer_open.start].strip():
        return "text between </think> and <answer>"
    if _END_OF_TURN.sub("", text[answer_close.end :]):
        return "text after </answer>"
    if is_blank(text[think_open.end : think_close.start]):
        return "the think block is empty"
    if is_blank(text[answer_open.end : answer_close.start]):
        return "the answer block is empty"
    return None


def answer_block(text: str) -> AnswerBlock:
    """The content of the answer block: exactly one `<answer>...</answer>` outside of thinking.

    Thinking is what stands between `<think>` and `</think>`; a first `</think>` without an opening tag ends thinking
    that the prompt opened. Text around the block is allowed here (that is `format`'s business), a second block is not.

    >>> answer_block("<think>41</think><answer>42</answer>").content
    '42'
    >>> answer_block("<answer>41</answer><answer>42</answer>").reason
    '2 answer blocks'
    """
    thinking = False
    seen_think = False
    outside: list[Tag] = []
    for tag in find_tags(text):
        if tag.name == THINK_OPEN:
            thinking = seen_think = True
        elif tag.name == THINK_CLOSE:
            if not seen_think:
                outside.clear()
            thinking, seen_think = False, True
        elif not thinking:
            outside.append(tag)
    if thinking:
        return AnswerBlock(None, "thinking never ends")
    names = [tag.name for tag in outside]
    if names == [ANSWER_OPEN, ANSWER_CLOSE]:
        content = text[outside[0].end : outside[1].start]
        if THINK_OPEN in content or THINK_CLOSE in content:
            return AnswerBlock(None, "think tags inside the answer block")
        return AnswerBlock(None, "the answer block is empty") if is_blank(content) else AnswerBlock(content.strip())
    if not names:
        return AnswerBlock(None, "no answer block")
    blocks = min(names.count(ANSWER_OPEN), names.count(ANSWER_CLOSE))
    return AnswerBlock(None, f"{blocks} answer blocks" if blocks > 1 else "the answer block is not well formed")


def _score_format(text: str) -> Score:
    fault = format_fault(text)
    return Score(0.0, fault, rule="format") if fault else Score(1.0, "well formed", rule="format")


def format_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    **columns: object,
) -> list[Score]:
    """1.0 for exactly one non-empty `<think>` block followed by exactly one non-empty `<answer>` block with nothing but
    white space (or end-of-turn tokens) around them, else 0.0.

    Range: {0, 1}. Source: DeepSeek-R1 section 2.2.2; stricter than open-r1's `format` (see the file's docstring).

    >>> [score.value for score in format_reward([], ["<think>a</think><answer>b</answer>", "<answer>b</answer>"])]
    [1.0, 0.0]
    """
    return [_score_format(completion_text(completion)) for completion in completions]


def format_prefilled_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    **columns: object,
) -> list[Score]:
    """`format` for chat templates whose prompt already ends with `<think>`: the completion begins inside of thinking.

    1.0 when `<think>` and the completion together are well formed, else 0.0. Range: {0, 1}. Source: as `format`; own
    variant, for R1-style templates.

    >>> texts = ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"]
    >>> [score.value for score in format_prefilled_reward([], texts)]
    [1.0, 0.0]
    """
    return [_score_format(THINK_OPEN + completion_text(completion)) for completion in completions]


def _count_tags(text: str) -> Score:
    tags = find_tags(text)
    names = [tag.name for tag in tags]
    once = {tag.name: tag for tag in tags if names.count(tag.name) == 1} if len(tags) <= 64 else {}
    counted: list[str] = []
    position = -1
    for name in WELL_FORMED:
        tag = once.get(name)
        if tag is None or tag.start < position:
            continue
        opener = {THINK_CLOSE: THINK_OPEN, ANSWER_CLOSE: ANSWER_OPEN}.get(name)
        if opener is not None and (opener not in counted or is_blank(text[once[opener].end : tag.start])):
            continue
        counted.append(name)
        position = tag.end
    return Score(0.25 * len(counted), f"counted {' '.join(counted) or 'none'}", rule="tag_count")


def tag_count_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    *,
    prefilled: bool = False,
    **columns: object,
) -> list[Score]:
    """Partial credit on the way to `format`: 0.25 for each of the four tags that occurs exactly once and in order; a
    closing tag counts only when its opening tag counted and the block between them is not empty.

    Range: {0, 0.25, 0.5, 0.75, 1}. `prefilled`: the prompt already ends with `<think>`. Source: open-r1's
    `tag_count_reward`; departures: order and emptiness matter, so bare tags earn 0.5 at most; line breaks around tags
    do not matter.

    >>> [score.value for score in tag_count_reward([], ["<think>a</think>b", "</think><think>", "<think></think>"])]
    [0.5, 0.25, 0.25]
    """
    texts = (completion_text(completion) for completion in completions)
    return [_count_tags(THINK_OPEN + text if prefilled else text) for text in texts]
