"""How long may a piece of work take, on a machine of any speed, whatever else it does?

Limits in seconds are those of the reference: a core of 2 GHz with nothing else to do. `pace` says how much slower this
machine is now, by the time that a fixed piece of work takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

_REFERENCE_S = 0.03
_TEXT = "<think>So 6 * 7 = 42, and then</think> <answer>42 apples</answer>\n" * 200
_WORDS = re.compile(r"</?(?:think|answer)>|\d+|[a-z]+(?= )", re.IGNORECASE)


def _sample() -> float:
    """Seconds for regular expressions, small objects and arithmetic in plain Python."""
    started = time.perf_counter()
    total = 0
    for _ in range(10):
        found = [(match.group(), match.start()) for match in _WORDS.finditer(_TEXT)]
        total += sum(start % 7 for _, start in found)
    assert total > 0
    return time.perf_counter() - started


def pace() -> float:
    """How many times longer than the reference this machine takes now, at least 1."""
    return max(1.0, _sample() / _REFERENCE_S)


def assert_takes_less(limit: float, work: Callable[[], object]) -> None:
    """`work` takes less than `limit` seconds of the reference, in the best of three attempts. Time in which other
    processes had the core does not count."""
    least = float("inf")
    for _ in range(3):
        before = pace()
        started = time.process_time()
        work()
        seconds = time.process_time() - started
        least = min(least, seconds / max(before, pace()))
        if least < limit:
            return
    raise AssertionError(f"took {least:.2f} s of the reference, which has {limit}")
