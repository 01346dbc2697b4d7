"""The guard in front of the last resort of `accuracy`, math-verify (sympy), which runs only in
`rewards.symbolic_worker`.

In: a text. Out: whether it may be given to sympy at all. Text that is long, deeply nested or holds large powers or
factorials never reaches it; what passes still runs under the hard limits of the pool.
"""

from __future__ import annotations

import re

FUNCTION = "rewards.symbolic_worker:verify_answer"
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
        len(re.sub(r"\D", "", match.group(1) or match.group(2) or "")) <= _MAX_DIGITS_IN_POWER
        for match in _POWER.finditer(text)
    )
