"""The tree that an answer is parsed to, and the constructors of its simple nodes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rewards.math_tokens import MathSyntaxError, Token
from rewards.number_words import number_from_words

NodeKind = Literal[
    "number", "symbol", "constant", "add", "mul", "div", "pow", "neg", "pm", "function", "factorial", "percent",
    "degree", "matrix", "tuple", "set", "list", "group", "relation", "union", "intersection", "difference", "ratio",
    "based", "text", "unit", "abs", "floor", "ceil", "opaque", "root", "dots", "number_set",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """kind; args: children; text: name, brackets or relation signs; number: value of a literal; decimal: it was written
    with a decimal point."""

    kind: NodeKind
    args: tuple[Node, ...] = ()
    text: str = ""
    number: Fraction = Fraction(0)
    decimal: bool = False


def number_node(text: str) -> Node:
    if len(text) > 400:
        raise MathSyntaxError("a number of more than 400 digits")
    return Node("number", (), text, Fraction(text), "." in text)


def name_node(token: Token) -> Node:
    return Node("constant" if token.kind == "constant" else "symbol", (), token.text)


def times(left: Node, right: Node) -> Node:
    if right.kind == "unit":
        return Node("unit", (times(left, right.args[0]),), right.text)
    factors = left.args if left.kind == "mul" else (left,)
    return Node("mul", (*factors, right))


def subscripted(node: Node, subscript: str) -> Node:
    if node.kind == "number":
        base = int(subscript) if subscript.isdigit() and len(subscript) < 6 else number_from_words(subscript)
        if base is not None:
            return Node("based", (), f"{node.text}_{base}")
    if node.kind in ("symbol", "opaque", "constant"):
        return Node("symbol", node.args, f"{node.text}_{subscript}")
    raise MathSyntaxError("a subscript on a value")
