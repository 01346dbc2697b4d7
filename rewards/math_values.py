"""Are two numbers or expressions equal? Exact rationals first, then agreement at sample points.

In: two trees, reference first. Out: the name of the rule that found them equal (`number`, `percent`, `decimal`,
`expression`), or None. A decimal answer may differ from an exact reference behind the tenth digit, an exact answer
may not differ at all.
"""

from __future__ import annotations

from fractions import Fraction

from rewards.math_eval import Undefined, context, evaluate, exact_value, free_symbols, nearly, sample_points
from rewards.math_nodes import Node
from rewards.math_tokens import name_set

DECIMAL_TOLERANCE = Fraction(1, 10**10)


_UNIT_LETTERS = name_set("m s g h L l N J W V K A \\Omega \\mu")


def _without_unit_letters(node: Node) -> Node:
    """`12 m/s` reads as a product of variables; drop trailing letters that are units."""
    if node.kind == "unit":
        return Node("unit", (_without_unit_letters(node.args[0]),), node.text)  # `5 kg m / s`
    if node.kind == "div":
        bottom = node.args[1].args[0] if node.args[1].kind == "pow" else node.args[1]
        return _without_unit_letters(node.args[0]) if _is_unit_letter(bottom) else node
    if node.kind == "mul" and node.args[0].kind in ("number", "div", "neg", "root"):
        letters = [arg.args[0] if arg.kind == "pow" else arg for arg in node.args[1:]]
        if all(map(_is_unit_letter, letters)):
            return node.args[0]
        if _is_unit_letter(letters[-1]) and len(node.args) > 2:
            return Node("mul", node.args[:-1])  # `3 \\times 10^8 m`
    return node


def _is_unit_letter(node: Node) -> bool:
    return node.kind == "symbol" and node.text in _UNIT_LETTERS


def same_value(gold: Node, answer: Node) -> str | None:
    if not free_symbols(gold):
        answer = _without_unit_letters(answer)
    left, right = exact_value(gold), exact_value(answer)
    if left is not None and right is not None:
        return _same_number(gold, answer, left, right)
    names = free_symbols(gold) | free_symbols(answer)
    if not names:
        return _same_constant(gold, answer)
    agreed = 0
    for index, point in enumerate(sample_points(names)):
        try:
            a, b = evaluate(gold, point), evaluate(answer, point)
        except Undefined:
            continue
        real = not context().im(a) and not context().im(b)
        if nearly(a, b):
            agreed += 1
        elif index < 3 or real:
            return None
    return "expression" if agreed >= 2 else None


def _same_number(gold: Node, answer: Node, left: Fraction, right: Fraction) -> str | None:
    if left == right:
        return "number"
    if "percent" in (gold.kind, answer.kind):
        bare_left, bare_right = _without_percent(gold), _without_percent(answer)
        if bare_left == bare_right:
            return "percent"
    if (has_decimal(answer) or _is_binary_float(right)) and abs(left - right) <= DECIMAL_TOLERANCE * abs(left):
        return "decimal"
    return None


def _is_binary_float(value: Fraction) -> bool:
    """A fraction over a large power of two is a floating-point number printed as a fraction."""
    bottom = value.denominator
    return bottom >= 2**30 and bottom & (bottom - 1) == 0


def _without_percent(node: Node) -> Fraction | None:
    return exact_value(node.args[0] if node.kind == "percent" else node)


def _same_constant(gold: Node, answer: Node) -> str | None:
    try:
        a, b = evaluate(gold, {}), evaluate(answer, {})
    except Undefined:
        return None
    if nearly(a, b):
        return "expression"
    if "percent" in (gold.kind, answer.kind) and same_value(_bare_percent(gold), _bare_percent(answer)):
        return "percent" if gold.kind != answer.kind else None
    return "decimal" if has_decimal(answer) and nearly(a, b, DECIMAL_TOLERANCE) else None


def _bare_percent(node: Node) -> Node:
    return node.args[0] if node.kind == "percent" else node


def has_decimal(node: Node) -> bool:
    return node.decimal or any(has_decimal(arg) for arg in node.args)
