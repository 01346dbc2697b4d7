"""The answer of a completion that marks none: the number or formula of the last sentence that has one.

In: a completion without a box and without `the answer is`. Out: an `Extraction`. Preferred in a sentence: what is bold,
the formula or what stands behind the last `=`, the result of the calculation before, the clause that begins with `so`;
numbers that only count or date something (`of the 12 chairs`, `at 5 p.m.`) come last.
"""

from __future__ import annotations

import re

from rewards.latex_text import strip_edges
from rewards.number_words import NUMBER_WORDS, number_from_words
from rewards.phrases import (
    MAX_ANSWER_CHARS,
    NUMBER,
    REJECTED,
    Extraction,
    behind_connective,
    formulas,
    is_direct,
    last_cluster,
    last_numbers,
    numbers_in,
    stated_in_words,
    without_condition,
)

_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)(?<!Dr\.)(?<!St\.)(?<!vs\.)\s+(?=\S)|(?<=\$\$)\s+(?=[A-Z])|(?<=\\\])\s+(?=[A-Z])|(?<=[。！？])|(?<=[^\\\s$)\]}];)\s+(?=[A-Za-z]{2}|[\d(][^;\n]{1,99}=)|\n+"
)
_RESULT = re.compile(
    r"(?:=|≈|\\approx|\bequals)\s*\**\$?\s*(-?[\d,]*\d(?:\.\d+)?(?:/\d+)?)|```output\s*\n\s*(-?[\d,]*\d(?:\.\d+)?)\s*\n"
)
# The clause that draws the conclusion of a sentence.
_CONCLUSION = re.compile(
    r"(?:[,;:]\s+(?:and\s+)?(?:so|therefore|thus|hence|which (?:means|is|gives|makes|equals)|meaning|that is|that's|"
    r"i\.e\.|(?:for|giving|making) a total of)|\bwhich rounds(?: up| down| off)? to)(?!\w)(?=.*\d)",
    re.DOTALL,
)
# What is said about an answer behind it: a remark of its own, an aside in brackets, a reason.
_REMARK = re.compile(
    r"^[ \t*#>]{0,9}(?:note|remark|p\.?s|verification|explanation|check)\b[^\n]{0,9}:"
    r"|\b(?:I hope this|let me know|feel free)\b",
    re.IGNORECASE | re.MULTILINE,
)
_ASIDE = re.compile(
    r"\s*\((?!\s*or\b)[^()]*\)(?=[^\d()$]*\Z)|(?:,?\s+(?:since|because|given that|assuming)|,\s+where)\b.*\Z", re.DOTALL
)
_UNKNOWN = re.compile(
    r"\b(?:cannot|can't|can not|could not|not possible to) "
    r"(?:be )?(?:determined?|known?|answer(?:ed)?|solved?|calculated?)\b"
)
_NO_SOLUTION = re.compile(r"\bno (?:(?:real|integer|such|possible|positive) )?(?:solutions?|roots?)\b", re.IGNORECASE)
# Numbers as prose writes them, and as the parser knows them.
_BASE = re.compile(r"\b(\d+)\s*\(?(?:in )?base[ -]?(\d{1,2})\b\)?")
_SIGN_WORD = re.compile(r"(?<![\d)\]}])(?<![\d)\]}] )\b(?:negative|minus) (?=\d)", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"(?<![\d.,(\[{$])(\d+),(\d{1,2})(?![\d,.]\d|\d|[)\]}$])")
_BLANK_THOUSANDS = re.compile(
    r"(?:(?<![\d.,])\d{1,3}(?: \d{3})+(?= [^\W\d_])|(?<=[$€£])\s?\d{1,3}(?: \d{3})+)(?![\d.,]?\d)"
)
_MARKS = re.compile(r"<<[^<>\n]{0,99}>>|\$\s?\\(?:blacksquare|square|Box|qed)\s?\$")
# `$\\sqrt 2$ or approximately $1.41$` is one formula.
_APPROXIMATELY = re.compile(
    r"(?<=[^\s$])\$,?\s\(?(?:or |which is |that is )?(?:approximately|about|roughly) \$(?=[^\s$])"
)
_WHOLE = re.compile(r"\bof (?:the|these|those|all|its|his|her|their) \Z")  # `$3$ of these $10$ numbers`
# `16 - 7 = 9, 9 * 2 = 18`: steps, of which the last counts.
_STEPS = re.compile(
    r"\A(?:[\d\s.,+*/()x×÷-]{1,99}=\s?\$?[\d.,]{1,20}(?: [a-z]{1,20}){0,2}(?:[,;]| and)\s+)+(?=[\d\s.,+*/()x×÷-]+=)"
)
_CODE = re.compile(r"```(?!output)[a-z]*\n.*?(?:```|\Z)", re.DOTALL)


def last_sentence(text: str) -> Extraction:
    """No box and no marker: the number or formula of the last sentence that has one."""
    if len(text) <= MAX_ANSWER_CHARS and "\n" not in text and is_direct(text):
        return Extraction(_STEPS.sub("", text), "whole text")
    text = _plain_numbers(text)
    result = _last_result(text)
    prose = _CODE.sub(" ", text[-4 * MAX_ANSWER_CHARS :])
    prose = _without_remark(re.sub(r"```(?:output)?", "\n", prose))
    sentences = [piece for piece in _SENTENCES.split(prose) if piece and piece.strip()]
    if sentences and (stated := without_condition(sentences[-1])) != sentences[-1]:
        prose = prose[: prose.rindex(sentences[-1])] + stated
        sentences[-1] = stated
    spans = formulas(prose)
    tail = prose.rstrip(" .\n")
    if spans and spans[-1].end >= len(tail):
        return Extraction(_right_side(", ".join(last_cluster(prose, spans))), "last formula")
    for sentence in reversed(sentences[-4:]):
        answer = _sentence_answer(sentence.strip(), result)
        if answer is not None:
            return Extraction(answer, "last sentence")
    if len(text.split()) <= 8:
        behind = re.search(r"\b(?:is|are|be)\s+(.{1,40})\Z", strip_edges(text))
        return Extraction(behind.group(1) if behind else text, "whole text")
    return Extraction(None, "no final answer found")


