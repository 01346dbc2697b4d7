"""Do two answers say the same? Structural comparison of answer trees, reference first.

In: two texts or two trees. Out: a `Match` with the name of the rule that decided. The rules, in order:

    same text       the same after cleaning                  `\\dfrac12` and `\\frac{1}{2}`, `\\text{East}` and `east`
    number          equal rationals                          0.5 and 1/2, 1{,}000 and 1000, 65\\% and 65
    decimal         a decimal that agrees to 10 digits       0.0833333333333 and 1/12
    expression      equal at every sample point              (r+5)^2 and (r+5)(r+5)
    equation        sides differ by a constant factor        x+y=1 and 2x+2y=2; a labelled value equals its value
    real set        the same set of real numbers             x \\ge 5 and [5, \\infty)
    tuple, list, set, matrix, ratio, base                    item by item; lists and sets without order

An answer that none of them finds equal is read once more without what stands around it: `(C) 15`, `on Tuesday`.

What an answer may leave out (a unit, the name of the unknown, brackets of a list) and what it may not (a missing
solution, an open end, a factor of 100, another unit) is decided here and nowhere else.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

from rewards.answer_text import Match, reworded, same_choice, same_clock, same_spaced_list
from rewards.latex_text import HostileText, clean_math, plain_words
from rewards.math_eval import (
    TooLarge,
    Undefined,
    based_value,
    canonical,
    context,
    evaluate,
    exact_value,
    free_symbols,
    nearly,
    sample_points,
)
from rewards.math_matrix import matrix_entries, nested_entries, with_identity
from rewards.math_nodes import Node
from rewards.math_parse import MAX_CHARS, parse_math
from rewards.math_rewrite import (
    ascending,
    expand_chain,
    expand_signs,
    rename_integer,
    rename_variable,
    split_unit,
    without_point_name,
)
from rewards.math_tokens import MathSyntaxError, NumbersSideBySide
from rewards.math_values import has_decimal, same_value
from rewards.real_sets import real_set, same_set
from rewards.units import units_conflict

# Where braces say what belongs to a power, `x^2+1` and `x^{2+1}` are not the same words.
_LAYOUT_COUNTS = re.compile(r"[\^_]|\\(?:[dt]?frac|sqrt)")
_DOLLARS, _CENTS = re.compile(r"\\\$\s*\d"), re.compile(r"\bcents?\b|¢")
CHAIN_TOLERANCE = Fraction(1, 50)


def compare_texts(gold: str, answer: str) -> Match:
    """Compare two answer strings.

    >>> compare_texts(r"\\frac{1}{2}", "0.5")
    Match(equal=True, rule='number', decided=True)
    >>> compare_texts("42", "41 or 42").equal
    False
    """
    if len(answer) > MAX_CHARS:
        return Match(False, f"an answer of more than {MAX_CHARS} characters")
    try:
        match = _compare(gold, answer)
        other = None if match.equal else reworded(answer)
    except HostileText as error:
        return Match(False, str(error))
    again = _compare(gold, other) if other is not None else match
    return again if again.equal else match


def _compare(gold: str, answer: str) -> Match:
    if clean_math(gold) == clean_math(answer):
        return Match(True, "same text")
    words = plain_words(gold)
    if words and words == plain_words(answer) and not _LAYOUT_COUNTS.search(gold + answer):
        return Match(True, "same words")
    if (money := _dollars_and_cents(gold, answer)) is not None:
        return money
    shortcut = same_clock(words, plain_words(answer)) or same_choice(gold, answer) or same_spaced_list(gold, answer)
    if shortcut is not None:
        return shortcut
    try:
        gold_tree = parse_math(gold)
    except MathSyntaxError:
        return Match(False, "words differ", decided=not _looks_mathematical(gold))
    try:
        answer_tree = parse_math(answer)
    except NumbersSideBySide as error:
        return Match(False, str(error))
    except MathSyntaxError:
        plain = exact_value(gold_tree) is not None or not _looks_mathematical(answer)
        return Match(False, "answer is no expression", decided=plain)
    return compare_trees(gold_tree, answer_tree)


def _dollars_and_cents(gold: str, answer: str) -> Match | None:
    """`\\$0.30` is 30 cents, `\\$30` is not; None where not one side is in dollars and the other in cents."""
    in_cents = [bool(_CENTS.search(text)) for text in (gold, answer)]
    in_dollars = [
        bool(_DOLLARS.search(text)) and not cents for text, cents in zip((gold, answer), in_cents, strict=True)
    ]
    if _DOLLARS.search(answer) and in_cents == [False, True]:
        return Match(False, "dollars and cents")  # `$42 or 42 cents`
    if in_cents.count(True) != 1 or in_dollars.count(True) != 1:
        return None
    try:
        left, right = (exact_value(parse_math(text)) for text in (gold, answer))
    except MathSyntaxError:
        return None
    factor = Fraction(100) if in_dollars[0] else Fraction(1, 100)
    return Match(left is not None and right is not None and left * factor == right, "dollars and cents")


def _looks_mathematical(text: str) -> bool:
    return bool(re.search(r"\\(?!text|mbox)[a-zA-Z]|[=^<>]", text)) and len(text) < 1000


def compare_trees(gold: Node, answer: Node) -> Match:
    """Compare two parsed answers. An expression that is too large to evaluate is equal only to the same expression."""
    if canonical(gold) == canonical(answer):
        return Match(True, "same expression")
    try:
        rule = _same(gold, answer)
    except TooLarge as error:
        return Match(False, str(error))
    if rule:
        return Match(True, rule)
    unsettled = exact_value(gold) is None and (_has_opaque(gold) or _has_opaque(answer))
    return Match(False, "different", decided=not unsettled)


def _has_opaque(node: Node) -> bool:
    if node.kind == "opaque" and node.text in ("int", "lim", "sum", "prod", "prime"):
        return True
    return any(_has_opaque(arg) for arg in node.args)


def _same(gold: Node, answer: Node) -> str | None:
    """The rule by which `answer` says what `gold` says, or None."""
    gold_unit, gold = split_unit(gold)
    answer_unit, answer = split_unit(answer)
    if units_conflict(_measure(gold_unit, gold), _measure(answer_unit, answer)):
        return None
    answer = rename_integer(gold, without_point_name(answer))
    gold = without_point_name(gold)
    gold, answer = expand_chain(expand_signs(ascending(gold))), expand_chain(expand_signs(ascending(answer)))
    for rule in (_same_relation, _same_text, _same_ratio, _same_base, _same_matrix, _same_collection):
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict or None
    return same_value(gold, answer)


def _measure(unit: str, value: Node) -> str:
    """The unit, also where it is written like a sign (`%`) or a variable (`5 m`)."""
    if not unit and value.kind == "mul" and len(value.args) == 2 and value.args[0].kind == "number":
        return value.args[1].text if value.args[1].text in ("m", "s", "g", "h", "L", "l") else ""
    return unit or ("percent" if value.kind == "percent" else "")


# Each rule below returns a rule name (equal), "" (different) or None (does not apply).


def _same_text(gold: Node, answer: Node) -> str | None:
    if gold.kind == "symbol" and answer.kind == "symbol":
        return "same letter" if gold.text == answer.text or _choice_letter(gold) == _choice_letter(answer) != "" else ""
    if gold.kind == "symbol" and answer.kind == "unit" and _choice_letter(gold):
        return ""
    if "text" in (gold.kind, answer.kind):
        return "same words" if gold.kind == answer.kind and gold.text.casefold() == answer.text.casefold() else ""
    if gold.kind == "dots" or answer.kind == "dots":
        return "dots" if gold.kind == answer.kind else ""
    if gold.kind == "number_set" and answer.kind == "number_set":
        return "number set" if gold.text == answer.text else ""
    return None


def _choice_letter(node: Node) -> str:
    return node.text.upper() if len(node.text) == 1 and node.text.upper() in "ABCDEFGHJ" else ""


def _same_ratio(gold: Node, answer: Node) -> str | None:
    if gold.kind != "ratio" and answer.kind != "ratio":
        return None
    if gold.kind != answer.kind:
        ratio, other = (gold, answer) if gold.kind == "ratio" else (answer, gold)
        if other.kind != "div" or len(_ratio_terms(ratio)) != 2 or any(term.kind == "unit" for term in ratio.args):
            return ""
        quotient = Node("div", ratio.args)
        return "ratio" if same_value(quotient, other) in ("number", "expression") else ""
    left, right = _ratio_terms(gold), _ratio_terms(answer)
    if len(left) != len(right):
        return ""
    if all(a.text == b.text and a.kind == b.kind == "number" for a, b in zip(left, right, strict=True)):
        return "ratio"
    if any(exact_value(term) == 0 for term in (*left, *right)):
        return ""
    products = ((Node("mul", (a, right[0])), Node("mul", (b, left[0]))) for a, b in zip(left, right, strict=True))
    return "ratio" if all(same_value(a, b) for a, b in products) else ""


def _ratio_terms(node: Node) -> list[Node]:
    return [*_ratio_terms(node.args[0]), *_ratio_terms(node.args[1])] if node.kind == "ratio" else [node]


def _same_base(gold: Node, answer: Node) -> str | None:
    """`1101_4`: the same digits with or without the base written, or the same value when both name a base."""
    if gold.kind != "based" and answer.kind != "based":
        return None
    left, right = (
        based_value(gold) if gold.kind == "based" else None,
        based_value(answer) if answer.kind == "based" else None,
    )
    if gold.kind == answer.kind:
        return "base" if left is not None and left == right else ""
    based, other = (gold, answer) if gold.kind == "based" else (answer, gold)
    if based_value(based) is None:
        return ""
    digits, _, base = based.text.partition("_")
    same_digits = other.kind == "number" and other.text == digits
    return "base" if same_digits and (based is gold or base == "10") else ""


def _same_matrix(gold: Node, answer: Node) -> str | None:
    left, right = matrix_entries(gold), matrix_entries(answer)
    if right is None and left is not None:
        right = nested_entries(answer) or matrix_entries(with_identity(answer, len(left)))
    if left is None and right is None:
        return None
    if left is None or right is None:
        return _same_vector(left or right, answer if right is None else gold)
    if len(left) != len(right) or len(left[0]) != len(right[0]):
        return ""
    entries = ((a, b) for above, below in zip(left, right, strict=True) for a, b in zip(above, below, strict=True))
    return "matrix" if all(_same(a, b) for a, b in entries) else ""


def _same_vector(matrix: list[list[Node]] | None, other: Node) -> str:
    """A matrix of one row or one column may be written as a tuple."""
    if (
        matrix is None
        or other.kind not in ("tuple", "list")
        or (other.kind == "tuple" and other.text not in ("()", "[]"))
    ):
        return ""
    entries = [entry for row in matrix for entry in row]
    if 1 not in (len(matrix), len(matrix[0])) or len(entries) != len(other.args):
        return ""
    return "vector" if all(_same(a, b) for a, b in zip(entries, other.args, strict=True)) else ""


# Relations


def _same_relation(gold: Node, answer: Node) -> str | None:
    if gold.kind != "relation" and answer.kind != "relation":
        return None
    if gold.kind != "relation":
        return _value_of_relation(gold, answer)
    if answer.kind != "relation":
        return _relation_against_value(gold, answer)
    gold_label, answer_label = _label(gold), _label(answer)
    answer = rename_variable(gold, answer)
    answer_label = _label(answer)
    if gold_label and answer_label:
        if gold_label == answer_label or _both_name_a_function(gold.args[0], answer.args[0]):
            return _same(gold.args[-1], answer.args[-1]) or ""
    elif gold.text == answer.text == "in":
        return _same(gold.args[1], answer.args[1]) if canonical(gold.args[0]) == canonical(answer.args[0]) else ""
    if gold.text == answer.text and all(_same(a, b) for a, b in zip(gold.args, answer.args, strict=True)):
        return "relation"
    return _proportional(gold, answer) or _as_real_sets(gold, answer) or ""


def _value_of_relation(gold: Node, answer: Node) -> str:
    """The answer is a relation, the reference is not: `x = 5` for 5, `35 + 70 = 105` for 105, `x >= 5` for an
    interval."""
    signs = set(answer.text.split())
    if signs <= {"=", "~"}:
        if not _chain_holds(answer):
            return ""
        if not _label(answer) and exact_value(answer.args[-1]) == 0 and free_symbols(answer):
            return ""
        if canonical(gold) == canonical(answer.args[-1]):
            return "same expression"
        if "~" in signs and not free_symbols(gold):
            return _rounded_chain(gold, answer)
        return _same(gold, answer.args[-1]) or ""
    if signs == {"in"}:
        return _same(gold, answer.args[1]) or ""
    return _as_real_sets(gold, answer) or ""


def _rounded_chain(gold: Node, answer: Node) -> str:
    """`2\\sqrt{3} \\approx 3.46`: what stands before the sign is the answer, if what follows is its rounding."""
    first = answer.text.split().index("~")
    exact, rounded = answer.args[first], answer.args[-1]
    if exact.kind == "symbol":
        return _same(gold, rounded) or ""
    try:
        a, b = evaluate(exact, {}), evaluate(rounded, {})
    except Undefined:
        return _same(gold, rounded) or ""
    if abs(a - b) > CHAIN_TOLERANCE * max(abs(a), abs(b)):
        return ""
    return _same(gold, exact) or _same(gold, rounded) or ""


def _relation_against_value(gold: Node, answer: Node) -> str:
    """The reference is a relation, the answer is not: 5 for `x = 5`, 2x + 3 for `y = 2x + 3`, but not 0 for `x - 3z =
    0`."""
    signs = set(gold.text.split())
    if signs == {"="}:
        return (_same(gold.args[-1], answer) or "") if _label(gold) else ""
    if signs == {"in"}:
        return _same(gold.args[1], answer) or ""
    return _as_real_sets(gold, answer) or ""


def _chain_holds(relation: Node) -> bool:
    """False when neighbouring numbers of a chain of equations differ: `41 = 42` states two answers. Rounding in a
    calculation (`100 / 3 = 33.3`) is allowed."""
    for left, right in pairwise(relation.args):
        a, b = exact_value(left), exact_value(right)
        if a is not None and b is not None and abs(a - b) > CHAIN_TOLERANCE * max(abs(a), abs(b)):
            return False
    return True


def _label(relation: Node) -> str:
    """The name of what an equation defines (`x`, `f(x)`, `(p,q,r)`, `AB`, `V_1:V_2`), or ''."""
    if relation.kind != "relation" or set(relation.text.split()) - {"="} or not _is_name(relation.args[0]):
        return ""
    return canonical(relation.args[0])


def _both_name_a_function(left: Node, right: Node) -> bool:
    """`y` and `f(x)`."""
    first, second = sorted((left, right), key=lambda node: node.kind)
    return first.kind == "opaque" and first.text in ("f", "g", "h") and second.kind == "symbol" and second.text == "y"


def _is_name(node: Node) -> bool:
    if node.kind in ("symbol", "text"):
        return node.text not in ("i", "e")
    if node.kind == "opaque":
        return True
    if node.kind == "pow" and node.args[1].kind == "neg":
        return node.args[0].kind == "symbol" and node.args[0].text in ("f", "g", "h")  # `f^{-1}(x)`
    return node.kind in ("mul", "div", "tuple", "ratio", "abs", "unit", "list") and all(
        _is_name(arg) for arg in node.args
    )


def _proportional(gold: Node, answer: Node) -> str:
    """Both relations have two sides whose differences agree up to a constant factor (positive for inequalities that
    point the same way, negative for those that point the other way)."""
    flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
    if len(gold.args) != 2 or len(answer.args) != 2 or gold.text not in flipped:
        return ""
    if any(arg.kind in ("tuple", "set", "list", "matrix") for arg in (*gold.args, *answer.args)):
        return ""
    allowed_signs = set()
    if answer.text == gold.text:
        allowed_signs.add(1)
    if answer.text == flipped[gold.text]:
        allowed_signs.add(-1)
    names = free_symbols(gold) | free_symbols(answer)
    if not allowed_signs or not names:
        return ""
    ratios: list[Any] = []
    for point in sample_points(names):
        try:
            left, right = _difference(gold, point), _difference(answer, point)
        except Undefined:
            continue
        if left == 0 or right == 0:
            return ""
        ratios.append(right / left)
    if len(ratios) < 3 or context().im(ratios[0]) or not all(nearly(ratio, ratios[0]) for ratio in ratios):
        return ""
    return "equation" if (1 if ratios[0] > 0 else -1) in allowed_signs else ""


def _difference(relation: Node, point: dict[str, Any]) -> Any:
    return evaluate(relation.args[0], point) - evaluate(relation.args[1], point)


def _as_real_sets(gold: Node, answer: Node) -> str:
    names = {name for node in (gold, answer) for name in free_symbols(node) if node.kind in ("relation", "list")}
    if len(names) > 1:
        return ""
    left = real_set(gold)
    right = real_set(answer) if left is not None else None
    return "real set" if left is not None and right is not None and same_set(left, right) else ""


# Tuples, intervals, lists, sets

_COLLECTIONS = ("tuple", "set", "list", "group", "union", "intersection", "difference", "number_set")


def _same_collection(gold: Node, answer: Node) -> str | None:
    if gold.kind not in _COLLECTIONS and answer.kind not in _COLLECTIONS:
        return None
    if len(answer.args) > 4 * len(gold.args) + 8:
        return ""  # a list much longer than the reference is a guess; comparing all pairs would be slow
    if gold.kind not in _COLLECTIONS:
        if answer.kind in ("set", "list") and answer.args and (len(answer.args) == 1 or answer.kind == "list"):
            rules = [_same(gold, item) for item in answer.args]  # the same answer twice is one answer
            if all(rules):
                return rules[0] or ""
        return _decimal_comma(gold, answer)
    if answer.kind not in _COLLECTIONS:
        single = gold.kind in ("set", "list") and len(gold.args) == 1
        return (_same(gold.args[0], answer) or "") if single else ""
    if gold.kind == "tuple" and answer.kind == "set" and len(answer.args) == 1:
        return _same(gold, answer.args[0]) or ""  # `\{(2, 3)\}`
    alternatives = gold.kind == "tuple" and answer.kind == "list" and all(item.kind == "tuple" for item in answer.args)
    return _same_items(gold, answer) or ("" if alternatives else _as_real_sets(gold, answer)) or ""


def _decimal_comma(gold: Node, answer: Node) -> str:
    """`3,5` for 3.5: a comma between two bare numbers may be a decimal comma, when the reference is a decimal."""
    parts = answer.args if answer.kind == "list" and answer.text == "," and has_decimal(gold) else ()
    if len(parts) != 2 or parts[1].kind != "number" or parts[1].decimal:
        return ""
    head = parts[0].args[0] if parts[0].kind == "neg" else parts[0]
    expected = exact_value(gold)
    if head.kind != "number" or head.decimal or expected is None or len(parts[1].text) == 3:
        return ""
    value = Fraction(f"{head.text}.{parts[1].text}")
    return "decimal comma" if expected == (-value if parts[0].kind == "neg" else value) else ""


def _same_items(gold: Node, answer: Node) -> str:
    kinds = (gold.kind, answer.kind)
    if "tuple" in kinds:
        if kinds == ("tuple", "tuple"):
            return "tuple" if gold.text == answer.text and _pairwise_same(gold.args, answer.args) else ""
        bracketed, other = (gold, answer) if gold.kind == "tuple" else (answer, gold)
        ordered = other.kind in ("list", "group") and other.text != "or" and bracketed.text == "()"
        return "tuple" if ordered and _pairwise_same(gold.args, answer.args) else ""
    if not set(kinds) <= {"set", "list", "group"}:
        return ""
    gold_items, answer_items = _unnamed(gold.args, answer.args), _unnamed(answer.args, gold.args)
    if any(item.kind == "dots" for item in (*gold_items, *answer_items)) or _ordered_by_names(gold_items, answer_items):
        return "list" if _pairwise_same(gold_items, answer_items) else ""
    return "set" if _matched(gold_items, answer_items) and _matched(answer_items, gold_items, swapped=True) else ""


def _pairwise_same(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    return len(gold) == len(answer) and all(_same(a, b) for a, b in zip(gold, answer, strict=True))


def _matched(items: tuple[Node, ...], others: tuple[Node, ...], *, swapped: bool = False) -> bool:
    """Every item has an equal one among the others."""
    return all(any(_same(b, a) if swapped else _same(a, b) for b in others) for a in items)


def _unnamed(items: tuple[Node, ...], others: tuple[Node, ...]) -> tuple[Node, ...]:
    """`a = 4, -8, -10` is a list of three values of a: drop a name that only the first item carries."""
    if len(items) > 1 and _label(items[0]) and not any(_label(item) for item in items[1:]):
        return (items[0].args[-1], *items[1:])
    return items


def _ordered_by_names(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    """One side names its values differently (`AB = 4, CD = 5`) and the other names none: then the order counts. Roots
    numbered x_1, x_2 have no order."""
    for named, other in ((gold, answer), (answer, gold)):
        labels = {_label(item) for item in named}
        if "" in labels or len(labels) < 2 or any(_label(item) for item in other):
            continue
        if all(re.fullmatch(r"symbol:[xyzt]_\d", label) for label in labels):
            continue
        return True
    return False
