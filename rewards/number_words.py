"""English number words: `three`, `forty-two`, `one hundred and five`, `two thousand` to whole numbers below a
million; `half`, `two thirds` to fractions."""

from __future__ import annotations

import re

_SMALL_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: value for value, word in enumerate(_SMALL_NAMES.split())}
_TENS = {word: 10 * value for value, word in enumerate(_TENS_NAMES.split(), start=2)}
_ANY = "|".join([*_SMALL, *_TENS, "hundred", "thousand"])
NUMBER_WORDS = re.compile(
    rf"\\b(?:{_ANY})(?:(?:\\s+and\\s+|[\\s-]+)(?:{_ANY}))*\\b".replace("\\\\", "\\"), re.IGNORECASE
)


def number_from_words(text: str) -> int | None:
    """The number that `text` spells, or None when it is not a spelled number as a whole.

    >>> number_from_words("forty-two"), number_from_words("One hundred and five"), number_from_words("two apples")
    (42, 105, None)
    """
    words = [word for word in re.split(r"[\s-]+", text.strip().lower()) if word != "and"]
    if not words or len(words) > 12:
        return None
    total, current, last = 0, 0, 1000
    for word in words:
        if word == "hundred":
            if not 0 < current < 10:
                return None
            current, last = current * 100, 100
        elif word == "thousand":
            if not current or total:
                return None
            total, current, last = current * 1000, 0, 1000
        elif word in _SMALL or word in _TENS:
            value = _SMALL.get(word, _TENS.get(word, 0))
            step = 10 if word in _TENS else 1
            if current and (step >= last or (value >= 10 and last == 10)):
                return None
            current, last = current + value, step
        else:
            return None
    return total + current


_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth"
_BOTTOM = {part: bottom for bottom, part in enumerate(_PARTS.split(), start=2)}
_BOTTOM |= {"halve": 2, "quarter": 4, "hundredth": 100}
_MAX_CHARS = 200  # twelve words are far shorter
_FRACTION = re.compile(rf"(?:(.+?)[\s-]+)?({'|'.join(_BOTTOM)})s?", re.IGNORECASE)


def fraction_from_words(text: str) -> str | None:
    """The fraction that `text` spells, or None.

    >>> fraction_from_words("two thirds"), fraction_from_words("half"), fraction_from_words("third")
    ('2/3', '1/2', None)
    """
    text = text.strip()
    match = _FRACTION.fullmatch(text) if len(text) <= _MAX_CHARS else None
    if match is None or (match.group(1) is None and match.group(2).lower() != "half"):
        return None
    top = number_from_words("one" if match.group(1) in (None, "a", "an") else match.group(1))
    return None if top is None else f"{top}/{_BOTTOM[match.group(2).lower()]}"
