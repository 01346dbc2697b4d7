"""The answer of an <answer> block, where everything counts: training pays for it, so every second answer will be tried.

In: the content of the block. Out: an `Extraction`; its answer is None when the block states no single answer: two
different answers, a number beside the stated one, a bound (`at least 42`), a negation, a hedge, or text that a reader
would not see as the answer (struck out, commented out).

A box inside of a formula is read as part of it: `x = \\boxed{5}` says x = 5, and `2\\boxed{42}` says 84. All scans are
linear in the length of the block.
"""

from __future__ import annotations

import re

from rewards.extract import MARKER, TEXT_COMMAND, find_boxes, marked_text
from rewards.latex_text import BOLD, strip_edges
from rewards.math_eval import exact_value
from rewards.math_parse import parse_math
from rewards.math_tokens import MathSyntaxError
from rewards.number_words import NUMBER_WORDS, number_from_words
from rewards.phrases import (
    MAX_ANSWER_CHARS,
    Extraction,
    Span,
    behind_connective,
    formulas,
    is_direct,
    numbers_in,
    stated_in_words,
)

_HEADING = re.compile(r"\A#{1,6}\s+(?=\S)")
# Text that is shown as withdrawn, or not shown at all.
WITHDRAWN = re.compile(
    r"~~|<(?:s|del|strike)>|<!--|\\(?:[bx]?cancel|sout|st|iffalse)(?![a-zA-Z])|\\begin\{comment\}|^[ \t]*%",
    re.IGNORECASE | re.MULTILINE,
)
HEDGE = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|probably|alternatively|not|never|neither|nor|unless|except|wrong|incorrect|"
    r"invalid|unsure|unknown|unlikely|cannot|guess|could be|might be|may be|instead of|rather than)\b"
    r"|n['’]t\b|或|不是",
    re.IGNORECASE,
)
_JOINING_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b")
# Words and signs beside a number that make it another value or no single value.
_BOUND = re.compile(
    r"(?:\b(?:(?:negative|opposite|inverse|reciprocal|square|cube|root|double|multiple|factor|power|digits?|sum) of|"
    r"(?:at|the) (?:least|most)|(?:more|less|fewer|greater|smaller|larger|other|different) than|up to|over|"
    r"under|above|below|beyond|near|close to|such as|between|double|twice|thrice|triple|half of|minus|negative|no|non|"
    r"all but|anything but)\b"
    r"|[<>≤≥≠~¬]|(?<!\\)!)"
    r"[\s$-]*(?:\\\$)?\d"
    r"|\d\W{0,3}\b(?:at (?:least|most)|max|min|maximum|minimum|squared|cubed|and (?:a|one|two|three)|and up)\b"
    r"|\d\W{0,3}\b(?:minus|plus)\b|\d(?:\s*[-–]\s+|\W{0,3}\b(?:times|divided by|multiplied by) )"
    r"(?:one|two|three|four|five|ten|half)\b"
    r"|\?\W*\Z|\.\.|…|\\[lc]?dots|[-+*/^=<>]\s*\Z"
    r"|[²³¹⁰⁴-₉½-¾⅐-⅞]\d|\d[²³¹⁰⁴-₉½-¾⅐-⅞]",
    re.IGNORECASE,
)
# `Each of the 3 friends pays $14`: numbers that count something, one verb, the answer.
_VERB = re.compile(
    r"\b(?:is|are|was|were|equals|(?:will |would )?(?:be|need|pay|have|get|take|cost|make|earn)|needs|pays|has|gets|"
    r"takes|costs|makes|earns|weighs|spends|saves|receives|owes|holds|contains|gives)\b\s+|(?<![<>!~≈=])=(?![<>=])"
)
_SUBJECT = re.compile(r"[^\W\d_]{2}[\s)]*\Z")
_COUNTED = re.compile(
    r"(?<![\d.,/:^=+*-])(?<!\$)\d[\d,]*(?:\.\d+)?(?= [a-z]{2})(?! (?:is|are|and|or|to|by|plus|minus|times)\b)"
)
_NEGATIVE = re.compile(r"\A(?:minus|negative)\s+(?=[\d$])", re.IGNORECASE)
_PROSE = re.compile(r"[^\W\d_]*(?:[\s,.'’$%:;!?-]+[^\W\d_]*)*")
_CALCULATION = re.compile(r"[\d\s.,+\-*/×÷()$%]+(?==|\Z)")
_WORKING = re.compile(r"(\$?[\d(][\d\s.,+\-*/×÷()$%]*)=\s*(?=(\$?\d[\d,]*(?:\.\d+)?))")
_ONLY_NUMBERS = re.compile(r"(?=\D*\d)[\s\d.,;:/()$\\-]+")
_PART_BEFORE = re.compile(
    r"(?:(?<![A-Za-z]{2})(?<![A-Za-z]{2} )[-–−]|[+*/^_<>≠≤≥|!×·]|\\(?:sqrt|frac|sin|cos|tan|ln|log|neq?|leq?|geq?|"
    r"lt|gt|not|times|cdot|div|pm|mp)(?![a-zA-Z]))[\s{($]*\Z|\d(?:[ \t{($]|\n(?!\s*\n))*\Z"
)
_PART_BEHIND = re.compile(
    r"[\s})$]*(?:\^(?!\{?\\circ|\{?°)|[_!+*/<>|×·\d]|-\s*[\d\\]|\\(?:times|cdot|div|pm|mp|leq?|geq?|neq?|lt|gt|sqrt|pi|frac)"
    r"(?![a-zA-Z]))"
)
_SPELLED_TWICE = re.compile(r"([a-z][a-z\s-]*?)\s*\(\s*\$?(\d[\d,]*)\$?\s*\)", re.IGNORECASE)
_FRACTION_WORDS = re.compile(
    r"\b(?:half|halves|quarters?|[a-z]+ths?|thirds?|dozens?|hundreds?|thousands?|millions?|billions?)\b", re.IGNORECASE
)
_UNIT_WORDS = re.compile(r"(?:\s+[a-z]+){1,3}\.?", re.IGNORECASE)
_MAX_MARKS = 50


