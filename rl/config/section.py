"""What all sections of a recipe have in common: frozen, strict about types, and contradictions told all together.

A section is a pydantic model; the line under each field is its documentation (shown by errors and the JSON schema).
What one field cannot know alone is checked in `contradictions`, which yields (key, reason) pairs and never stops at the
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator


class Contradiction(NamedTuple):
    """key: path inside the section ("epsilon_high"). reason: what is wrong with its value and what is allowed."""

    key: str
    reason: str


class ContradictionsError(ValueError):
    """All contradictions of one section; carried through pydantic's error, unpacked by rl.config.loading."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("; ".join(f"{key}: {reason}" for key, reason in found))
        self.found = found


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what the fields, each valid alone, get wrong together."""
        yield from ()

    def changed(self, key: str) -> bool:
        """True if the field differs from its default, so that an option without effect is refused, not ignored."""
        return bool(getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True))

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Section:
        found = list(self.contradictions())
        if found:
            raise ContradictionsError(found)
        return self


def _whole(value: Any) -> Any:
    """16 and 16.0 and 1e3 are whole numbers; true and "16" are not."""
    if isinstance(value, (bool, str)):
        raise ValueError("must be a whole number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    """A number, also one that YAML 1.1 leaves as text ("1e-6"); true is not a number."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Natural = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(gt=0)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, Field(min_length=1)]
Flag = StrictBool
