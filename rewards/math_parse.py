"""Answers as trees: a recursive-descent parser for the mathematics that stands in final answers.

In: answer text (LaTeX, plain text or a mix). Out: a `Node`. Depth and number of tokens are bounded, nothing is evaluated.

    list      := relation ((',' | ';' | 'and' | 'or') relation)*
    relation  := union (('=' | '<' | '\\le' | ... | '\\in' | ':') union)*
    union     := sum (('\\cup' | '\\cap' | '\\setminus') sum)*
    sum       := ['+' | '-' | '\\pm'] product (('+' | '-' | '\\pm') product)*
    product   := power (['*' | '/' | '\\cdot' | '\\times'] power)* [unit words]
    power     := atom ('^' argument | '_' argument | '!' | '%' | '^\\circ')*

The tree keeps what comparison needs: brackets of tuples and intervals, relation signs, units, number bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rewards.latex_text import clean_math
from rewards.number_words import number_from_words
from rewards.math_tokens import END, MathSyntaxError, Token, tokenize

NodeKind = Literal[
    "number", "symbol", "constant", "add", "mul", "div", "pow", "neg", "pm", "function", "factorial", "percent", "degree",
    "matrix", "tuple", "set", "list", "group", "relation", "union", "intersection", "difference", "ratio", "based", "text",
    "unit", "abs", "floor", "ceil", "opaque", "root", "dots", "number_set",
]  # fmt: skip
MAX_DEPTH = 60
MAX_CHARS = 3000


@dataclass(frozen=True, slots=True)
class Node:
    """kind; args: children; text: name, brackets or relation signs; number: value of a literal; decimal: it was written
    with a decimal point."""

    kind: NodeKind
    args: tuple[Node, ...] = ()
    text: str = ""
    number: Fraction = Fraction(0)
    decimal: bool = False


_RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "ge": ">=", "ne": "!=",
    "in": "in", "approx": "~", "sim": "~", "equiv": "=", "cong": "~", "notin": "notin", "rightarrow": "->", "->": "->",
    "Rightarrow": "=>", "=>": "=>", "Leftrightarrow": "=>", "subset": "subset", "subseteq": "subset",
}  # fmt: skip
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}
_IMPLICIT_STARTS = ("(", "[", "{", "\\{")
_MATRICES = frozenset("matrix pmatrix bmatrix vmatrix Vmatrix Bmatrix smallmatrix array".split())
_TRANSPARENT = frozenset("aligned align align* gathered split equation equation*".split())
_PREFIX_COMMANDS = frozenset("frac sqrt binom begin sum prod int lim mathbb lfloor lceil overline bar vec hat ldots langle "
                             "angle triangle tilde widehat overrightarrow".split())  # fmt: skip
_OPAQUE_MARKS = frozenset("overline bar vec hat tilde widehat overrightarrow".split())


def parse_math(text: str) -> Node:
    """The tree of `text`. MathSyntaxError when it is no mathematics that we know, HostileText for hidden characters.

    >>> parse_math("1/2").kind, parse_math("(1, 2]").text
    ('div', '(]')
    """
    if len(text) > MAX_CHARS:
        raise MathSyntaxError(f"answer of {len(text)} characters, more than {MAX_CHARS}")
    cleaned = clean_math(text)
    if not cleaned:
        raise MathSyntaxError("empty answer")
    parser = _Parser(tokenize(cleaned))
    node = parser.parse_list()
    if parser.peek() is not END:
        raise MathSyntaxError(f"unexpected {parser.peek().text!r}")
    return node


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

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

    # lists, relations, unions

    def parse_list(self) -> Node:
        """Items between ',' ';' 'and' 'or'. Semicolons bind weakest: `p=5,q=2;p=7,q=2` is a list of two lists."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise MathSyntaxError(f"nested more than {MAX_DEPTH} deep")
        rows: list[list[Node]] = [[self.parse_relation()]]
        separators: list[str] = []
        while (separator := self._separator()) is not None:
            if self._at_list_end():
                break
            separators.append(separator)
            if separator == ";":
                rows.append([])
            rows[-1].append(self.parse_relation())
        self.depth -= 1
        word = "or" if "or" in separators else "and" if "and" in separators else ","
        if len(rows) == 1:
            return rows[0][0] if len(rows[0]) == 1 else Node("list", tuple(rows[0]), word)
        grouped = any(len(row) > 1 for row in rows)
        items = [Node("group", tuple(row)) if grouped else row[0] for row in rows]
        return Node("list", tuple(items), ";")

    def _separator(self) -> str | None:
        found: str | None = None
        while (token := self.accept(",", ";", "and", "or", "wedge", "vee")) is not None:
            name = {"wedge": "and", "vee": "or"}.get(token.text, token.text)
            found = name if found in (None, ",") else found
        return found

    def _at_list_end(self) -> bool:
        token = self.peek()
        return token is END or (token.kind == "op" and token.text in (")", "]", "}", "\\}"))

    def parse_relation(self) -> Node:
        items = [self.parse_union()]
        signs: list[str] = []
        while True:
            token = self.peek()
            if token.kind in ("op", "command") and token.text in _RELATIONS:
                self.at += 1
                signs.append(_RELATIONS[token.text])
                items.append(self.parse_union())
            elif token.kind == "op" and token.text == ":" and self.peek(1).kind != "end":
                self.at += 1
                items.append(Node("ratio", (items.pop(), self.parse_union())))
            else:
                break
        if not signs:
            return items[0]
        return Node("relation", tuple(items), " ".join(signs))

    def parse_union(self) -> Node:
        left = self.parse_sum()
        kinds: dict[str, NodeKind] = {"cup": "union", "cap": "intersection", "setminus": "difference"}
        while (token := self.accept("cup", "cap", "setminus")) is not None:
            left = Node(kinds[token.text], (left, self.parse_sum()))
        return left

    # sums and products

    def parse_sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise MathSyntaxError(f"nested more than {MAX_DEPTH} deep")
        terms = [self._signed_product()]
        while (token := self.accept("+", "-", "pm", "mp")) is not None:
            term = self._signed_product()
            if token.text == "-":
                term = Node("neg", (term,))
            elif token.text in ("pm", "mp"):
                term = Node("pm", (term,), token.text)
            terms.append(term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed_product(self) -> Node:
        negative = False
        marked = ""
        while (token := self.accept("+", "-", "pm", "mp")) is not None:
            negative ^= token.text == "-"
            if token.text in ("pm", "mp"):
                marked = token.text
        node = self.parse_product()
        if marked:
            node = Node("pm", (node,), marked)
        return Node("neg", (node,)) if negative else node

    def parse_product(self) -> Node:
        left = self._mixed_number() or self.parse_power()
        while True:
            token = self.peek()
            if self.accept("*", "cdot", "times"):
                left = _times(left, self._factor())
            elif token.kind == "op" and token.text == "/" and self.peek(1).kind != "word":
                self.at += 1
                left = Node("div", (left, self._factor()))
            elif self.accept("bmod", "mod"):
                left = Node("opaque", (left, self._factor()), "mod")
            elif token.kind == "word" or (token.kind == "op" and token.text == "/" and self.peek(1).kind == "word"):
                left = self._unit(left)
            elif token.text == "(" and self.peek(1).kind == "word" and self._bracketed_words():
                left = Node("unit", (left,))
            elif self._starts_factor(token):
                left = _times(left, self.parse_power())
            else:
                return left

    def _factor(self) -> Node:
        if self.accept("-"):
            return Node("neg", (self._factor(),))
        if self.accept("+"):
            return self._factor()
        return self.parse_power()

    def _starts_factor(self, token: Token) -> bool:
        if token.kind in ("number", "letter", "constant", "function"):
            return True
        if token.kind == "command":
            return token.text in _PREFIX_COMMANDS
        if token.kind == "op" and token.text == "|":
            return self.bars == 0 and any(other.text == "|" for other in self.tokens[self.at + 1 :])
        return token.kind == "op" and token.text in _IMPLICIT_STARTS

    def _mixed_number(self) -> Node | None:
        """`3\\frac{1}{2}` and `3 1/2`: a whole number directly before a fraction of whole numbers."""
        whole = self.peek()
        if whole.kind != "number" or "." in whole.text:
            return None
        start, following = self.at, self.peek(1)
        if following.kind == "command" and following.text == "frac":
            self.at += 1
            fraction = self.parse_atom()
            if all(part.kind == "number" and not part.decimal for part in fraction.args):
                return Node("add", (_number(whole.text), fraction))
        elif following.kind == "number" and following.spaced and self.peek(2).text == "/" and self.peek(3).kind == "number":
            top, bottom = following.text, self.peek(3).text
            self.at += 4
            return Node("add", (_number(whole.text), Node("div", (_number(top), _number(bottom)))))
        self.at = start
        return None

    def _unit(self, value: Node) -> Node:
        """Words behind a value: its unit (`square inches`, `dollars per week`), kept as text."""
        words: list[str] = []
        while True:
            token = self.peek()
            if token.kind == "word":
                words.append(token.text)
            elif token.kind == "op" and token.text in ("/", ".") and words and self.peek(1).kind in ("word", "letter"):
                words.append("per" if token.text == "/" else "")
            elif token.kind == "op" and token.text == "/" and self.peek(1).kind == "word":
                words.append("per")
            elif token.kind == "letter" and words and (token.spaced or words[-1] == "per"):
                words.append(token.text)
            elif token.kind == "op" and token.text == "^" and words:
                self.at += 1
                words.append("^" + self._argument_text())
                continue
            elif token.kind == "number" and words and not self._number_is_factor():
                words.append(token.text)
            elif token.kind == "op" and token.text in ("(", ")") and words and self._bracketed_words():
                continue
            else:
                break
            self.at += 1
        text = " ".join(word for word in words if word)
        if value.kind == "text":
            return Node("text", (), f"{value.text} {text}")
        return Node("unit", (value,), text)

    def _number_is_factor(self) -> bool:
        return self.peek(1).kind in ("op", "command") and self.peek(1).text not in (",", ";", ".", "and", "or")

    def _bracketed_words(self) -> bool:
        """Skips `(some words)` behind a unit."""
        ahead = 1
        while self.peek(ahead).kind in ("word", "letter", "number") or self.peek(ahead).text == "-":
            ahead += 1
        if ahead > 1 and self.peek().text == "(" and self.peek(ahead).text == ")":
            self.at += ahead + 1
            return True
        return False

    def _argument_text(self) -> str:
        token = self.take()
        if token.text != "{":
            return token.text
        pieces: list[str] = []
        while (token := self.take()).text != "}":
            if token is END:
                raise MathSyntaxError("unclosed {")
            pieces.append(token.text)
        return "".join(pieces)

    # powers and atoms

    def parse_power(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise MathSyntaxError(f"nested more than {MAX_DEPTH} deep")
        node = self._postfix(self.parse_atom())
        self.depth -= 1
        return node

    def _postfix(self, node: Node) -> Node:
        while True:
            token = self.peek()
            if token.kind != "op":
                return node
            if token.text in ("^", "**"):
                self.at += 1
                node = self._raise(node)
            elif token.text == "_":
                self.at += 1
                node = _subscripted(node, self._argument_text())
            elif token.text == "!" and self.peek(1).text != "=":
                self.at += 1
                node = Node("factorial", (node,))
            elif token.text == "%":
                self.at += 1
                node = Node("percent", (node,))
            elif token.text == "'":
                self.at += 1
                node = Node("symbol", (), node.text + "'") if node.kind == "symbol" else Node("opaque", (node,), "prime")
            else:
                return node

    def _raise(self, base: Node) -> Node:
        if self.accept("circ"):
            return self._degrees(base)
        if self.peek().text == "{" and self.peek(1).text == "circ" and self.peek(2).text == "}":
            self.at += 3
            return self._degrees(base)
        if self.accept("prime"):
            return Node("symbol", (), base.text + "'") if base.kind == "symbol" else Node("opaque", (base,), "prime")
        return Node("pow", (base, self._argument(power=True)))

    def _degrees(self, base: Node) -> Node:
        token = self.peek()
        if token.kind == "letter" and token.text in "CF" and self.peek(1).kind in ("end", "op"):
            self.at += 1
            return Node("unit", (base,), f"degrees {token.text}")
        return Node("degree", (base,))

    def _argument(self, *, power: bool = False) -> Node:
        """One argument of a command or power: `{...}`, a single token (the first digit of a number), or a command."""
        token = self.peek()
        if token.text == "{" and token.kind == "op":
            return self.parse_atom()
        if token.kind == "op" and token.text in ("-", "+") and power:
            self.at += 1
            inner = self._argument(power=True)
            return Node("neg", (inner,)) if token.text == "-" else inner
        if token.kind == "number" and not power and len(token.text) > 1 and "." not in token.text:
            self.tokens[self.at] = Token("number", token.text[1:])
            return _number(token.text[0])
        if power and token.kind in ("number", "letter", "constant"):
            self.at += 1
            node = _number(token.text) if token.kind == "number" else _name(token)
            if self.peek().text in ("^", "**") and self.peek().kind == "op":
                return self._postfix(node)
            return node
        return self.parse_atom()

    def parse_atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self._repeating(token.text) or _number(token.text)
        if token.kind in ("letter", "constant"):
            return self._applied(_name(token))
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
        digits = self._argument_text()
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
        bars, self.bars = self.bars, 0
        inner = self.parse_list()
        if opening == "\\{" and self.accept("|", ":"):
            inner = self.parse_list()
            self.bars = bars
            self.expect("\\}")
            return inner
        closing = self.expect(*_CLOSING[opening]).text
        self.bars = bars
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
                power = self._argument(power=True)
            else:
                base = self._argument()
        if power is not None and power.kind == "neg" and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            name, power = "arc" + name, None
        bracketed = self.peek().text in ("(", "{", "[") and self.peek().kind == "op"
        argument = self.parse_atom() if bracketed else self._bare_argument()
        items = argument.args if argument.kind in ("tuple", "list") else (argument,)
        node = Node("function", (*items, *((base,) if base else ())), name + ("_" if base else ""))
        return node if power is None else Node("pow", (node, power))

    def _bare_argument(self) -> Node:
        """`\\sin 2x`: everything up to the next sum, relation or function."""
        if self.accept("-"):
            return Node("neg", (self._bare_argument(),))
        node = self.parse_power()
        while self.peek().kind in ("number", "letter", "constant") or self.peek().text == "frac":
            node = _times(node, self.parse_power())
        while self.peek().text == "/" and self.peek(1).kind in ("number", "letter", "constant"):
            self.at += 1
            node = Node("div", (node, self.parse_power()))
        return node

    def _command(self, name: str) -> Node:
        if name == "frac":
            return Node("div", (self._argument(), self._argument()))
        if name == "binom":
            return Node("function", (self._argument(), self._argument()), "binom")
        if name == "sqrt":
            index: Node | None = None
            if self.accept("["):
                index = self.parse_sum()
                self.expect("]")
            argument = self.parse_atom() if self.peek().text == "(" else self._argument()
            return Node("root", (argument,) if index is None else (argument, index))
        if name == "begin":
            return self._environment()
        if name in ("sum", "prod", "int", "lim"):
            return self._large_operator(name)
        if name == "mathbb":
            return Node("number_set", (), self._argument_text())
        if name in ("lfloor", "lceil", "langle"):
            inner = self.parse_list()
            self.expect(name.replace("l", "r", 1))
            if name == "langle":
                return Node("tuple", inner.args if inner.kind == "list" else (inner,), "()")
            return Node("floor" if name == "lfloor" else "ceil", (inner,))
        if name in _OPAQUE_MARKS:
            return Node("opaque", (self._argument(),), name)
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
            argument = self.parse_atom() if self.peek().text == "{" else self._argument(power=True)
            bounds.append(Node("opaque", (argument,), mark.text))
        body = self.parse_product()
        return Node("opaque", (*bounds, body), name)

    def _environment(self) -> Node:
        name = self._argument_text()
        if name in _TRANSPARENT:
            inner = self.parse_list()
            self._end_environment()
            return inner
        if name not in _MATRICES:
            raise MathSyntaxError(f"unknown environment {name}")
        if name == "array" and self.peek().text == "{":
            self._argument_text()
        rows: list[list[Node]] = [[]]
        while not self.accept("end"):
            if self.accept("\\\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.parse_relation())
        self._argument_text()
        filled = [row for row in rows if row]
        if not filled or len({len(row) for row in filled}) != 1:
            raise MathSyntaxError("a matrix needs rows of equal length")
        kind: NodeKind = "opaque" if name in ("vmatrix", "Vmatrix") else "matrix"
        return Node(kind, tuple(Node("group", tuple(row)) for row in filled), "det" if kind == "opaque" else "")

    def _end_environment(self) -> None:
        self.expect("end")
        self._argument_text()


def _number(text: str) -> Node:
    if len(text) > 400:
        raise MathSyntaxError("a number of more than 400 digits")
    return Node("number", (), text, Fraction(text), "." in text)


def _name(token: Token) -> Node:
    return Node("constant" if token.kind == "constant" else "symbol", (), token.text)


def _times(left: Node, right: Node) -> Node:
    if right.kind == "unit":
        return Node("unit", (_times(left, right.args[0]),), right.text)
    factors = left.args if left.kind == "mul" else (left,)
    return Node("mul", (*factors, right))


def _subscripted(node: Node, subscript: str) -> Node:
    if node.kind == "number":
        base = int(subscript) if subscript.isdigit() and len(subscript) < 6 else number_from_words(subscript)
        if base is not None:
            return Node("based", (), f"{node.text}_{base}")
    if node.kind in ("symbol", "opaque", "constant"):
        return Node("symbol", node.args, f"{node.text}_{subscript}")
    raise MathSyntaxError("a subscript on a value")
