"""The last resort of `accuracy`, math-verify (sympy), as seen from this process: the guard in front of it, and the call
of `rewards.symbolic_worker` in the pool.

In: a text; pairs of texts. Out: whether it may be given to sympy at all; the outcomes. Text that is long, deeply nested
or holds large powers or factorials never reaches sympy; what passes still runs under the hard limits of the pool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rewards.pool import Outcome, shared_pool

FUNCTION = "rewards.symbolic_worker:verify_answer"
TIME_LIMIT_S = 1.0
MAX_CHARS = 300
_PLAIN_PAIR = ("1", "1")
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


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
    """math-verify's verdicts on (reference, answer).

    A pair that loses its worker is tried once more, since the machine may have killed it. One that loses the second
    worker, too, while a plain pair is settled as ever, has killed it by itself: its status is "error". So "broken"
    means that the verifier does not work, whatever the text.
    """
    outcomes = shared_pool().map(FUNCTION, pairs, TIME_LIMIT_S, tries=2)
    if any(outcome.status == "broken" for outcome in outcomes):
        (plain,) = shared_pool().map(FUNCTION, [_PLAIN_PAIR], TIME_LIMIT_S, tries=2)
        if plain.value is True:
            return [replace(one, status="error") if one.status == "broken" else one for one in outcomes]
    return outcomes
