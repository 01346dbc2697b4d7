"""Matrices in answers: sums, products and multiples of matrices worked out to entries, symbolically.

In: a `Node`. Out: rows of entry trees, or None when the node is no matrix.
"""

from __future__ import annotations

from dataclasses import replace

from rewards.math_nodes import Node, number_node

MAX_MATRICES = 3
MAX_SIDE = 8


def matrix_entries(node: Node) -> list[list[Node]] | None:
    """Entries of a matrix, or of a sum, product or multiple of matrices up to 8 x 8; None for anything else."""
    if node.kind == "matrix":
        return [list(row.args) for row in node.args]
    if node.kind == "neg" and (inner := matrix_entries(node.args[0])) is not None:
        return [[Node("neg", (entry,)) for entry in row] for row in inner]
    if node.kind == "pow" and node.args[1].text == "T" and (inner := matrix_entries(node.args[0])) is not None:
        return [list(column) for column in zip(*inner, strict=True)]
    if node.kind not in ("add", "mul"):
        return None
    result: list[list[Node]] | None = None
    scalars: list[Node] = []
    if sum(_holds_matrix(arg) for arg in node.args) > MAX_MATRICES:
        return None
    for arg in node.args:
        matrix = matrix_entries(arg)
        if matrix is None:
            if node.kind == "add":
                return None
            scalars.append(arg)
        else:
            result = matrix if result is None else _combine(result, matrix, node.kind)
            if result is None:
                return None
    if result is None or not scalars:
        return result
    return [[Node("mul", (*scalars, entry)) for entry in row] for row in result]


def with_identity(node: Node, side: int) -> Node:
    """`node` with the identity matrix of `side` rows for the symbol `I`: `-I` beside a 2 x 2 matrix."""
    if node.kind == "symbol" and node.text == "I":
        digits = [["1" if row == column else "0" for column in range(side)] for row in range(side)]
        return Node("matrix", tuple(Node("list", tuple(map(number_node, row))) for row in digits))
    return replace(node, args=tuple(with_identity(arg, side) for arg in node.args)) if node.args else node


def nested_entries(node: Node) -> list[list[Node]] | None:
    """Entries of a list of rows, `[[1, 2], [3, 4]]`; None for anything else."""
    rows = node.args if node.kind == "tuple" and node.text in ("[]", "()") else ()
    if not rows or any(row.kind != "tuple" or len(row.args) != len(rows[0].args) for row in rows):
        return None
    return [list(row.args) for row in rows]


def _holds_matrix(node: Node) -> bool:
    return node.kind == "matrix" or any(_holds_matrix(arg) for arg in node.args)


def _combine(left: list[list[Node]], right: list[list[Node]], kind: str) -> list[list[Node]] | None:
    if max(len(left), len(left[0]), len(right), len(right[0])) > MAX_SIDE:
        return None
    if kind == "add":
        if (len(left), len(left[0])) != (len(right), len(right[0])):
            return None
        return [[Node("add", pair) for pair in zip(a, b, strict=True)] for a, b in zip(left, right, strict=True)]
    if len(left[0]) != len(right):
        return None
    columns = list(zip(*right, strict=True))
    return [
        [Node("add", tuple(Node("mul", pair) for pair in zip(row, column, strict=True))) for column in columns]
        for row in left
    ]
