"""Where in a completion is its final answer?

In: a completion without tags, as benchmarks see it. Out: an `Extraction`: the answer as text, and the name of the place
it was taken from. The last stated answer counts: boxes, `final answer is`, `the answer is`, `####`, `A:`, else the last
sentence. `rewards.strict_answer` reads <answer> blocks, where everything counts, with the pieces of this file.

Every scan is linear in the length of the text; what is long or nested is cut by the callers' limits.
"""

from __future__ import annotations

import re

from rewards.last_sentence import last_sentence
from rewards.latex_text import strip_edges
from rewards.phrases import (
    MAX_ANSWER_CHARS,
    REJECTED,
    Extraction,
    Span,
    behind_connective,
    formulas,
    is_direct,
    last_cluster,
    last_numbers,
    numbers_in,
    stated_in_words,
    without_condition,
)
from rewards.tag_format import answer_block

_END_OF_TEXT = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text|end|eom_id)\|>|</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s${}\\]+")
TEXT_COMMAND = re.compile(r"\\(?:text|mbox|textbf|textrm|mathrm)\s*\{([^{}]*)\}")
MARKER = re.compile(
    r"####"
    r"|^[ \t]*\**A\**:"
    r"|^\W{0,4}answer\**\s*(?=\$|\\\(|\\\[)"
    r"|\b(?:final\s+|correct\s+|right\s+)?(?:ans|answers?)\b(?:\s+(?:to|for|of|in)\b[^.\n=]{0,80}?)?[\s*]{0,4}"
    r"(?:\bis\b|\bare\b|\bwould be\b|\bwill be\b|\bmust be\b|\bshould be\b|:|=|→)"
    r"|\b(?:correct|right|best)\s+(?:option|choice)\s+is\b"
    r"|\bsolutions?\s+(?:is|are)\b"
    r"|答案\s*(?:是|为|：|:|应该是)?|答え\s*(?:は|：|:)|답\s*(?:은|：|:)"
    r"|\br[ée]ponse\s+(?:finale\s+)?(?:est|:)|\brespuesta\s+(?:final\s+)?(?:es|:)|\bAntwort\s+(?:ist|lautet|:)"
    r"|\brisposta\s+(?:finale\s+)?(?:è|:)|\bresposta\s+(?:final\s+)?(?:é|:)|\bответ\s*:",
    re.IGNORECASE | re.MULTILINE,
)
# Behind a box only these still state an answer; `we check our answer: ...` does not.
_STRONG_MARKER = re.compile(
    r"####|final|answers?[\s*]*(?:is|are)\b|答案|r[ée]ponse|respuesta|antwort|risposta|resposta|ответ", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|(?<!\bRs)\.(?=\s|\Z|\*|\"|\$\s)|[。！]|I hope|<\|")
_ALTERNATIVE = re.compile(r"\s*\(\s*(?:or|maybe|perhaps|possibly)\b", re.IGNORECASE)
_NO_VALUE = re.compile(
    r"(?:\\text\s*\{\s*)?(?:(?:not|never|nicht|more than|less than|fewer than|greater than|between)\b|不是)",
    re.IGNORECASE,
)
_OR_MORE = re.compile(r"\b(?:or|and)\s+(?:more|less|fewer|greater|above|below|up)\b|\bat most\W*\Z", re.IGNORECASE)
_WORDS = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_SIGNS = re.compile(r"[-+*/^=<>≠≤≥‰\\]")
# What is said behind an answer: a remark (`40, so each friend gets 2`), or that it was wrong.
_REMARK = re.compile(r",?\s+(?:so|because|since|which|as|where|meaning)\b|,\s+(?:and|but|therefore|thus|hence)\b")
_DOUBTED = re.compile(r"\b(?:it|this|that|answer) (?:might|may|could)(?: also| well)? be \$?-?\d", re.IGNORECASE)
_CORRECTED = re.compile(
    r"\b(?:wait|actually|hold on|correction|on second thought|hmm+|oops)\b"
    r"|\blet me (?:re-?\w+|correct|check|double|think)\b",
    re.IGNORECASE,
)


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; '' when thinking never ends; the whole text when there are no think tags."""
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return "" if "<think>" in rest else rest
    return "" if "<think>" in text else text


def free_answer(text: str) -> Extraction:
    """The last stated answer of a completion without tags.

    >>> free_answer("So 6 * 7 = 42. The answer is 42 apples.").answer
    '42 apples'
    >>> free_answer(r"Hence $x = \\boxed{5}$.")
    Extraction(answer='5', how='boxed')
    """
    block = answer_block(text) if "<answer>" in text else None
    if block is not None and block.content is not None:
        return free_answer(block.content)
    text = after_thinking(text)
    cut = _END_OF_TEXT.search(text)
    if cut is not None and text[: cut.start()].strip():
        text = text[: cut.start()]
    text = text.strip()
    if not text:
        return Extraction(None, "no text after thinking")
    boxes = find_boxes(text)
    marked = _last_marked(text, after=boxes[-1].end if boxes else -1)
    if marked is not None:
        return marked
    if boxes:
        cluster = last_cluster(text, boxes)
        return Extraction(_unworded(cluster[0]) if len(cluster) == 1 else ", ".join(cluster), "boxed")
    return last_sentence(text)


# Boxes


def find_boxes(text: str) -> list[Span]:
    """Outermost `\\boxed{...}` of `text` in order, brackets matched in one pass; unclosed boxes are left out."""
    starts = list(_BOX.finditer(text))
    if not starts:
        return []
    closing = _matching_braces(text)
    boxes: list[Span] = []
    for match in starts:
        if boxes and match.start() < boxes[-1].end:
            continue
        if match.end() < len(text) and text[match.end()] == "{":
            end = closing.get(match.end())
            if end is not None:
                boxes.append(Span(match.start(), end + 1, _innermost_box(text[match.end() + 1 : end])))
        elif (bare := _BARE.match(text, match.end())) is not None:
            boxes.append(Span(match.start(), bare.end(), bare.group()))
    return [box for box in boxes if box.content.strip()]


def _innermost_box(content: str) -> str:
    """`\\boxed{\\boxed{5}}` says 5: drop boxes that fill the whole content."""
    depth = re.match(r"(?:\\boxed\s*\{)*", content)
    levels = depth.group().count("{") if depth else 0
    if levels and content.endswith("}" * levels):
        return content[depth.end() : len(content) - levels] if depth else content
    return content


def _matching_braces(text: str) -> dict[int, int]:
    stack: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing


def _unworded(content: str) -> str:
    """`\\text{The larger number is } 9.` in a box says 9."""
    if len(content) > MAX_ANSWER_CHARS or is_direct(content):
        return content
    words = TEXT_COMMAND.sub(r" \1 ", content)
    return stated_in_words(words.strip()) or behind_connective(words) or content


# Marked answers


def _last_marked(text: str, *, after: int) -> Extraction | None:
    """The last `the answer is X` that begins behind position `after`, with a usable X."""
    marks = [
        match
        for match in MARKER.finditer(text)
        if match.start() >= after
        and (after < 0 or _STRONG_MARKER.search(match.group()) or _begins_line(text, match.start()))
    ]
    for match in reversed(marks[-8:]):
        phrase = marked_text(text, match.end())
        if not phrase or (after >= 0 and not re.search(r"[\d$\\]", phrase)):
            continue
        answer = _phrase(phrase)
        if answer is not None:
            corrected = _CORRECTED.search(text, text.find(phrase, match.end()) + len(phrase)) if after < 0 else None
            later = last_sentence(text[corrected.end() :]).answer if corrected is not None else None
            if later is not None:
                return Extraction(later, "corrected")
            return Extraction(answer, match.group().strip(" \t\n*").lower() or "answer")
    return None


def _begins_line(text: str, position: int) -> bool:
    return not text[text.rfind("\n", 0, position) + 1 : position].strip(" \t*#")


def marked_text(text: str, position: int) -> str:
    """What follows a marker, up to the end of the sentence; display math as a whole."""
    while position < len(text) and text[position] in " \t\n*:：":
        position += 1
    rest = text[position : position + MAX_ANSWER_CHARS]
    display = re.match(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", rest, re.DOTALL)
    if display is not None:
        return (display.group(1) or display.group(2)).strip()
    end = _SENTENCE_END.search(rest)
    return rest[: end.start()].strip() if end is not None else rest.strip()


def _phrase(phrase: str) -> str | None:
    """The answer in a short phrase: the phrase itself, its mathematics, what stands behind `is`, its last numbers, or
    words."""
    phrase = strip_edges(REJECTED.sub("", phrase))
    if not phrase or is_direct(phrase):
        return phrase or None
    aside = re.search(r"\s*\([^()]*\)\Z", phrase)
    if aside is not None and phrase[: aside.start()] and is_direct(phrase[: aside.start()]):
        alternative = _ALTERNATIVE.match(aside.group())
        return phrase if alternative else phrase[: aside.start()]  # `15 apples (3 * 5)`
    remark = _REMARK.search(phrase)
    if remark is not None and numbers_in(phrase[: remark.start()]) and is_direct(phrase[: remark.start()]):
        doubted = _DOUBTED.search(phrase, remark.end())  # `40, but it might be 41` states nothing
        return phrase if doubted else strip_edges(phrase[: remark.start()])  # `40, so each of her friends gets 2`
    answer = stated_in_words(phrase) or behind_connective(without_condition(phrase))
    if answer is not None:
        return answer
    segments = formulas(without_condition(phrase))
    if segments:
        return ", ".join(last_cluster(phrase, segments))
    if _NO_VALUE.match(phrase) or _OR_MORE.search(phrase) or (not _WORDS.search(phrase) and _SIGNS.search(phrase)):
        return phrase  # `not 42`, `5 +`: what does not state its number
    return last_numbers(phrase) if numbers_in(phrase) else phrase
