"""The mathematics in a phrase: its formulas, its numbers, what stands behind its last `is`.

In: running text. Out: pieces of it. `rewards.extract` and `rewards.last_sentence` look with these for the answer of a
completion without tags, `rewards.strict_answer` for that of an answer block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.answer_text import option_value
from rewards.latex_text import strip_edges
from rewards.math_eval import exact_value
from rewards.math_nodes import Node
from rewards.math_parse import parse_math
from rewards.math_tokens import MathSyntaxError, name_set
from rewards.number_words import NUMBER_WORDS, fraction_from_words, number_from_words

MAX_ANSWER_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Extraction:
    """answer: the text of the final answer, None when there is none. how: the place, or the reason why there is
    none."""

    answer: str | None
    how: str


@dataclass(frozen=True, slots=True)
class Span:
    start: int
    end: int
    content: str


NUMBER = re.compile(
    r"(?<![A-Za-z\d_#.,^])[$€£¥]\s?\d[\d,]*(?:\.\d+)?[kKMB](?![A-Za-z\d])"
    r"|(?<![A-Za-z\d_#.,^])(?:(?<=[^\d\s)\]}])[-−]|(?<=\s)[-−](?=\S)|\A[-−])?[$€£¥]?\s?"
    r"(?:\\[dt]?frac\s?\{[^{}]{1,60}\}\s?\{[^{}]{1,60}\}|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)"
    r"|\d+ \d+/\d+(?![\d/])|\d+(?: : |:)\d+(?![\d:])|\d+(?:\.\d+)?(?:/\d+(?:\.\d+)?)?|\.\d+)"
    r"(?:_\{?\d{1,2}\}?)?(?:\s?\\?%|\s(?:thousand|million|billion|trillion)\b)?"
)
# A formula ends before another begins, so that many openings are read in linear time; `\\[` is a line break.
_MATH = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$(?!\d)"
    r"|(?<!\\)\\\(((?:(?!(?<!\\)\\\().)+?)\\\)|(?<!\\)\\\[((?:(?!(?<!\\)\\\[).)+?)\\\]",
    re.DOTALL,
)
# Between two boxes that state one answer together: punctuation, delimiters, a few words and a joining mark.
_FILLER = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:q?quad|[;,! ()\[\]])|[$&(){}\[\]\s]")
_JOINING = re.compile(
    r"\A(?:(?:[A-Za-z]{1,20} ){0,2}(?:(?:,|;|and|or|、|和|或|et|y|und) )+"
    r"(?:(?:at|by) )?(?:[A-Za-z](?:_[0-9])? = )?)?\Z",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"\b(?:is|are|equals|equal to|be|becomes|gives|get|=)\s+(?:equal to\s+)?(?=\S)"
    r"|(?<!\d)[:：]\s*|[:：]\s*(?!\d)|(?<![<>!])=\s*|≈\s*|\\approx\s*",
    re.IGNORECASE,
)
# What an answer is contrasted with: `12, not 13`.
REJECTED = re.compile(
    r"不是\s*\$?\d[\d.]*"
    r"|,?\s+(?:(?:but|and)\s+)?(?:not|instead of|rather than|nicht|no es|n'est pas|non è|não é)\s+"
    r"(?:(?:at|by|in|on)\s+)?(?:\$|\\\(|\d).*\Z",
    re.DOTALL,
)
# Words of a sentence; where one of them stands behind a value, the words are no unit.
_SENTENCE_WORDS = name_set(
    "is are was were be the so we it that which because since if then therefore thus hence i you they he she not "
    "but has have had will would can this these those when where while as for unless maybe perhaps possibly wrong "
    "incorrect false squared cubed max min maximum minimum most least half exclusive"
)


# What is said of an answer behind it: for which values it holds, where it is reached, why.
_CONDITION = re.compile(
    r"\sfor (?:all|every|any|each)\b|,\s+(?:which (?:occurs|happens|is (?:attained|achieved|reached))|attained|"
    r"achieved|reached|occurring|when|where|with equality|since|because)\b"
)
_GIVEN = re.compile(r"\b(?:since|because|as|if|when) \$[^$\n]{1,200}\$,", re.IGNORECASE)
_DATE = re.compile(
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December) "
    r"\d{1,2}(?:st|nd|rd|th)?",
    re.IGNORECASE,
)


def without_condition(text: str) -> str:
    """`text` up to what is said of its formula: `$f(n) = n^2$ for all $n \\ge 1$` without the last four words."""
    given = _GIVEN.sub("", text)
    text = given if formulas(given) else text
    for condition in _CONDITION.finditer(text):
        if formulas(text[: condition.start()]):
            return text[: condition.start()]
    return text


def stated_in_words(phrase: str) -> str | None:
    """The answer of a phrase that is no mathematics but says it as a whole: `two thirds`, `forty-two`, `(C) 15`,
    `May 1`; None for anything else."""
    spelled = number_from_words(phrase)
    if spelled is not None:
        return str(spelled)
    value = option_value(phrase)
    if _DATE.fullmatch(phrase) or (value is not None and is_direct(value)):
        return phrase
    return fraction_from_words(phrase)


def formulas(text: str) -> list[Span]:
    """Formulas in running text; `cm$^2$` is no formula."""
    spans = (Span(match.start(), match.end(), next(filter(None, match.groups()))) for match in _MATH.finditer(text))
    return [span for span in spans if not span.content.startswith(("^", "_"))]


def numbers_in(text: str, but: str = "") -> list[str]:
    """Distinct numbers in running text, without `but`."""
    found = [match.group().strip() for match in NUMBER.finditer(text)]
    return [number for number in dict.fromkeys(found) if number != but]


def last_numbers(text: str) -> str:
    """The last number of running text, with those that `and`, `or` or a comma join to it (`the roots are 2 and 3`)."""
    matches = list(NUMBER.finditer(text))
    first = len(matches) - 1
    while first > 0 and re.fullmatch(r",?\s*(?:and|or|,)\s*", text[matches[first - 1].end() : matches[first].start()]):
        first -= 1
    return ", ".join(match.group().strip() for match in matches[first:])


def behind_connective(phrase: str) -> str | None:
    """The mathematics behind the last `is`, `are`, `=` or colon, when it is mathematics to the end."""
    right = strip_edges(_CONNECTIVE.split(phrase)[-1])
    return right if right and right != phrase and right in phrase and is_direct(right) else None


def is_direct(text: str) -> bool:
    """True when `text` is mathematics as a whole, with at most a few unit words behind it."""
    try:
        return _is_mathematics(parse_math(text))
    except (MathSyntaxError, ValueError):
        return False


def _is_mathematics(node: Node) -> bool:
    if node.kind == "text":
        return False
    if node.kind == "unit":
        words = node.text.lower().split()
        unit_like = len(words) <= 6 and not any(word[0].isdigit() or word in _SENTENCE_WORDS for word in words)
        if NUMBER_WORDS.search(node.text) and number_from_words(node.text) != exact_value(node.args[0]):
            return False  # `6 (seven)`
        return unit_like and node.args[0].kind != "symbol" and _is_mathematics(node.args[0])
    if node.kind == "mul" and any(arg.kind == "unit" for arg in node.args[:-1]):
        return False  # `15 apples (3 * 5)`
    if node.kind == "ratio" and node.args[0].kind == "symbol" and node.args[1].kind != "symbol":
        return False  # `A: 42`
    if node.kind == "relation":
        named = node.args[0].kind in ("text", "unit")
        return all(_is_mathematics(arg) for arg in (node.args[1:] if named else node.args))
    return all(_is_mathematics(arg) for arg in node.args)


def last_cluster(text: str, boxes: list[Span]) -> list[str]:
    """The last box and those joined to it by nothing but commas, `and`, `or`: together they are one answer."""
    cluster = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : cluster[0].start]
        if len(between) > 60 or "\n\n" in between or not _joins(between):
            break
        cluster.insert(0, box)
    return list(dict.fromkeys(box.content for box in cluster))


def _joins(between: str) -> bool:
    plain = _FILLER.sub(lambda match: f" {match.group(1) or ''} ", between)
    words = plain.replace(",", " , ").replace("=", " = ").split()
    return _JOINING.match(" ".join(words) + (" " if words else "")) is not None
