"""Answers as trees: a recursive-descent parser for the mathematics that stands in final answers.

In: answer text (LaTeX, plain text or a mix). Out: a `Node`. Depth and number of tokens are bounded, nothing is
evaluated.

    list      := relation ((',' | ';' | 'and' | 'or') relation)*
    relation  := union (('=' | '<' | '\\le' | ... | '\\in' | ':') union)*
    union     := sum (('\\cup' | '\\cap' | '\\setminus') sum)*
    sum       := ['+' | '-' | '\\pm'] product (('+' | '-' | '\\pm') product)*
    product   := power (['*' | '/' | '\\cdot' | '\\times'] power)* [unit words]
    power     := atom ('^' argument | '_' argument | '!' | '%' | '^\\circ')*

The tree keeps what comparison needs: brackets of tuples and intervals, relation signs, units, number bases.
"""

from __future__ import annotations

from rewards.latex_text import clean_math
from rewards.math_atoms import AtomParser
from rewards.math_eval import exact_value
from rewards.math_nodes import Node, NodeKind, number_node, subscripted, times
from rewards.math_tokens import END, MathSyntaxError, NumbersSideBySide, Token, name_set, tokenize

MAX_HEIGHT = 60
MAX_CHARS = 3000


_RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "ge": ">=", "ne": "!=",
    "in": "in", "approx": "~", "sim": "~", "equiv": "=", "cong": "~", "notin": "notin", "rightarrow": "->", "->": "->",
    "Rightarrow": "=>", "=>": "=>", "Leftrightarrow": "=>", "subset": "subset", "subseteq": "subset",
}  # fmt: skip
# `42 thousand` is 42,000 and `42 hundredths` is 0.42 (quarters and seconds are coins and times).
SCALES = {"hundred": "100", "thousand": "1e3", "million": "1e6", "billion": "1e9", "trillion": "1e12"}
_PARTS = "halves thirds fourths fifths sixths sevenths eighths ninths tenths"
SCALES |= {part: f"1/{bottom}" for bottom, part in enumerate(_PARTS.split(), start=2)}
SCALES |= {"hundredths": "1/100", "thousandths": "1/1000"}
# A number behind one of these is no part of a unit: `5 to 6`.
_BETWEEN_NUMBERS = name_set("to or and vs not than is are equals minus plus times")
_IMPLICIT_STARTS = ("(", "[", "{", "\\{")
_PREFIX_COMMANDS = name_set(
    "frac sqrt binom begin sum prod int lim mathbb lfloor lceil overline bar vec hat ldots langle angle triangle "
    "tilde widehat overrightarrow"
)  # fmt: skip


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
    if _height(node) > MAX_HEIGHT:
        raise MathSyntaxError(f"a tree of more than {MAX_HEIGHT} levels")
    return node


def _height(root: Node) -> int:
    """Levels of the tree, counted without recursion: `5!!!!!...` is deep without any bracket."""
    level, height = [root], 0
    while level:
        height += 1
        level = [arg for node in level for arg in node.args]
    return height


def _is_literal(node: Node) -> bool:
    return node.kind == "number" or (node.kind in ("neg", "abs", "floor", "ceil") and _is_literal(node.args[0]))


