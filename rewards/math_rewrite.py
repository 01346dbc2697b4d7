"""Rewritings of answer trees that change the form and not the meaning, done before two answers are compared.

In and out: `Node`s. A unit is split off its value, chains of inequalities ascend, a double sign and a chain of
equations become lists, and the variable of a function takes the name it has in the reference.
"""

from __future__ import annotations

from rewards.math_eval import free_symbols
from rewards.math_nodes import Node
from rewards.math_tokens import name_set

_TAKES_BACK = name_set("not but or maybe perhaps no never wrong unless if except")


def split_unit(node: Node) -> tuple[str, Node]:
    """The words of the unit ('' for none) and the value without them."""
    if node.kind == "unit":
        inner_unit, inner = split_unit(node.args[0])
        return f"{inner_unit} {node.text}".strip(), inner
    if node.kind == "degree":
        return "degree", node.args[0]
    kinds = [arg.kind for arg in node.args]
    if node.kind == "list" and node.text == "," and kinds[0] != "text" and set(kinds[1:]) == {"text"}:
        words = " ".join(arg.text for arg in node.args[1:]).casefold().split()
        return split_unit(node.args[0]) if not _TAKES_BACK & set(words) else ("", node)  # `72, in total`
    if node.kind == "relation" and node.args[-1].kind in ("unit", "degree"):
        unit, last = split_unit(node.args[-1])
        return unit, Node("relation", (*node.args[:-1], last), node.text)
    return "", node


def ascending(node: Node) -> Node:
    """`3 > x > 1` as `1 < x < 3`."""
    signs = node.text.split() if node.kind == "relation" else []
    if not signs or not set(signs) <= {">", ">="}:
        return node
    flipped = " ".join({">": "<", ">=": "<="}[sign] for sign in reversed(signs))
    return Node("relation", tuple(reversed(node.args)), flipped)


def expand_chain(node: Node) -> Node:
    """`x = y = z = 1` as a list of three equations."""
    names = node.args[:-1] if node.kind == "relation" and set(node.text.split()) == {"="} else ()
    if (
        len(names) < 2
        or any(name.kind != "symbol" for name in names)
        or len({name.text for name in names}) < len(names)
    ):
        return node
    return Node("list", tuple(Node("relation", (name, node.args[-1]), "=") for name in names), "and")


# Signs: a \pm b stands for two values.


def expand_signs(node: Node) -> Node:
    """`1 \\pm \\sqrt 5` becomes a list of two; inside of a list or set the items are expanded in place."""
    if not _has_sign(node):
        return node
    if node.kind in ("list", "set", "group"):
        items: list[Node] = []
        for arg in node.args:
            expanded = expand_signs(arg)
            items.extend(expanded.args if expanded.kind == "list" and _has_sign(arg) else (expanded,))
        return Node(node.kind, tuple(items), node.text)
    if node.kind == "relation" and node.text == "=" and not _has_sign(node.args[0]):
        left, right = node.args[0], expand_signs(node.args[1])
        return Node("list", tuple(Node("relation", (left, arg), "=") for arg in right.args), "or")
    return Node("list", (_choose_sign(node, plus=True), _choose_sign(node, plus=False)), "or")


def _has_sign(node: Node) -> bool:
    return node.kind == "pm" or any(_has_sign(arg) for arg in node.args)


def _choose_sign(node: Node, *, plus: bool) -> Node:
    args = tuple(_choose_sign(arg, plus=plus) for arg in node.args)
    if node.kind == "pm":
        return args[0] if (node.text == "pm") == plus else Node("neg", args)
    return Node(node.kind, args, node.text, node.number, node.decimal) if args != node.args else node


def rename_variable(gold: Node, answer: Node) -> Node:
    """`f(n) = 2n` for the reference `f(x) = 2x`: the variable of a function may have any name."""
    left, right = gold.args[0], answer.args[0]
    if not (left.kind == right.kind == "opaque" and left.text == right.text and len(left.args) == len(right.args) == 1):
        return answer
    old, new = right.args[0], left.args[0]
    if old.kind != "symbol" or new.kind != "symbol" or new.text in free_symbols(answer):
        return answer
    return _replace(answer, old, new)


def _replace(node: Node, old: Node, new: Node) -> Node:
    if node == old:
        return new
    args = tuple(_replace(arg, old, new) for arg in node.args)
    return Node(node.kind, args, node.text, node.number, node.decimal) if args != node.args else node


_CAPITALS = frozenset("ABCDEHKMNOPQRSTUVWXYZ")  # names of points; F and G name functions


def without_point_name(node: Node) -> Node:
    """`P(1, 2)` as `(1, 2)`: a capital letter before coordinates names the point. `\\overline{CD}` as `CD`."""
    if node.kind == "opaque" and node.text == "overline" and node.args[0].kind == "mul":
        ends = node.args[0].args
        return node.args[0] if len(ends) == 2 and all(end.text in _CAPITALS for end in ends) else node
    if node.kind == "mul" and len(node.args) == 2 and node.args[1].kind == "tuple" and node.args[0].kind == "symbol":
        return node.args[1] if node.args[0].text in _CAPITALS else node
    return node


_INTEGER_NAMES = frozenset("kmn")


def rename_integer(gold: Node, answer: Node) -> Node:
    """`2\\pi n` for the reference `2\\pi k`: where `\\pi` or the set of integers stands beside it, the letter that runs
    through the integers may have any name."""
    old = (free_symbols(answer) - free_symbols(gold)) & _INTEGER_NAMES
    new = (free_symbols(gold) - free_symbols(answer)) & _INTEGER_NAMES
    if len(old) != 1 or len(new) != 1 or not (_runs(gold) and _runs(answer)):
        return answer
    (old_name,), (new_name,) = old, new
    return _replace(answer, Node("symbol", (), old_name), Node("symbol", (), new_name))


def _runs(node: Node) -> bool:
    return (node.kind, node.text) in (("constant", "pi"), ("number_set", "Z")) or any(map(_runs, node.args))
