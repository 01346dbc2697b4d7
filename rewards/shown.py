"""Values and exceptions of others in words, for reasons and messages, whatever they are.

`repr` of an int of more than 4,300 digits raises ValueError, and classes of users and models may raise anything.
"""

from __future__ import annotations

from typing import Any


def shown(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut after `limit` characters; why it has none, where it has none.

    >>> shown([1, 2]), shown(10**5000)
    ('[1, 2]', '<no repr: ValueError>')
    """
    try:
        text = repr(value)
    except Exception as error:  # of a class that is not ours
        text = f"<no repr: {type(error).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_error(error: BaseException) -> str:
    """The type and the message of an exception, or the type alone where it has no message that can be read.

    >>> shown_error(KeyError("gone"))
    "KeyError: 'gone'"
    """
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:  # of a class that is not ours
        return f"{type(error).__name__}, without a message: {type(another).__name__}"
