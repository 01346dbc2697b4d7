"""Cleaned mathematical text to tokens.

In: text from `latex_text.clean_math`. Out: a list of `Token`. Kinds: `number` (unsigned decimal literal), `letter` (one
variable letter or a Greek command), `function` (sin, log, ...), `constant` (pi, infinity, ...), `word` (ordinary
text), `op` (everything with syntax). Whether a run of letters is a word, a function or a product of variables is
decided here, by the lists below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "letter", "function", "constant", "word", "op", "command", "end"]


def name_set(text: str) -> frozenset[str]:
    """The blank-separated names in `text`."""
    return frozenset(text.split())


FUNCTIONS = name_set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log lg exp sqrt cbrt abs floor ceil "
    "gcd lcm max min det arg sgn asin acos atan deg binomial binom factorial cis"
)
CONSTANTS = {"pi": "pi", "infty": "infinity", "infinity": "infinity", "inf": "infinity", "oo": "infinity", "euler": "e"}
GREEK = name_set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
# Commands that the parser knows by name.
SYNTAX = name_set(
    "frac sqrt binom begin end cdot times pm mp le ge ne emptyset approx in cup cap setminus circ ldots wedge vee over "
    "equiv sim notin rightarrow Rightarrow Leftrightarrow sum prod int lim mathbb lfloor rfloor lceil rceil "
    "overline bar vec hat prime cong langle rangle angle triangle forall exists subset subseteq neg bmod pmod mod "
    "perp parallel tilde widehat overrightarrow choose"
)
_TEXT_COMMANDS = name_set(
    "text mbox textbf textit textrm textnormal mathrm operatorname emph hbox texttt textsf textup"
)

_TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|\\(?P<command>[a-zA-Z]+)\*?"
    r"|(?P<word>[^\W\d_]+)"
    r"|(?P<op>\\\\|\\\{|\\\}|\*\*|<=|>=|!=|==|=>|->|[-+*/^_(){}\[\]|,;:=<>!'%&\"#@?.])"
    r"|(?P<space>\s+)"
)
_HYPHENATED = re.compile(r"(?P<word>(?!(?:or|and|to|not|no|if|maybe)-)[^\W\d_]{2,}(?:-[^\W\d_]+)+)")
_SCIENTIFIC = re.compile(r"(?<![a-zA-Z0-9])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]{1,12})(?![\w.])")
_BALANCED_TEXT = re.compile(r"\{([^{}]*)\}")


class MathSyntaxError(ValueError):
    """The text is no expression that the parser knows."""


class NumbersSideBySide(MathSyntaxError):
    """`2 3`: a list without commas; no verifier may read it as a product."""


@dataclass(frozen=True, slots=True)
class Token:
    """`spaced`: white space stood before it (tells `1 2/3` from `12/3`, and a unit from a factor)."""

    kind: Kind
    text: str
    spaced: bool = False


END = Token("end", "")


def tokenize(text: str, *, max_tokens: int = 600) -> list[Token]:
    """Tokens of `text`, closed by END. MathSyntaxError for a character without meaning or too many tokens.

    >>> [token.text for token in tokenize("2x + 1.5 cm")]
    ['2', 'x', '+', '1.5', 'cm', '']
    """
    text = _SCIENTIFIC.sub(r"\1*10^{\2}", text)
    tokens: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise MathSyntaxError(f"unknown character {text[position]!r}")
        position = match.end()
        kind = match.lastgroup
        if kind == "space":
            spaced = True
            continue
        behind = tokens[-1].kind if tokens else ""
        if kind == "word" and (behind == "word" or (behind == "number" and spaced)):
            match = _HYPHENATED.match(text, match.start()) or match  # `40 push-ups`
            position = match.end()
        if kind == "command" and match.group("command") in _TEXT_COMMANDS:
            inner = _BALANCED_TEXT.match(text, _skip_blanks(text, position))
            if inner is None:
                raise MathSyntaxError(f"\\{match.group('command')} without text")
            tokens.extend(_text_tokens(inner.group(1), after=tokens[-1] if tokens else END))
            position = inner.end()
        elif kind == "command":
            tokens.append(_command_token(match.group("command"), spaced))
        elif kind == "word":
            if behind == "number" and match.group() in _MEASURES and not _ARGUMENT.match(text, position):
                tokens.append(Token("word", match.group(), True))
            else:
                tokens.extend(_word_tokens(match.group(), spaced, after=tokens[-1] if tokens else END))
        elif kind == "number":
            tokens.append(Token("number", match.group(), spaced))
        else:
            tokens.append(Token("op", match.group(), spaced))
        spaced = False
        if len(tokens) > max_tokens:
            raise MathSyntaxError(f"more than {max_tokens} tokens")
    return [*tokens, END]


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _command_token(name: str, spaced: bool) -> Token:
    if name in FUNCTIONS and name not in SYNTAX and name != "sqrt":
        return Token("function", name, spaced)
    if name in CONSTANTS:
        return Token("constant", CONSTANTS[name], spaced)
    if name in GREEK:
        return Token("letter", "\\" + name, spaced)
    if name in SYNTAX:
        return Token("command", name, spaced)
    raise MathSyntaxError(f"unknown command \\{name}")


def _text_tokens(content: str, *, after: Token) -> list[Token]:
    """Tokens of the content of a \\text{...}: one number, one letter (a unit in `5\\text{ m}`), a connective, else
    words."""
    stripped = content.strip()
    is_unit = stripped in UNIT_LETTERS or stripped in _MEASURES
    if is_unit and (after.kind == "number" or after.text in ("}", "/", "cdot")):
        return [Token("word", stripped, True)]
    inner = re.sub(r"\A\(([A-Za-z])\)\Z", r"\1", stripped)
    if len(inner) == 1 and inner.isalpha():
        return [Token("letter", inner, True)]
    if re.fullmatch(r"\d+(?:\.\d+)?", stripped):
        return [Token("number", stripped, True)]
    if stripped in FUNCTIONS:
        return [Token("function", stripped)]
    if stripped.lower() in CONSTANTS:
        return [Token("constant", CONSTANTS[stripped.lower()])]
    tokens: list[Token] = []
    for piece in re.findall(r"[^\W\d_]+(?:[.'-](?=[^\W\d_])[^\W\d_]+)*|\d+(?:\.\d+)?|[,;:/^()]", stripped):
        if piece.lower() in ("and", "or"):
            tokens.append(Token("op", piece.lower(), True))
        elif piece[0].isdigit():
            tokens.append(Token("number", piece, True))
        elif piece in ",;:/^()":
            tokens.append(Token("op", piece))
        elif len(piece) == 1 and piece.isupper():
            tokens.append(Token("letter", piece, True))
        else:
            tokens.append(Token("word", piece, True))
    return tokens


def _word_tokens(word: str, spaced: bool, *, after: Token) -> list[Token]:
    """A run of letters outside of \\text: one letter is a variable, known names are functions or constants, two or
    three letters right behind other mathematics are a product of variables, the rest is a word."""
    if len(word) == 1:
        return [Token("letter" if word.isascii() or "\u0370" <= word <= "\u03ff" else "word", word, spaced)]
    lower = word.lower()
    if "-" in word:
        return [Token("word", word, spaced)]
    if lower in ("and", "or"):
        return [Token("op", lower, spaced)]
    if word in CONSTANTS or lower == "pi":
        return [Token("constant", CONSTANTS[lower], spaced)]
    if word in GREEK:
        return [Token("letter", "\\" + word, spaced)]
    if word in FUNCTIONS:
        return [Token("command", "sqrt", spaced)] if word == "sqrt" else [Token("function", word, spaced)]
    if lower in ("union", "cup"):
        return [Token("command", "cup", spaced)]
    if lower in SMALL_WORDS or (lower in UNIT_LIKE and (after.text in (".", "/") or (spaced and after.text == "}"))):
        return [Token("word", word, spaced)]
    is_unit = after.kind == "number" and (spaced or lower in UNIT_LIKE)
    if len(word) <= 3 and word.isascii() and after.kind != "word" and not is_unit:
        return [Token("letter", char, spaced and index == 0) for index, char in enumerate(word)]
    return [Token("word", word, spaced)]


# One-letter units, when they are set upright behind a value.
UNIT_LETTERS = name_set("m s g h l L N J W")
# Short unit names that may stand right behind a number without a blank (`5cm`), where `5ab` is a product.
UNIT_LIKE = name_set(
    "pt em cm mm km kg mg ml mi ft in yd lb oz mph kph hr hrs min sec am pm pct cc rs usd deg rad gm gms ms kw"
)
_MEASURES = FUNCTIONS & UNIT_LIKE  # `30 deg`, `5 min`: units where no argument follows
_ARGUMENT = re.compile(r"\s?(?:[(\\{\d]|[A-Za-z](?![A-Za-z]))")
# Short words of ordinary English that are never a product of variables.
SMALL_WORDS = name_set(
    "is it so the of are to in by at as be we he she has had was not for all you can per its no an on if do but now "
    "our my his her one two six ten get say see way day man men any how new old who did let"
)
