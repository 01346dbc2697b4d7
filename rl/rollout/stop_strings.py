"""Stop strings: a completion ends with the token after which its decoded text contains one of them.

Text is looked at only when the host looks, so a row may have run on; it is then cut at the first token that completes
a stop string, which makes the result independent of how often the host looks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

# Tokens before the new ones that are decoded again, beyond one per byte of the longest stop string (a character that
# the vocabulary lacks is several tokens): a decoder may need a few to get into step.
_WINDOW = 16


class StopStrings:
    """strings: non-empty texts; decode_text: token ids -> text."""

    def __init__(self, strings: tuple[str, ...], decode_text: Callable[[list[int]], str]) -> None:
        if any(not string for string in strings):
            raise ValueError("SamplingParams.stop_strings contains an empty string; each must have a character")
        self._strings, self._decode = strings, decode_text
        self._window = max(len(string.encode()) for string in strings) + _WINDOW

    def cut(self, tokens: list[int], seen: int) -> int | None:
        """Length to which `tokens` must be cut, or None. seen: how many of them were looked at before."""
        if not self._contains(tokens[max(0, seen - self._window) :]) or not self._contains(tokens):
            return None
        return bisect_left(range(len(tokens)), True, key=lambda end: self._contains(tokens[: end + 1])) + 1

    def _contains(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        return any(string in text for string in self._strings)
