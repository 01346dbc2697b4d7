"""The last resort of `accuracy`: math-verify (sympy), run only in a worker that can be killed.

In: reference and answer as text. Out: whether math-verify finds them equal. `worth_trying` is the static guard in front of it:
text that is long, deeply nested or holds large powers or factorials never reaches sympy. math-verify's own time limits use
signals of the main thread, so they are switched off here; the pool's hard limit takes their place.
"""

from __future__ import annotations

import functools
import logging
import re

FUNCTION = "rewards.symbolic:verify_answer"
TIME_LIMIT_S = 1.0
MAX_CHARS = 300
_MAX_DEPTH = 12
_MAX_DIGITS_IN_POWER = 3
_HEAVY = re.compile(
    r"\*\*|!|\\(?:bmod|pmod|mod|lim|prod|zeta|Gamma|det|binom|operatorname|immediate|write|input|def|newcommand)(?![a-zA-Z])"
    r"|__|\bimport\b|\bopen\b|\bexec\b|\beval\b|lambda|RootOf|factorial"
)
_POWER = re.compile(r"\^\s*(?:\{([^{}]*)\}|(\S))")


def worth_trying(text: str) -> bool:
    """False for text that sympy might not survive.

    >>> worth_trying(r"\\int_0^1 x^2 dx"), worth_trying("10^{10^{10}}"), worth_trying("9**9**9")
    (True, False, False)
    """
    if len(text) > MAX_CHARS or _HEAVY.search(text) or text.count("\\int") > 3 or text.count("\\sum") > 2:
        return False
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH or re.search(r"\^\s*\{[^{}]*\^", text):
        return False
    return all(
        len(re.sub(r"\D", "", match.group(1) or match.group(2) or "")) <= _MAX_DIGITS_IN_POWER for match in _POWER.finditer(text)
    )


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> tuple[object, ...]:
    from math_verify import parse

    wrapped = gold if "$" in gold or "\\(" in gold or "\\[" in gold else f"${gold}$"
    return tuple(parse(wrapped, parsing_timeout=None))


def verify_answer(gold: str, answer: str) -> bool:
    """math-verify's verdict. Call it in a worker only: it has no limits of its own.

    A bare LaTeX reference is wrapped in dollar signs, without which math-verify reads only its last number.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    golds = list(_parsed_gold(gold))
    answers = parse(answer if "$" in answer else f"${answer}$", parsing_timeout=None)
    return bool(golds and answers and verify(golds, answers, timeout_seconds=None))
