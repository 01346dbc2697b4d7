"""Where in a completion is its final answer?

In: a completion without tags, as benchmarks see it. Out: an `Extraction`: the answer as text, and the name of the place
it was taken from. The last stated answer counts: boxes, `final answer is`, `the answer is`, `####`, `A:`, else the last
sentence. `rewards.strict_answer` reads <answer> blocks, where everything counts, with the pieces of this file.

Every scan is linear in the length of the text; what is long or nested is cut by the callers' limits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.latex_text import strip_edges
from rewards.math_eval import exact_value
from rewards.math_nodes import Node
from rewards.math_parse import parse_math
from rewards.math_tokens import MathSyntaxError, name_set
from rewards.number_words import NUMBER_WORDS, number_from_words
from rewards.tag_format import answer_block

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


_END_OF_TEXT = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text|end|eom_id)\|>|</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s${}\\]+")
MARKER = re.compile(
    r"####"
    r"|^[ \t]*\**A\**:"
    r"|^\W{0,4}answer\**\s*(?=\$|\\\(|\\\[)"
    r"|\b(?:final\s+|correct\s+|right\s+)?(?:ans|answers?)\b(?:\s+(?:to|for|of|in)\b[^.\n=]{0,80}?)?[\s*]{0,4}"
    r"(?:\bis\b|\bare\b|\bwould be\b|\bwill be\b|\bmust be\b|\bshould be\b|:|=)"
    r"|\bsolutions?\s+(?:is|are)\b"
    r"|答案\s*(?:是|为|：|:|应该是)?"
    r"|\br[ée]ponse\s+(?:finale\s+)?(?:est|:)|\brespuesta\s+(?:final\s+)?(?:es|:)|\bAntwort\s+(?:ist|lautet|:)"
    r"|\brisposta\s+(?:finale\s+)?(?:è|:)|\bresposta\s+(?:final\s+)?(?:é|:)|\bответ\s*:",
    re.IGNORECASE | re.MULTILINE,
)
# Behind a box only these still state an answer; `we check our answer: ...` does not.
_STRONG_MARKER = re.compile(
    r"####|final|answers?[\s*]*(?:is|are)\b|答案|r[ée]ponse|respuesta|antwort|risposta|resposta|ответ", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|\.(?=\s|\Z|\*|\"|\$\s)|[。！]|I hope|<\|")
_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)(?<!Dr\.)(?<!St\.)\s+(?=\S)|(?<=\$\$)\s+(?=[A-Z])|(?<=\\\])\s+(?=[A-Z])|(?<=[。！？])|\n+"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d_#.,^])(?:(?<=[^\d\s)\]}])-|(?<=\s)-(?=\S)|\A-)?[$€£¥]?\s?"
    r"(?:\\[dt]?frac\s?\{[^{}]{1,60}\}\s?\{[^{}]{1,60}\}|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?(?:/\d+(?:\.\d+)?)?|\.\d+)"
    r"(?:\s?\\?%)?"
)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_RESULT = re.compile(
    r"(?:=|≈|\\approx|\bequals)\s*\**\$?\s*(-?[\d,]*\d(?:\.\d+)?)|```output\s*\n\s*(-?[\d,]*\d(?:\.\d+)?)\s*\n"
)
# Between two boxes that state one answer together: punctuation, delimiters, a few words and a joining mark.
_FILLER = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:q?quad|[;,! ()\[\]])|[$&(){}\[\]\s]")
_JOINING = re.compile(
    r"\A(?:(?:[A-Za-z]{1,20} ){0,2}(?:(?:,|;|and|or|、|和|或|et|y|und) )+(?:[A-Za-z](?:_[0-9])? = )?)?\Z", re.IGNORECASE
)
_CONNECTIVE = re.compile(
    r"\b(?:is|are|equals|equal to|be|becomes|gives|get|=)\s+(?:equal to\s+)?(?=\S)"
    r"|(?<!\d)[:：]\s*|[:：]\s*(?!\d)|(?<![<>!])=\s*|≈\s*|\\approx\s*",
    re.IGNORECASE,
)
_REJECTED = re.compile(r",?\s+(?:but\s+)?(?:not|instead of|rather than)\s+(?:\$|\\\(|\d).*\Z", re.DOTALL)
_CODE = re.compile(r"```(?!output)[a-z]*\n.*?(?:```|\Z)", re.DOTALL)


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
    if boxes and (marked is None or marked.answer is None):
        return Extraction(", ".join(_last_cluster(text, boxes)), "boxed")
    if marked is not None and marked.answer is not None:
        return marked
    return _last_sentence(text)


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


def _last_cluster(text: str, boxes: list[Span]) -> list[str]:
    """The last box and those joined to it by nothing but commas, `and`, `or`: together they are one answer."""
    cluster = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : cluster[0].start]
        if len(between) > 60 or "\n\n" in between or not _joins(between):
            break
        cluster.insert(0, box)
    return list(dict.fromkeys(box.content for box in cluster))


def _joins(between: str) -> bool:
    words = _FILLER.sub(lambda match: f" {match.group(1) or ''} ", between).replace(",", " , ").split()
    return _JOINING.match(" ".join(words) + (" " if words else "")) is not None


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


def is_direct(text: str) -> bool:
    """True when `text` is mathematics as a whole, with at most a few unit words behind it."""
    try:
        return _is_mathematics(parse_math(text))
    except (MathSyntaxError, ValueError):
        return False


# Words of a sentence; where one of them stands behind a value, the words are no unit.
_SENTENCE_WORDS = name_set(
    "is are was were be the so we it that which because since if then therefore thus hence i you they he she not "
    "but has have had will would can this these those when where while as for unless maybe perhaps possibly wrong "
    "incorrect false squared cubed max min maximum minimum most least half exclusive"
)


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


def _phrase(phrase: str) -> str | None:
    """The answer in a short phrase: the phrase itself, its mathematics, what stands behind `is`, its last numbers, or
    words."""
    phrase = strip_edges(_REJECTED.sub("", phrase))
    if not phrase or is_direct(phrase):
        return phrase or None
    bare = re.sub(r"\s*\([^()]*\)\Z", "", phrase)
    if bare and is_direct(bare):
        return bare  # `15 apples (3 * 5)`
    spelled = number_from_words(phrase)
    if spelled is not None:
        return str(spelled)
    right = behind_connective(phrase)
    if right is not None:
        return right
    segments = formulas(phrase)
    if segments:
        return ", ".join(_last_cluster(phrase, segments))
    return _last_numbers(phrase) if numbers_in(phrase) else phrase


def formulas(text: str) -> list[Span]:
    """Formulas in running text; `cm$^2$` is no formula."""
    spans = (Span(match.start(), match.end(), next(filter(None, match.groups()))) for match in _MATH.finditer(text))
    return [span for span in spans if not span.content.startswith(("^", "_"))]


def behind_connective(phrase: str) -> str | None:
    """The mathematics behind the last `is`, `are`, `=` or colon, when it is mathematics to the end."""
    right = strip_edges(_CONNECTIVE.split(phrase)[-1])
    return right if right and right != phrase and right in phrase and is_direct(right) else None


def numbers_in(text: str, but: str = "") -> list[str]:
    """Distinct numbers in running text, without `but`."""
    found = [match.group().strip() for match in _NUMBER.finditer(text)]
    return [number for number in dict.fromkeys(found) if number != but]


def _last_numbers(text: str) -> str:
    """The last number of running text, with those that `and`, `or` or a comma join to it (`the roots are 2 and 3`)."""
    matches = list(_NUMBER.finditer(text))
    first = len(matches) - 1
    while first > 0 and re.fullmatch(r",?\s*(?:and|or|,)\s*", text[matches[first - 1].end() : matches[first].start()]):
        first -= 1
    return ", ".join(match.group().strip() for match in matches[first:])


# The last sentence


def _last_sentence(text: str) -> Extraction:
    """No box and no marker: the number or formula of the last sentence that has one."""
    if len(text) <= MAX_ANSWER_CHARS and "\n" not in text and is_direct(text):
        return Extraction(text, "whole text")
    result = _last_result(text)
    prose = _CODE.sub(" ", text[-4 * MAX_ANSWER_CHARS :])
    prose = re.sub(r"```(?:output)?", "\n", prose)
    spans = formulas(prose)
    sentences = [piece for piece in _SENTENCES.split(prose) if piece and piece.strip()]
    tail = prose.rstrip(" .\n")
    if spans and spans[-1].end >= len(tail):
        return Extraction(_right_side(", ".join(_last_cluster(prose, spans))), "last formula")
    for sentence in reversed(sentences[-4:]):
        answer = _sentence_answer(sentence.strip(), result)
        if answer is not None:
            return Extraction(answer, "last sentence")
    if len(text.split()) <= 8:
        behind = re.search(r"\b(?:is|are|be)\s+(.{1,40})\Z", strip_edges(text))
        return Extraction(behind.group(1) if behind else text, "whole text")
    return Extraction(None, "no final answer found")


def _right_side(formula: str) -> str:
    """The formula as a whole when it can be compared so, else what stands behind its last `=`."""
    formula = formula.strip()
    return formula if is_direct(formula) else formula.rpartition("=")[2].strip()


def _last_result(text: str) -> str | None:
    """The result of the last calculation (`= 42`) or of the last program output."""
    last: str | None = None
    for match in _RESULT.finditer(text):
        last = match.group(1) or match.group(2)
    return last


def _sentence_answer(sentence: str, result: str | None) -> str | None:
    if len(sentence) > MAX_ANSWER_CHARS:
        return None
    bold = re.findall(r"\*\*([^*\n:：]{1,80})\*\*(?!\s*[:：])", sentence)
    if bold and (is_direct(bold[-1]) or not numbers_in(sentence)):
        return strip_edges(bold[-1])
    if bold and (numbers := numbers_in(bold[-1])):
        return numbers[-1]
    segments = formulas(sentence)
    right = behind_connective(sentence)
    if segments and right is not None and "$" not in right and re.search(r"\d", right):
        return right
    if segments:
        cluster = _last_cluster(sentence, segments)
        behind = sentence[segments[-1].end :].strip()
        unit = re.match(r"(?:[A-Za-z]+\s?){1,3}(?=\.?\Z)|\\?%", behind)
        return _right_side(", ".join(cluster)) + (f" {unit.group()}" if unit and len(cluster) == 1 else "")
    if "=" in sentence:
        behind = sentence.rpartition("=")[2]
        if numbers := numbers_in(behind):
            return numbers[0]
    spelled = [
        str(value)
        for match in NUMBER_WORDS.finditer(sentence)
        if (value := number_from_words(match.group())) is not None
    ]
    numbers = numbers_in(sentence)
    for number in (*numbers, *spelled):
        if result is not None and _same_digits(number, result):
            return number
    outright = [number for number in numbers if not _is_aside(sentence, number)]
    if outright and outright[-1] == numbers[-1]:
        return _last_numbers(sentence)
    found = outright or numbers or spelled
    return found[-1] if found else None


def _same_digits(left: str, right: str) -> bool:
    a, b = (re.sub(r"[^\d./-]", "", value).rstrip(".") for value in (left, right))
    return (
        a == b
        or (("." in a) != ("." in b) and a.removesuffix(".0") == b.removesuffix(".0"))
        or a.rstrip("0").rstrip(".") == b.rstrip("0").rstrip(".") != ""
    )


def _is_aside(sentence: str, number: str) -> bool:
    """A time of day, a date or an ordinal, not an amount."""
    escaped = re.escape(number)
    return bool(
        re.search(
            rf"{escaped}\s?(?:a\.?m|p\.?m|o'clock)\b|\b(?:by|at|in|on|number|No\.)\s{escaped}(?!\s*(?:[A-Za-z]+\s+)?(?:\.|\Z))|#\s?{escaped}",
            sentence,
        )
    )