def block_answer(content: str) -> Extraction:
    """The answer of an <answer> block; everything in the block counts.

    >>> block_answer("The answer is 42.").answer
    '42'
    >>> block_answer(r"\\boxed{41} or \\boxed{42}").answer
    '41, 42'
    >>> block_answer("at least 42").answer is None
    True
    """
    if len(content) > 20 * MAX_ANSWER_CHARS:
        return Extraction(None, "the answer block is too long")
    content = _HEADING.sub("", content.strip())
    if WITHDRAWN.search(content):
        return Extraction(None, "ambiguous: struck-out or hidden text")
    boxes = find_boxes(content)
    if boxes:
        return _boxed(content, boxes)
    if len(content) <= MAX_ANSWER_CHARS and is_direct(content):
        return Extraction(content, "answer block")
    content = strip_edges(TEXT_COMMAND.sub(r" \1 ", content))
    return _marked(content) or _whole(content)


# Boxes


def _boxed(content: str, boxes: list[Span]) -> Extraction:
    stated = dict.fromkeys(box.content for box in boxes)
    answer = _unworded(next(iter(stated))) if len(stated) == 1 else ", ".join(stated)
    gaps = gaps_between(content, boxes)
    if all(not strip_edges(gap.replace("$", " ")).strip("\\()[] ") for gap in gaps):
        return Extraction(answer, "boxed")
    if len(boxes) == 1 and len(content) <= MAX_ANSWER_CHARS:
        formula = f"{gaps[0]}{{{answer}}}{gaps[1]}"
        if is_direct(formula):
            return Extraction(formula, "box in a formula")
    outside = " ".join(gaps)
    if "?" in outside:
        return Extraction(None, "ambiguous: a question beside the box")
    if HEDGE.search(_JOINING_OR.sub("", outside) if len(boxes) > 1 else outside):
        return Extraction(None, "ambiguous: hedging beside the box")
    if any(_PART_BEFORE.search(gap[-40:]) for gap in gaps[:-1]) or any(_PART_BEHIND.match(gap) for gap in gaps[1:]):
        return Extraction(None, "ambiguous: the box is a part of a formula")
    known = set(numbers_in(answer))
    if any(_ONLY_NUMBERS.fullmatch(gap) for gap in gaps) or _others(gaps[-1], known):
        return Extraction(None, "ambiguous: a number beside the box")
    for mark in list(MARKER.finditer(outside))[:_MAX_MARKS]:
        text = strip_edges(marked_text(outside, mark.end()))
        if text and is_direct(text) and text not in stated:
            return Extraction(None, "ambiguous: another answer than the box")
    return Extraction(answer, "boxed")


def _unworded(content: str) -> str:
    """`\\text{The answer is } 9` in a box says 9; words that state no single answer stay, and equal no number."""
    if len(content) > MAX_ANSWER_CHARS or "boxed" in content or is_direct(content):
        return content
    found = block_answer(TEXT_COMMAND.sub(r" \1 ", content))
    return found.answer or content


def gaps_between(text: str, spans: list[Span]) -> list[str]:
    """What stands before, between and behind the spans."""
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), len(text)]
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _others(text: str, known: set[str]) -> bool:
    """Does `text` name a number that is not in `known`? Working (`6 * 7 =`) before its result does not count."""
    if len(text) > MAX_ANSWER_CHARS:
        return True
    return any(number not in known for number in numbers_in(without_working(text)))


def without_working(text: str) -> str:
    """`He pays 6 * 7 = 42 dollars` without `6 * 7 =`, when that is 42."""
    return _WORKING.sub(lambda match: "" if _holds(match.group(1), match.group(2)) else match.group(), text)