def _without_remark(prose: str) -> str:
    remark = _REMARK.search(prose)
    return prose[: remark.start()] if remark is not None and numbers_in(prose[: remark.start()]) else prose


def _without_aside(sentence: str) -> str:
    """`3 bolts (2 blue and 1 white)` as `3 bolts`; `2 hours and 40 minutes (160 minutes)` stays."""
    aside = _ASIDE.search(sentence)
    if aside is None or ("=" in sentence[: aside.start()] and not re.search("[a-z]{3}", aside.group())):
        return sentence
    before = numbers_in(sentence[: aside.start()])
    bracketed = aside.group().lstrip().startswith("(")
    tells = not bracketed or len(before) == 1 or len(numbers_in(aside.group())) > 1  # `(80 minutes vs. 50 minutes)`
    return sentence[: aside.start()] if before and tells else sentence


def _plain_numbers(text: str) -> str:
    """`minus 7`, `1011 in base 2`, `2,5`, `1 500 euros` as `-7`, `1011_2`, `2.5`, `1500 euros`; marks of a
    calculator and of the end of a proof go."""
    text = _MARKS.sub("", _APPROXIMATELY.sub(r" \\approx ", text))
    text = _SIGN_WORD.sub("-", _BASE.sub(r"\1_\2", text))
    text = _BLANK_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    return _DECIMAL_COMMA.sub(r"\1.\2", text)


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
    if _UNKNOWN.search(sentence):
        return strip_edges(sentence)
    bold = re.findall(r"\*\*((?:[^*\n:：]|(?<=\d):(?=\d)){1,80})\*\*(?!\s*[:：])", sentence)
    if bold and (is_direct(bold[-1]) or not numbers_in(sentence)):
        return stated_in_words(bold[-1]) or strip_edges(bold[-1])
    if bold and (numbers := numbers_in(bold[-1])):
        return numbers[-1]
    sentence = _without_aside(sentence)
    segments = formulas(sentence)
    segments = [span for span in segments if not _WHOLE.search(sentence[: span.start])] or segments
    right = behind_connective(sentence)
    if right is not None and "$" not in right and re.search(r"\d", right) and (segments or not _is_plain(right)):
        return right
    if segments:
        cluster = last_cluster(sentence, segments)
        behind = sentence[segments[-1].end :].strip()
        unit = re.match(r"(?:[A-Za-z]+\s?){1,3}(?=\.?\Z)|\\?%", behind)
        return _right_side(", ".join(cluster)) + (f" {unit.group()}" if unit and len(cluster) == 1 else "")
    sentence = REJECTED.sub("", sentence)
    conclusion = _CONCLUSION.search(sentence)
    if conclusion is not None:
        sentence, result = sentence[conclusion.end() :], None
    if "=" in sentence:
        behind = sentence.rpartition("=")[2]
        if numbers := numbers_in(behind):
            return numbers[0]
    if not numbers_in(sentence) and (none := _NO_SOLUTION.search(sentence)):
        return none.group()
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
        return last_numbers(sentence)
    found = outright or spelled or numbers
    return found[-1] if found else None


def _is_plain(value: str) -> bool:
    """A number, perhaps with a unit: what `NUMBER` finds as well."""
    return bool(re.fullmatch(rf"(?:{NUMBER.pattern})[\sA-Za-z.%°]*", value))


def _same_digits(left: str, right: str) -> bool:
    a, b = (re.sub(r"[^\d./-]", "", value).rstrip(".") for value in (left, right))
    return (
        a == b
        or (("." in a) != ("." in b) and a.removesuffix(".0") == b.removesuffix(".0"))
        or a.rstrip("0").rstrip(".") == b.rstrip("0").rstrip(".") != ""
    )


def _is_aside(sentence: str, number: str) -> bool:
    """A time of day, a date, an ordinal, the whole that a part is taken of (`8 of the 12 chairs`) or what an amount
    before it is for (`160 minutes to download 200 GB`), not the amount."""
    escaped = re.escape(number)
    return bool(
        re.search(
            rf"{escaped}\s?(?:a\.?m|p\.?m|o'clock)\b|\b(?:of|around|among|between|from|for|in|on|over) "
            rf"(?:the|these|those|all|his|her|its|their) (?:[a-z]+ )?{escaped}"
            rf"|\d [a-z]+ of {escaped}(?!\d)"
            rf"|\d.*?\bto (?:buy|afford|reach|cover) (?:the |a |an )?{escaped}(?!\d)"
            rf"|\d.*?\b(?:than|out of|over|for|to [a-z]+|after(?: [a-z]+ing(?: [a-z]+)?)?|by [a-z]+ing) "
            rf"(?:the (?:remaining )?|all )?(?![$€£]){escaped}(?!\d)"
            rf"|\b(?:by|at|in|on|number|No\.)\s{escaped}(?!\s*(?:[A-Za-z]+\s+)?(?:\.|\Z))|#\s?{escaped}",
            sentence,
        )
    )
