"""`countdown`: an expression that uses every given number exactly once and makes the target.

In: completions, a column with the numbers and one with the target. Out: one `Score` each. The expression is read by a
small parser of its own (whole numbers, + - * / and parentheses; the signs × ÷ − count as * / -) and computed with
exact rationals; nothing is evaluated by Python. Source: the Countdown task of TinyZero; departures: no `**`, `//` or
`_`, no floating point, so neither `5 ** 2 - 1` nor a value near the target is paid. Behind the expression `= target` is
allowed, and steps on the way to it (`= 15 + 9 = 24`) whose value is the target.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from rewards.base import Completion, Score, completion_text
from rewards.extract import after_thinking, find_boxes
from rewards.latex_text import HostileText, check_visible, strip_edges
from rewards.tag_format import answer_block

MAX_CHARS = 1000
MAX_DEPTH = 50

_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = (
    ("\\times", "*"),
    ("\\cdot", "*"),
    ("\\div", "/"),
    ("\\left", ""),
    ("\\right", ""),
    ("$", ""),
    ("\\(", ""),
    ("\\)", ""),
)
_STATED = re.compile(
    r"\A\s*(?:(?:the|one|a)\s+)?(?:(?:final|possible)\s+)?(?:answer|expression|solution|equation)\s*(?:is\s*:?|:)\s*",
    re.IGNORECASE,
)
# Words before the expression on the last line of a completion without tags; those of the last statement count.
_CONCLUSION = re.compile(
    r"\A.*\b(?<!wrong )(?<!incorrect )"
    r"(?:(?:answer|expression|solution|equation)\s*(?:is\s*:?|:)|(?:so|thus|hence|therefore):)\s*",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TIMES_LETTER = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")


class CountdownError(ValueError):
    """The text is no allowed expression."""


def parse_expression(text: str) -> tuple[Fraction, list[int]]:
    """Value and numbers (in order) of an arithmetic expression. CountdownError says what is not allowed.

    >>> parse_expression("6 / (1 - 3 / 4)")
    (Fraction(24, 1), [6, 1, 3, 4])
    """
    if len(text) > MAX_CHARS:
        raise CountdownError(f"{len(text)} characters, more than {MAX_CHARS}")
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise CountdownError(f"{text[position:].lstrip()[:1]!r} is not allowed")
        tokens.append(match.group(1))
        position = match.end()
    parser = _Parser(tokens)
    value = parser.parse_sum(0)
    if parser.at != len(tokens):
        raise CountdownError(f"unexpected {tokens[parser.at]!r}")
    return value, parser.numbers


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.numbers: list[int] = []

    def _next(self, *allowed: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in allowed:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def parse_sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while (sign := self._next("+", "-")) is not None:
            term = self._product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while (sign := self._next("*", "/")) is not None:
            factor = self._factor(depth)
            if sign == "/" and factor == 0:
                raise CountdownError("division by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def _factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise CountdownError(f"nested more than {MAX_DEPTH} deep")
        if self._next("-"):
            return -self._factor(depth + 1)
        if self._next("("):
            value = self.parse_sum(depth + 1)
            if self._next(")") is None:
                raise CountdownError("a parenthesis is not closed")
            return value
        if self.at < len(self.tokens) and self.tokens[self.at].isdigit():
            if len(self.tokens[self.at]) > 20:
                raise CountdownError("a number of more than 20 digits")
            number = int(self.tokens[self.at])
            self.at += 1
            self.numbers.append(number)
            return Fraction(number)
        found = self.tokens[self.at] if self.at < len(self.tokens) else "the end"
        raise CountdownError(f"a number is expected, not {found!r}")


def countdown_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    *,
    numbers_column: str = "numbers",
    target_column: str = "target",
    tagged: bool = True,
    **columns: Sequence[object],
) -> list[Score]:
    """1.0 when the expression in the answer block uses every number of the row exactly once, only + - * / and
    parentheses, and equals the target exactly; else 0.0.

    Range: {0, 1}. `tagged=False` reads the last box or the last line after thinking. ValueError when a column is
    missing, has another length, or holds no whole numbers. Source: the Countdown task of TinyZero (Pan et al. 2025);
    departures: see the file's docstring.

    >>> text = "<think>15 + 9</think><answer>3 * 5 + 7 + 2 = 24</answer>"
    >>> countdown_reward([], [text], numbers=[[3, 5, 7, 2]], target=[24])[0].value
    1.0
    """
    for column in (numbers_column, target_column):
        if column not in columns or len(columns[column]) != len(completions):
            raise ValueError(f"countdown: column {column!r} with {len(completions)} values is needed")
    rows = zip(completions, columns[numbers_column], columns[target_column], strict=True)
    return [
        score_countdown(completion_text(completion), numbers, target, tagged) for completion, numbers, target in rows
    ]


def score_countdown(text: str, numbers: object, target: object, tagged: bool) -> Score:
    """The score of one completion; ValueError for a row without whole `numbers` and `target`."""
    if (
        not isinstance(numbers, (list, tuple))
        or not numbers
        or not all(type(item) is int for item in (*numbers, target))
    ):
        raise ValueError(
            f"countdown: numbers {numbers!r} and target {target!r}: a list of whole numbers and one are needed"
        )
    gold = f"{target} from {', '.join(map(str, numbers))}"
    expression, reason = _stated_expression(text, tagged)
    if expression is None:
        return Score(0.0, reason, None, gold, "no answer")
    try:
        value, used = _checked_value(expression, Fraction(str(target)))
    except (CountdownError, HostileText) as error:
        return Score(0.0, str(error), expression[:200], gold, "syntax")
    if Counter(used) != Counter(numbers):
        return Score(0.0, f"uses {sorted(used)} instead of {sorted(numbers)}", expression, gold, "numbers")
    equal = value == target
    return Score(float(equal), f"the value is {value}", expression, gold, "value")


def _stated_expression(text: str, tagged: bool) -> tuple[str | None, str]:
    if tagged:
        block = answer_block(text)
        return block.content, block.reason
    text = after_thinking(text).strip()
    boxes = find_boxes(text)
    if boxes:
        return boxes[-1].content, ""
    return (_CONCLUSION.sub("", text.rpartition("\n")[2]), "") if text else (None, "no text after thinking")


def _checked_value(expression: str, target: Fraction) -> tuple[Fraction, list[int]]:
    if len(expression) > MAX_CHARS:
        raise CountdownError(f"{len(expression)} characters, more than {MAX_CHARS}")
    boxes = find_boxes(expression)
    if len(boxes) == 1 and not expression.replace(expression[boxes[0].start : boxes[0].end], "").strip(" $\n"):
        expression = boxes[0].content
    expression = _STATED.sub("", strip_edges(check_visible(expression)).translate(_SIGNS))
    for old, new in _LATEX:
        expression = expression.replace(old, new)
    for _ in range(MAX_DEPTH):
        expression, changed = _FRACTION.subn(r"((\1)/(\2))", expression)
        if not changed:
            break
    expression = _TIMES_LETTER.sub("*", expression)
    left, *steps = expression.replace("==", "=").split("=")
    if len(steps) == 1 and left.strip() == str(target):
        left, steps = steps[0], [left]  # `24 = 3 * 5 + 7 + 2`
    if steps and (steps[-1].strip() != str(target) or any(parse_expression(step)[0] != target for step in steps)):
        raise CountdownError("another value behind the equals sign than the target")
    return parse_expression(left)


def read_gold(gold: object) -> tuple[object, object]:
    """Numbers and target of a reference that is an object with both keys."""
    if not isinstance(gold, Mapping) or not {"numbers", "target"} <= gold.keys():
        raise ValueError(f"countdown: the reference {gold!r} needs the keys numbers and target")
    return gold["numbers"], gold["target"]