def _holds(working: str, result: str) -> bool:
    if not re.search(r"[-+*/×÷]", working):
        return False
    try:
        left, right = exact_value(parse_math(working)), exact_value(parse_math(result))
    except MathSyntaxError:
        return False
    return left is not None and left == right


# Marked answers


def _marked(content: str) -> Extraction | None:
    """`The answer is X`: every such X of the block; None when there is none."""
    marks = list(MARKER.finditer(content))[:_MAX_MARKS]
    if not marks:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(content)]
    answers: dict[str, None] = {}
    text = ""
    for mark, end in zip(marks, ends, strict=True):
        text = marked_text(content[:end], mark.end())
        answer = _phrase(text)
        if answer is not None:
            answers[answer] = None
    before, behind = content[: marks[0].start()], content[marks[-1].end() :].partition(text)[2]
    if len(answers) > 1 or HEDGE.search(before) or _ONLY_NUMBERS.fullmatch(before):
        return Extraction(None, "ambiguous: several answers")
    if not answers:
        return None
    answer = next(iter(answers))
    if HEDGE.search(behind) or _others(behind, set(numbers_in(answer))):
        return Extraction(None, "ambiguous: the answer is taken back or another is named behind it")
    return Extraction(answer, "marked in the answer block")


def _whole(content: str) -> Extraction:
    answer = _phrase(content) if len(content) <= MAX_ANSWER_CHARS else None
    return Extraction(answer, "answer block" if answer is not None else "ambiguous: no single answer is stated")


def _phrase(phrase: str) -> str | None:
    """The answer in a short phrase: the phrase itself, a spelled number, what stands behind `is`, or its only
    number."""
    phrase = _NEGATIVE.sub("-", strip_edges(BOLD.sub(r"\1", phrase)).strip("* "))
    if not phrase or is_direct(phrase):
        return phrase or None
    spelled = _spelled(phrase) or stated_in_words(phrase)
    if spelled is not None:
        return spelled
    segments, numbers = formulas(phrase), numbers_in(phrase)
    if not segments and not numbers:
        return phrase  # words: `neither`
    if HEDGE.search(phrase) or _BOUND.search(phrase):
        return None
    if len(segments) == 1 and not numbers_in(" ".join(gaps_between(phrase, segments))):
        formula = segments[0].content
        if is_direct(formula):
            return formula
    phrase = without_working(phrase)
    right = behind_connective(phrase)
    if right is not None and not numbers_in(_CALCULATION.sub(" ", phrase[: phrase.rindex(right)]), right):
        return right
    stated = _behind_the_verb(phrase)
    if stated is not None:
        return stated
    numbers = numbers_in(phrase)
    if len(numbers) == 1:
        return numbers[0] if _PROSE.fullmatch(phrase.replace(numbers[0], "")) and _agrees(phrase, numbers[0]) else None
    return None if numbers else ", ".join(dict.fromkeys(span.content for span in segments))


def _behind_the_verb(phrase: str) -> str | None:
    """The value behind the only verb of a sentence whose other numbers count something (`After 5 years, Tom will be 37
    years old`)."""
    verbs = list(_VERB.finditer(phrase))
    if len(verbs) != 1 or not _SUBJECT.search(phrase[: verbs[0].start()]):
        return None
    subject, value = phrase[: verbs[0].start()], strip_edges(phrase[verbs[0].end() :])
    if numbers_in(_COUNTED.sub(" ", subject)) or formulas(phrase) or not numbers_in(value) or not is_direct(value):
        return None
    return value


def _spelled(phrase: str) -> str | None:
    """`forty-two`, `forty-two (42)`, `forty-two apples`."""
    value = number_from_words(phrase)
    if value is not None:
        return str(value)
    twice = _SPELLED_TWICE.fullmatch(phrase)
    if twice is not None and str(number_from_words(twice.group(1))) == twice.group(2).replace(",", ""):
        return twice.group(2)
    words = NUMBER_WORDS.match(phrase)
    if words is None or _FRACTION_WORDS.search(phrase[words.end() :]) or HEDGE.search(phrase):
        return None
    if not _UNIT_WORDS.fullmatch(phrase[words.end() :]) or not is_direct("2" + phrase[words.end() :]):
        return None
    value = number_from_words(words.group())
    return str(value) if value is not None else None


def _agrees(phrase: str, number: str) -> bool:
    """False when a spelled number stands right beside `number` and says something else (`6 seven`)."""
    at = phrase.index(number)
    beside = (NUMBER_WORDS.match(phrase[at + len(number) :].lstrip(" (,")), None)
    before = [match for match in NUMBER_WORDS.finditer(phrase[:at]) if not phrase[match.end() : at].strip(" (,")]
    matches = [match for match in (*beside, *before) if match is not None]
    return all(str(number_from_words(match.group())) == number for match in matches)