class _Parser(AtomParser):
    """The upper half: lists, relations, unions, sums, products, units and powers."""

    # lists, relations, unions

    def parse_list(self) -> Node:
        """Items between ',' ';' 'and' 'or'. Semicolons bind weakest: `p=5,q=2;p=7,q=2` is a list of two lists."""
        self.descend()
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
        if len(rows) == 1 and len(rows[0]) == 1:
            return self._over(rows[0][0])
        if len(rows) == 1:
            return Node("list", tuple(rows[0]), word)
        grouped = any(len(row) > 1 for row in rows)
        items = [Node("group", tuple(row)) if grouped else row[0] for row in rows]
        return Node("list", tuple(items), ";")

    def _over(self, top: Node) -> Node:
        """`1 \\over 2` and `n \\choose 2`, inside of their braces."""
        if self.accept("over"):
            return Node("div", (top, self.parse_list()))
        return Node("function", (top, self.parse_list()), "binom") if self.accept("choose") else top

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
            elif token.text == ":" and not self.in_set and self.peek(1).kind != "end":
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
        self.descend()
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
            if token.text == "cdot" and left.kind == "unit" and self.peek(1).kind == "word":
                self.at += 1  # `5 \\text{N}\\cdot\\text{m}`
            elif self.accept("*", "cdot", "times"):
                left = times(left, self.parse_factor())
            elif token.kind == "op" and token.text == "/" and self.peek(1).kind != "word":
                chained = left.kind == "div" and self.tokens[self.at - 1].kind == "number"
                self.at += 1
                left = Node("div", (left, self.parse_factor()))
                if chained and _is_literal(left.args[1]):
                    raise NumbersSideBySide("a list with slashes: numbers side by side")
            elif self.accept("bmod", "mod"):
                left = Node("opaque", (left, self.parse_factor()), "mod")
            elif token.text == "frac" and (words := self._fraction_of_units()):
                left = Node("unit", (left,), words)
            elif token.kind == "word" or (token.text in ("/", "a") and self.peek(1).kind == "word"):
                left = self._unit(left)
            elif token.text == "(" and self.peek(1).kind == "word" and (words := self._bracketed_words()):
                left = Node("unit", (left,), words)
            elif self._starts_factor(token):
                left = self._juxtaposed(left)
            else:
                return left

    def _juxtaposed(self, left: Node) -> Node:
        """A product without a sign, where a mathematician writes one: `2x`, `3(x+1)`, `1000(26)`, `5\\sqrt{2}`. Numbers
        side by side (`2 3`, `{2}{3}`, `42 (41)`, `\\frac{4}{2} 3`) are a list without commas and no product."""
        before, token = self.tokens[self.at - 1], self.peek()
        last = left.args[-1] if left.kind == "mul" else left
        right = self.parse_power()
        if token.kind == "number":
            signs = {last.kind, right.kind}
            shown = signs == {"pow"} or (right.kind == "factorial" and last.kind in ("factorial", "function"))
            close = not token.spaced and before.kind != "number" and last.kind not in ("number", "div", "abs", "floor")
            allowed = shown or (close and exact_value(right) != 0)
        elif _is_literal(last) and _is_literal(right):
            bracketed = token.text == "(" and not token.spaced and (before.kind == "number" or before.text == ")")
            allowed = bracketed and exact_value(last) != 0 and exact_value(right) != 0
        else:
            allowed = True
        if not allowed:
            raise NumbersSideBySide("numbers side by side")
        return times(left, right)

    def parse_factor(self) -> Node:
        negative = False
        while (sign := self.accept("+", "-")) is not None:
            negative ^= sign.text == "-"
        node = self.parse_power()
        return Node("neg", (node,)) if negative else node

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
                return self._marked(Node("add", (number_node(whole.text), fraction)))
        elif (
            following.kind == "number"
            and following.spaced
            and self.peek(2).text == "/"
            and self.peek(3).kind == "number"
            and number_node(following.text).number < number_node(self.peek(3).text).number
        ):
            top, bottom = following.text, self.peek(3).text
            self.at += 4
            fraction = Node("div", (number_node(top), number_node(bottom)))
            return self._marked(Node("add", (number_node(whole.text), fraction)))
        self.at = start
        return None

    def _marked(self, mixed: Node) -> Node:
        """A mixed number with its percent or degree sign."""
        marked = self.peek().text == "%" or "circ" in (self.peek(1).text, self.peek(2).text)
        return self.parse_postfix(mixed) if marked else mixed

    def _unit(self, value: Node) -> Node:
        """Words behind a value: its unit (`square inches`, `dollars per week`), kept as text."""
        words: list[str] = []
        while True:
            token = self.peek()
            if token.kind == "word":
                if token.text.lower() in ("most", "least") and words[-1:] == ["at"]:
                    raise MathSyntaxError("a bound")  # `5 at most`
                words.append(token.text)
            elif token.kind == "op" and token.text in ("/", ".") and words and self.peek(1).kind in ("word", "letter"):
                words.append("per" if token.text == "/" else "")
            elif token.text in ("/", "a") and self.peek(1).kind == "word":
                words.append("per")  # `5 / hour`, `$34 a month`
            elif token.kind == "letter" and words and (token.spaced or words[-1] == "per"):
                words.append(token.text)
            elif token.kind == "op" and token.text == "^" and words:
                self.at += 1
                words.append("^" + self.argument_text())
                continue
            elif token.kind == "number" and words and not self._number_is_factor():
                if words[-1].lower() in _BETWEEN_NUMBERS:
                    raise NumbersSideBySide("numbers side by side")
                words.append(token.text)
            elif token.text == "(" and words and (aside := self._bracketed_words()):
                words.append(aside)
                continue
            else:
                break
            self.at += 1
        text = " ".join(word for word in words if word)
        if words and value.kind != "text":
            if words[0].lower() in ("squared", "cubed"):
                return Node("pow", (value, number_node("2" if words[0].lower() == "squared" else "3")))
            if scale := SCALES.get(words[0].lower()):
                value, text = times(value, number_node(scale)), text[len(words[0]) :].strip()
                return Node("unit", (value,), text) if text else value
        if value.kind == "text":
            return Node("text", (), f"{value.text} {text}")
        return Node("unit", (value,), text)

    def _number_is_factor(self) -> bool:
        return self.peek(1).kind in ("op", "command") and self.peek(1).text not in (",", ";", ".", "and", "or")

    def _fraction_of_units(self) -> str:
        """Takes `\\frac{\\text{km}}{\\text{h}}`; '' when this is another fraction."""
        start = self.at
        self.at += 1
        names: list[str] = []
        while len(names) < 2 and self.accept("{"):
            inside: list[str] = []
            while self.peek().kind == "word" or (names and self.peek().kind == "letter"):
                inside.append(self.take().text)
            if not inside or not self.accept("}"):
                break
            names.append(" ".join(inside))
        if len(names) < 2:
            self.at = start
        return " per ".join(names) if len(names) == 2 else ""

    def _bracketed_words(self) -> str:
        """Takes `(some words)` behind a value or unit; '' when there are none."""
        ahead = 1
        while self._names_unit(self.peek(ahead), self.peek(ahead - 1)):
            ahead += 1
        if ahead > 1 and self.peek().text == "(" and self.peek(ahead).text == ")":
            words = " ".join(self.peek(index).text for index in range(1, ahead))
            self.at += ahead + 1
            return words
        return ""

    @staticmethod
    def _names_unit(token: Token, before: Token) -> bool:
        power = token.kind == "number" and before.text in ("^", "{")
        return token.kind in ("word", "letter") or token.text in ("-", "^", "{", "}") or power

    # powers

    def parse_power(self) -> Node:
        self.descend()
        node = self.parse_postfix(self.parse_atom())
        self.depth -= 1
        return node

    def parse_postfix(self, node: Node) -> Node:
        while True:
            token = self.peek()
            if token.kind != "op":
                return node
            if token.text in ("^", "**"):
                self.at += 1
                node = self._raise(node)
            elif token.text == "_":
                self.at += 1
                node = subscripted(node, self.argument_text())
            elif token.text == "!" and self.peek(1).text != "=":
                self.at += 1
                node = Node("factorial", (node,))
            elif token.text == "%":
                self.at += 1
                node = Node("percent", (node,))
            elif token.text == "'":
                self.at += 1
                node = (
                    Node("symbol", (), node.text + "'") if node.kind == "symbol" else Node("opaque", (node,), "prime")
                )
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
        return Node("pow", (base, self.argument(power=True)))

    def _degrees(self, base: Node) -> Node:
        token = self.peek()
        if token.kind == "letter" and token.text in "CF" and self.peek(1).kind in ("end", "op"):
            self.at += 1
            return Node("unit", (base,), f"degrees {token.text}")
        return Node("degree", (base,))
