"""From a YAML file and the command line to a `Recipe`, or one ValueError that lists everything wrong.

Each complaint names where the value stands (file and line, or the command line), the key's path, the value, and what is
allowed; for an unknown key the nearest valid one. Overrides are applied before anything is checked, so that a recipe
may leave a required key to the command line.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rl.config.recipe import Recipe
from rl.config.section import ContradictionsError
from rl.config.sections import MAPPING, TEXT
from rl.config.yaml_text import KeyPath, read_value, read_yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, replace what `overrides` say, check everything, fill in the defaults.

    overrides: command-line words, `["--rollout.temperature", "0.8", "--seed=3"]`, values in YAML.
    Raises ValueError with all problems, one a line.
    """
    content, lines = read_yaml(path)
    changed = _apply_overrides(content, overrides)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        complaints = _Complaints(str(path), content, lines, changed)
        found = [text for item in error.errors() for text in complaints.about(item)]
    noun = "problem" if len(found) == 1 else "problems"
    raise ValueError(f"{path}: {len(found)} {noun} in this recipe:\n" + "\n".join(f"  {text}" for text in found))


def parse_overrides(words: Sequence[str]) -> dict[KeyPath, Any]:
    """`["--a.b", "1", "--c=[2]"]` -> `{("a", "b"): 1, ("c",): [2]}`. ValueError with all malformed words."""
    values: dict[KeyPath, Any] = {}
    wrong = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word in ("--",) or word.startswith("--="):
            wrong.append(f"{word!r}: expected --section.key value")
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                wrong.append(f"--{name}: has no value; write --{name} VALUE or --{name}=VALUE")
                continue
            text = rest.pop(0)
        key: KeyPath = tuple(name.split("."))
        if key in values:
            wrong.append(f"--{name}: is given twice; keep one")
            continue
        try:
            values[key] = read_value(text)
        except ValueError as error:
            wrong.append(f"--{name} {text}: {error}")
    if wrong:
        raise ValueError("on the command line:\n" + "\n".join(f"  {text}" for text in wrong))
    return values


def _apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> set[KeyPath]:
    """Set each override in `content`, making mappings on the way; the paths that were set."""
    values = parse_overrides(overrides)
    for key, value in values.items():
        place: Any = content
        for depth, part in enumerate(key[:-1]):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                whole, name = ".".join(map(str, key[: depth + 1])), ".".join(map(str, key))
                raise ValueError(f"--{name}: {whole} is {place!r}, which has no keys; set --{whole} as a whole")
        place[key[-1]] = value
    return set(values)


class _Complaints:
    """Turns pydantic's errors into sentences for the person who wrote the recipe."""

    def __init__(self, file: str, content: dict[str, Any], lines: dict[KeyPath, int], changed: set[KeyPath]) -> None:
        self.file, self.content, self.lines, self.changed = file, content, lines, changed

    def about(self, error: Any) -> list[str]:
        """One sentence for each thing that an error of pydantic stands for."""
        path: KeyPath = tuple(part for part in error["loc"] if part not in (TEXT, MAPPING))
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionsError):
            return [self._sentence((*path, *found.key.split(".")), found.reason) for found in cause.found]
        if error["type"] == "extra_forbidden":
            return [self._sentence(path, self._unknown(path))]
        if error["type"] == "missing":
            section = _section_at(path[:-1])
            doc = section.model_fields[str(path[-1])].description if section else None
            return [self._sentence(path, "is missing" + (f": {_one_line(doc)}" if doc else ""))]
        if isinstance(cause, ValueError):
            return [self._sentence(path, str(cause))]
        if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
            section = _section_at(path)
            keys = f" with the keys {', '.join(section.model_fields)}" if section else ""
            text = "text or " if error["loc"][-1] == MAPPING else ""
            return [self._sentence(path, f"must be {text}a mapping{keys}")]
        if error["type"] == "string_type":
            return [self._sentence(path, "must be text" + _quoting(error["input"]))]
        if error["type"] == "string_too_short":
            return [self._sentence(path, "must not be empty")]
        reason = error["msg"].replace("Input should be", "must be")
        return [self._sentence(path, reason.replace("a valid tuple", "a list"))]

    def _sentence(self, path: KeyPath, reason: str) -> str:
        name = _name(path)
        value, present = self._value(path)
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        setting = f"{name} = {shown}" if present and not isinstance(value, dict) else name
        return f"{self._place(path)}: {setting}: {reason}"

    def _value(self, path: KeyPath) -> tuple[Any, bool]:
        """The value at a path and whether there is one; a default that clashes with something else is one too."""
        value: Any = self.content
        try:
            for part in path:
                value = value[part]
        except (KeyError, IndexError, TypeError):
            section = _section_at(path[:-1])
            field = section.model_fields.get(str(path[-1])) if section else None
            if field is None or field.is_required():
                return None, False
            return field.get_default(call_default_factory=True), True
        return value, True

    def _place(self, path: KeyPath) -> str:
        replaced = any(path[: len(key)] == key for key in self.changed)
        made = path not in self.lines and any(key[: len(path)] == path for key in self.changed)
        if replaced or (made and path):
            return "command line"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file

    def _unknown(self, path: KeyPath) -> str:
        section = _section_at(path[:-1])
        valid = list(section.model_fields) if section else []
        key = str(path[-1])
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
        if near:
            hint = f"did you mean {_name((*path[:-1], near[0]))}? "
        else:
            elsewhere = _keys_named_like(key)
            hint = f"did you mean {' or '.join(elsewhere)}? " if elsewhere else ""
        return f"unknown key; {hint}allowed: {', '.join(valid)}"


def _name(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the recipe"


def _quoting(value: Any) -> str:
    """How to write a number as text, where `value` is one."""
    if not isinstance(value, (int, float)):
        return ""
    text = str(value).lower()  # true, not True
    return f"; in a file '{text}' with its quotes, on the command line \"'{text}'\" with both"


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _section_at(path: KeyPath) -> type[BaseModel] | None:
    """The section that a path leads to, None if it leads elsewhere."""
    section: type[BaseModel] | None = Recipe
    for part in path:
        field = section.model_fields.get(str(part)) if section is not None else None
        section = _section_in(field.annotation) if field is not None else None
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside `X`, `X | None` or an annotated union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            section = _section_in(part)
            if section is not None:
                return section
    return None


def _keys_named_like(name: str) -> list[str]:
    """Keys anywhere in a recipe that `name` may stand for: `num_generation`, or `rollout-num_generations`."""
    keys = _all_keys(Recipe)
    spellings = sorted({*keys, *(key.rsplit(".", 1)[-1] for key in keys)})
    near = difflib.get_close_matches(name, spellings, n=1, cutoff=0.8)
    return [key for key in keys if near and f".{key}".endswith(f".{near[0]}")]


def _all_keys(section: type[BaseModel], before: str = "") -> list[str]:
    names = []
    for key, field in section.model_fields.items():
        names.append(before + key)
        inner = _section_in(field.annotation)
        if inner is not None:
            names += _all_keys(inner, f"{before}{key}.")
    return names
