"""Units of measure: which words behind a number name the same unit, which contradict each other.

`units_conflict("feet", "inches")` is True: both are known and they differ. An unknown or missing unit never
contradicts, because the question fixes the unit.
"""

from __future__ import annotations

import re

_GROUPS = """
inch inches in | foot feet ft | yard yards yd yds | mile miles mi | meter meters metre metres m | centimeter centimeters
centimetre centimetres cm | millimeter millimeters mm | kilometer kilometers kilometre kilometres km
second seconds sec secs s | minute minutes min mins | hour hours hr hrs h | day days | week weeks | month months |
year years gram grams gm gms g | kilogram kilograms kg kgs | milligram milligrams mg | pound pounds lb lbs | ounce
ounces oz | ton tons cent cents | dollar dollars usd buck bucks | euro euros
liter liters litre litres l | milliliter milliliters ml | gallon gallons | quart quarts | pint pints | cup cups
am | pm
degree degrees deg | radian radians rad
percent pct percentage
"""
_UNIT = {
    word: index
    for index, group in enumerate(re.split(r"[|\n]", _GROUPS.replace("centimeters\n", "centimeters ")))
    for word in group.split()
}


def known_unit(text: str) -> str:
    """A key of the unit named in `text` (powers and `square` included), '' when there is no known unit."""
    lowered = text.lower().replace("a.m", "am").replace("p.m", "pm")
    for short, long in (("mph", "miles / hour"), ("kph", "km / h"), ("kmh", "km / h"), ("{", ""), ("}", "")):
        lowered = lowered.replace(short, long)
    keys = [str(_UNIT[word]) for word in re.findall(r"[a-z]+", lowered) if word in _UNIT]
    power = "3" if re.search(r"\^3|cubic", lowered) else "2" if re.search(r"\^2|sq", lowered) else ""
    return "/".join(keys) + "^" + power if keys else ""


def units_conflict(left: str, right: str) -> bool:
    """True when both sides name a known unit and they are different.

    >>> units_conflict("square inches", "inches ^2"), units_conflict("feet", "inches"), units_conflict("meals", "")
    (False, True, False)
    """
    first, second = known_unit(left), known_unit(right)
    return bool(first and second and first != second)
