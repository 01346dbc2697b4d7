"""Sets of real numbers: intervals, points, inequalities and their unions in one normal form.

In: a `Node` such as `[-2, 7)`, `x < 3 or x > 5`, `\\mathbb{R}` or `(-\\infty, 0) \\cup \\{4\\}`. Out:
`real_set(node)`, a sorted list of disjoint pieces with 50-digit ends, or None when the node is no such set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rewards.math_eval import TooLarge, Undefined, context, evaluate, free_symbols, nearly
from rewards.math_nodes import Node


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval; a point is a closed interval with equal ends."""

    low: Any
    high: Any
    low_open: bool
    high_open: bool


RealSet = list[Piece]
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def real_set(node: Node) -> RealSet | None:
    """The set that `node` denotes, or None."""
    try:
        pieces = _pieces(node)
    except (Undefined, TooLarge):
        return None
    return None if pieces is None else _merged(pieces)


def same_set(left: RealSet, right: RealSet) -> bool:
    """Equal pieces: ends agree and are open or closed alike."""
    return len(left) == len(right) and all(
        nearly(a.low, b.low) and nearly(a.high, b.high) and (a.low_open, a.high_open) == (b.low_open, b.high_open)
        for a, b in zip(left, right, strict=True)
    )


def _everything() -> RealSet:
    ctx = context()
    return [Piece(-ctx.inf, ctx.inf, True, True)]


def _pieces(node: Node) -> RealSet | None:
    if node.kind == "tuple" and len(node.args) == 2:
        low, high = (_real(arg) for arg in node.args)
        ctx = context()
        if low >= high:
            return None
        return [Piece(low, high, node.text[0] == "(" or low == -ctx.inf, node.text[1] == ")" or high == ctx.inf)]
    if node.kind == "set":
        return [Piece(value, value, False, False) for value in map(_real, node.args)]
    if node.kind == "number_set":
        return _everything() if node.text == "R" else None
    if node.kind in ("union", "intersection", "difference"):
        left, right = (_pieces(arg) for arg in node.args)
        if left is None or right is None:
            return None
        if node.kind == "union":
            return left + right
        return _intersection(left, right if node.kind == "intersection" else _complement(right))
    if node.kind == "relation":
        return _relation_pieces(node)
    if node.kind in ("list", "group"):
        return _list_pieces(node)
    return None


def _list_pieces(node: Node) -> RealSet | None:
    """`x < 1 or x > 3`: united; `x > 1 and x < 3`: intersected; with commas whichever is not empty."""
    if len(set().union(*(free_symbols(arg) for arg in node.args))) > 1:
        return None
    parts = [_pieces(arg) for arg in node.args]
    if any(part is None for part in parts) or all(arg.kind == "set" for arg in node.args):
        return None
    known = [part for part in parts if part is not None]
    if node.text != "or" and all(arg.kind == "relation" for arg in node.args):
        common = known[0]
        for part in known[1:]:
            common = _intersection(common, part)
        if common:
            return common
    return [piece for part in known for piece in part]


def _relation_pieces(node: Node) -> RealSet | None:
    signs = node.text.split()
    if signs == ["in"] and node.args[0].kind == "symbol":
        return _pieces(node.args[1])
    if set(signs) <= _FLIPPED.keys():
        node = replace(node, args=tuple(map(_variable, node.args)))
    names = free_symbols(node)
    if len(names) != 1:
        return None
    (name,) = names
    result = _everything()
    for sign, left, right in zip(signs, node.args, node.args[1:], strict=False):
        solved = _solve(left, sign, right, name)
        if solved is None:
            return None
        result = _intersection(result, solved)
    return result


def _variable(node: Node) -> Node:
    """`f(x)` between its bounds is the variable whose values are meant."""
    return Node("symbol", (), node.text) if node.kind == "opaque" and node.text in ("f", "g", "h") else node


def _solve(left: Node, sign: str, right: Node, name: str) -> RealSet | None:
    """The solutions of `left sign right`: linear in the variable, or an absolute value against a number."""
    if right.kind == "abs" and left.kind != "abs":
        left, sign, right = right, _FLIPPED.get(sign, sign), left
    if left.kind != "abs" or free_symbols(right):
        return _solve_linear(left, sign, right, name)
    if _real(right) < 0 and sign in ("=", "!="):
        return [] if sign == "=" else _everything()
    above = _solve_linear(left.args[0], sign, right, name)
    below = _solve_linear(left.args[0], _FLIPPED.get(sign, sign), Node("neg", (right,)), name)
    if above is None or below is None:
        return None
    return _intersection(above, below) if sign in ("<", "<=", "!=") else above + below


def _solve_linear(left: Node, sign: str, right: Node, name: str) -> RealSet | None:
    """The solutions of `left sign right` when the difference of both sides is linear in the variable."""
    ctx = context()

    def difference(value: int) -> Any:
        point = {name: ctx.mpf(value)}
        return evaluate(left, point) - evaluate(right, point)

    at_zero, at_one, at_five = difference(0), difference(1), difference(5)
    slope = at_one - at_zero
    if ctx.im(slope) or slope == 0 or not nearly(at_five, at_zero + 5 * slope):
        if ctx.isinf(at_zero) and at_zero == at_one:
            return _everything()
        return None
    root = -at_zero / slope
    if slope < 0:
        sign = _FLIPPED.get(sign, sign)
    if sign in ("<", "<="):
        return [Piece(-ctx.inf, root, True, sign == "<")]
    if sign in (">", ">="):
        return [Piece(root, ctx.inf, sign == ">", True)]
    if sign == "!=":
        return [Piece(-ctx.inf, root, True, True), Piece(root, ctx.inf, True, True)]
    if sign == "=":
        return [Piece(root, root, False, False)]
    return None


def _real(node: Node) -> Any:
    value = evaluate(node, {})
    if context().im(value):
        raise Undefined("a complex end")
    return context().re(value)


def _intersection(left: RealSet, right: RealSet) -> RealSet:
    result: RealSet = []
    for a in left:
        for b in right:
            low, low_open = max((a.low, a.low_open), (b.low, b.low_open))
            high, closed = min((a.high, not a.high_open), (b.high, not b.high_open))
            if low < high or (low == high and not low_open and closed):
                result.append(Piece(low, high, low_open, not closed))
    return result


def _complement(pieces: RealSet) -> RealSet:
    ctx = context()
    result: RealSet = []
    low, low_open = -ctx.inf, True
    for piece in _merged(pieces):
        if low < piece.low or (low == piece.low and not low_open and piece.low_open):
            result.append(Piece(low, piece.low, low_open, not piece.low_open))
        low, low_open = piece.high, not piece.high_open
    if low < ctx.inf:
        result.append(Piece(low, ctx.inf, low_open, True))
    return result


def _merged(pieces: RealSet) -> RealSet:
    """Sorted, with touching or overlapping pieces joined and empty ones dropped."""
    usable = [piece for piece in pieces if piece.low < piece.high or not (piece.low_open or piece.high_open)]
    result: RealSet = []
    for piece in sorted(usable, key=lambda item: (item.low, item.low_open)):
        if piece.low > piece.high:
            continue
        last = result[-1] if result else None
        joined = last is not None and (
            piece.low < last.high or (piece.low == last.high and not (piece.low_open and last.high_open))
        )
        if last is not None and joined:
            high, closed = max((last.high, not last.high_open), (piece.high, not piece.high_open))
            result[-1] = Piece(last.low, high, last.low_open, not closed)
        else:
            result.append(piece)
    return result
