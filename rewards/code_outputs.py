"""Whether the output of a program is the expected one: text that it printed, or a value that a function returned.

In: both outputs. Out: True or False. Comparison happens in our process, never beside the program. Printed text: equal
line by line, however many blanks stand between words, at the ends of lines and around the text; a number with a decimal
point may differ by 1e-6 (relative or absolute). Values: equal as in Python, but a list equals a tuple (JSON has no
tuples), and a float may differ by 1e-6.
"""

from __future__ import annotations

import math
from typing import Any

TOLERANCE = 1e-6


def same_output(printed: str, expected: str) -> bool:
    """Whether a program printed what it should have.

    >>> same_output("1 2 \\n3.0000001\\n\\n", "1 2\\n3.0")
    True
    """
    ours, theirs = _lines(printed), _lines(expected)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _same_line(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    ours, theirs = printed.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    if "." not in expected:
        return False
    try:
        ours, theirs = float(printed), float(expected)
    except ValueError:
        return False
    return _close(ours, theirs)


def same_value(returned: Any, expected: Any) -> bool:
    """Whether a function returned what it should have; both are plain data.

    >>> same_value((1, [2.0000001]), [1, [2.0]])
    True
    """
    if isinstance(expected, float) and isinstance(returned, int | float):
        return _close(float(returned), expected) if abs(returned) < 1e300 else returned == expected
    if isinstance(expected, list | tuple):
        if not isinstance(returned, list | tuple):
            return isinstance(expected, list) and hasattr(returned, "__next__") and same_value(list(returned), expected)
        return len(returned) == len(expected) and all(map(same_value, returned, expected))
    if isinstance(expected, dict):
        if not isinstance(returned, dict) or len(returned) != len(expected):
            return False
        # keys of a JSON object are always texts, those of the program's dict need not be
        whole = all(key in returned for key in expected)
        ours = returned if whole else {_key_text(key): item for key, item in returned.items()}
        return all(key in ours and same_value(ours[key], item) for key, item in expected.items())
    return bool(returned == expected)


def _key_text(key: Any) -> Any:
    try:
        return str(key)
    except ValueError:  # an int of more than 4,300 digits
        return key


def _close(ours: float, theirs: float) -> bool:
    return ours == theirs or math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
