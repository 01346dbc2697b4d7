"""The last resort of `accuracy`: math-verify (sympy), imported only in a worker process that can be killed.

In: reference and answer as text. Out: whether math-verify finds them equal. Its own time limits use signals of the main
thread, so they are switched off; the hard limit of `rewards.pool` takes their place.
"""

from __future__ import annotations

import functools
import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> tuple[object, ...]:
    wrapped = gold if "$" in gold or "\\(" in gold or "\\[" in gold else f"${gold}$"
    return tuple(parse(wrapped, parsing_timeout=None))


def verify_answer(gold: str, answer: str) -> bool:
    """math-verify's verdict, without any limit of its own.

    A bare LaTeX reference is wrapped in dollar signs, without which math-verify reads only its last number.
    """
    golds = list(_parsed_gold(gold))
    answers = parse(answer if "$" in answer else f"${answer}$", parsing_timeout=None)
    return bool(golds and answers and verify(golds, answers, timeout_seconds=None))


if not verify_answer("\\frac{1}{2}", "0.5"):  # math-verify swallows what its parser raises: all answers would be wrong
    raise ImportError("math-verify does not find that \\frac{1}{2} equals 0.5; is a package that it needs missing?")
# sympy loads much at its first integral (0.9 s on a slow machine): now, not in the second that a completion has.
verify_answer("\\frac{x^2}{2}", "\\int_0^x t dt")
