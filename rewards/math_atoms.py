"""The lower half of the parser: tokens to atoms (numbers, brackets, functions, LaTeX commands, matrices).

In: tokens. Out: `Node`s. `rewards.math_parse` builds sums, relations and lists on top of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from rewards.math_nodes import Node, NodeKind, name_node, number_node, times
from rewards.math_tokens import END, MathSyntaxError, Token, name_set

MAX_DEPTH = 80

_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}
_MATRICES = name_set("matrix pmatrix bmatrix vmatrix Vmatrix Bmatrix smallmatrix array")
_TRANSPARENT = name_set("aligned align align* gathered split equation equation*")
_OPAQUE_MARKS = name_set("overline bar vec hat tilde widehat overrightarrow")


class AtomParser(ABC):
    """Reads tokens from left to right; `depth` counts open calls so that nesting stays below MAX_DEPTH."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.in_set = False

    def peek(self, ahead: int = 0) -> Token:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def take(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, *texts: str) -> Token | None:
        token = self.peek()
        if token.kind in ("op", "command") and token.text in texts:
            self.at += 1
            return token
        return None

    def expect(self, *texts: str) -> Token:
        token = self.accept(*texts)
        if token is None:
            raise MathSyntaxError(f"expected {' or '.join(texts)}, found {self.peek().text!r}")
        return token

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise MathSyntaxError(f"nested more than {MAX_DEPTH} deep")

    @abstractmethod
    def parse_list(self) -> Node: ...

    @abstractmethod
    def parse_relation(self) -> Node: ...

    @abstractmethod
    def parse_sum(self) -> Node: ...

    @abstractmethod
    def parse_product(self) -> Node: ...

    @abstractmethod
    def parse_factor(self) -> Node: ...

    @abstractmethod
    def parse_power(self) -> Node: ...

    @abstractmethod
    def parse_postfix(self, node: Node) -> Node: ...

    def argument_text(self) -> str:
        token = self.take()
        if token.text != "{":
            return token.text
        pieces: list[str] = []
        while (token := self.take()).text != "}":
            if token is END:
                raise MathSyntaxError("unclosed {")
            pieces.append(token.text)
        return "".join(pieces)

    def argument(self, *, power: bool = False) -> Node:
        """One argument of a command or power: `{...}`, a single token (the first digit of a number), or a command."""
        self.descend()
        node = self._argument_inside(power)
        self.depth -= 1
        return node

    def _argument_inside(self, power: bool) -> Node:
        token = self.peek()
        if token.text == "{" and token.kind == "op":
            return self.parse_atom()
        if token.kind == "op" and token.text in ("-", "+") and power:
            self.at += 1
            inner = self.argument(power=True)
            return Node("neg", (inner,)) if token.text == "-" else inner
        if token.kind == "number" and not power and len(token.text) > 1 and "." not in token.text:
            self.tokens[self.at] = Token("number", token.text[1:])
            return number_node(token.text[0])
        if power and token.kind in ("number", "letter", "constant"):
            self.at += 1
            node = number_node(token.text) if token.kind == "number" else name_node(token)
            if self.peek().text in ("^", "**") and self.peek().kind == "op":
                return self.parse_postfix(node)
            return node
        return self.parse_atom()

    def parse_atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self._repeating(token.text) or number_node(token.text)
        if token.kind in ("letter", "constant"):
            return self._applied(name_node(token))
        if token.kind == "word":
            return self._words(token)
        if token.kind == "function":
            return self._function(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.kind == "op" and token.text in _CLOSING:
            return self._bracketed(token.text)
        if token.kind == "op" and token.text == "|":
            self.bars += 1
            inner = self.parse_list()
            self.expect("|")
            self.bars -= 1
            return Node("abs", (inner,))
        raise MathSyntaxError(f"unexpected {token.text!r}" if token is not END else "the expression breaks off")

    def _repeating(self, leading: str) -> Node | None:
        """`0.1\\overline{6}`: a decimal with repeating digits, as an exact fraction."""
        point = self.peek().text == "."
        mark = self.peek(1 if point else 0)
        if mark.text not in ("overline", "bar") or not (point or "." in leading):
            return None
        start = self.at
        self.at += 2 if point else 1
        digits = self.argument_text()
        if not digits.isdigit() or len(digits) > 40:
            self.at = start
            return None
        shift = 10 ** len(leading.partition(".")[2])
        value = Fraction(leading) + Fraction(int(digits), (10 ** len(digits) - 1) * shift)
        return Node("number", (), f"{leading}({digits})", value)

    def _words(self, first: Token) -> Node:
        words = [first.text]
        while self.peek().kind == "word":
            words.append(self.take().text)
        return Node("text", (), " ".join(words))

    def _applied(self, symbol: Node) -> Node:
        """`f(x)`: letters that usually name functions, directly before a bracket, are applied and not multiplied."""
        token = self.peek()
        if symbol.text in ("f", "g", "h", "F", "G") and token.text == "(" and not token.spaced:
            self.at += 1
            return Node("opaque", (self._bracketed("("),), symbol.text)
        return symbol

    def _bracketed(self, opening: str) -> Node:
        if opening == "\\{" and self.accept("\\}"):
            return Node("set")
        if opening == "{" and self.accept("}"):
            return Node("text")
        outside = self.bars, self.in_set
        self.bars, self.in_set = 0, opening == "\\{"
        inner = self.parse_list()
        built = opening == "\\{" and self.accept("|", ":") is not None
        if built:
            inner = self.parse_list()  # `\\{x : x > 1\\}` is the set of its condition
        closing = self.expect(*_CLOSING[opening]).text
        self.bars, self.in_set = outside
        if built:
            return inner
        items = inner.args if inner.kind == "list" else (inner,)
        if opening == "\\{":
            return Node("set", items)
        if opening == "{":
            return Node("list", items, "{") if inner.kind == "list" else inner
        if inner.kind == "list":
            return Node("tuple", items, opening + closing)
        if opening + closing in ("()", "[]"):
            return inner
        raise MathSyntaxError("an interval needs two ends")

    def _function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        while (mark := self.accept("^", "_")) is not None:
            if mark.text == "^":
                power = self.argument(power=True)
            else:
                base = self.argument()
        if power is not None and power.kind == "neg" and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            name, power = "arc" + name, None
        bracketed = self.peek().text in ("(", "{", "[") and self.peek().kind == "op"
        argument = self.parse_atom() if bracketed else self._bare_argument()
        items = argument.args if argument.kind in ("tuple", "list") else (argument,)
        node = Node("function", (*items, *((base,) if base else ())), name + ("_" if base else ""))
        return node if power is None else Node("pow", (node, power))

    def _bare_argument(self) -> Node:
        """`\\sin 2x`: everything up to the next sum, relation or function."""
        node = self.parse_factor()
        while self.peek().kind in ("letter", "constant") or self.peek().text == "frac":
            node = times(node, self.parse_power())
        while self.peek().text == "/" and self.peek(1).kind in ("number", "letter", "constant"):
            self.at += 1
            node = Node("div", (node, self.parse_power()))
        return node

    def _command(self, name: str) -> Node:
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "binom":
            return Node("function", (self.argument(), self.argument()), "binom")
        if name == "sqrt":
            index: Node | None = None
            if self.accept("["):
                index = self.parse_sum()
                self.expect("]")
            argument = self.parse_atom() if self.peek().text == "(" else self.argument()
            return Node("root", (argument,) if index is None else (argument, index))
        if name == "begin":
            return self._environment()
        if name in ("sum", "prod", "int", "lim"):
            return self._large_operator(name)
        if name == "mathbb":
            return Node("number_set", (), self.argument_text())
        if name in ("lfloor", "lceil", "langle"):
            inner = self.parse_list()
            self.expect(name.replace("l", "r", 1))
            if name == "langle":
                return Node("tuple", inner.args if inner.kind == "list" else (inner,), "()")
            return Node("floor" if name == "lfloor" else "ceil", (inner,))
        if name in _OPAQUE_MARKS:
            return Node("opaque", (self.argument(),), name)
        if name in ("angle", "triangle"):
            return Node("opaque", (self.parse_product(),), name)
        if name == "ldots":
            return Node("dots")
        if name == "emptyset":
            return Node("set")
        raise MathSyntaxError(f"unexpected \\{name}")

    def _large_operator(self, name: str) -> Node:
        bounds: list[Node] = []
        while (mark := self.accept("_", "^")) is not None:
            argument = self.parse_atom() if self.peek().text == "{" else self.argument(power=True)
            bounds.append(Node("opaque", (argument,), mark.text))
        body = self.parse_product()
        return Node("opaque", (*bounds, body), name)

    def _environment(self) -> Node:
        name = self.argument_text()
        if name in _TRANSPARENT:
            inner = self.parse_list()
            self._end_environment()
            return inner
        if name not in _MATRICES:
            raise MathSyntaxError(f"unknown environment {name}")
        if name == "array" and self.peek().text == "{":
            self.argument_text()
        rows: list[list[Node]] = [[]]
        while not self.accept("end"):
            if self.accept("\\\\"):
                rows.append([])
                self._skip_row_space()
            elif not self.accept("&"):
                rows[-1].append(self.parse_relation())
        self.argument_text()
        filled = [row for row in rows if row]
        if not filled or len({len(row) for row in filled}) != 1:
            raise MathSyntaxError("a matrix needs rows of equal length")
        kind: NodeKind = "opaque" if name in ("vmatrix", "Vmatrix") else "matrix"
        return Node(kind, tuple(Node("group", tuple(row)) for row in filled), "det" if kind == "opaque" else "")

    def _skip_row_space(self) -> None:
        """The `[4pt]` behind a row."""
        if self.peek().text == "[" and self.peek(1).kind == "number" and self.peek(3).text == "]":
            self.at += 4

    def _end_environment(self) -> None:
        self.expect("end")
        self.argument_text()
