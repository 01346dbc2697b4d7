"""YAML in and out by the rules of YAML 1.2's core schema, with the line of every key.

PyYAML follows YAML 1.1, where `1e-6` is a string, `no` is false and `1:30` is 90; here `1e-6` is a number, only true
and false are booleans, and the rest is text. A key that occurs twice is refused: one of the two would be ignored
silently.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+.0123456789",
    ),
}


class _Reader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Writer(yaml.SafeDumper):
    """SafeDumper that quotes exactly what `_Reader` would take for something else than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts out twice: a recipe with anchors nobody wrote is hard to read."""
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The mapping in a YAML file, and the line (from 1) of every key and list entry in it.

    ValueError naming file and line: no such file, no YAML, a key twice, a key that is no text, an anchor inside itself,
    no mapping at the top.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        lines: dict[KeyPath, int] = {}
        _walk(node, (), lines, str(path))
        content = {} if node is None else reader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else f"{path}"
        raise ValueError(f"{where}: is not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep, or an anchor (&name) stands inside itself") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; a recipe is a mapping of sections (key: value)")
    return content, lines


def read_value(text: str) -> Any:
    """One value as YAML, as it stands on the command line: `0.8`, `true`, `[1, 2]`, `{type: bytes}`, plain text.

    ValueError if it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Reader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ValueError(f"is not valid YAML ({reason}); quote it") from error


def to_yaml(content: dict[str, Any]) -> str:
    """`content` as YAML in the order of its keys; read_yaml gives it back unchanged."""
    return yaml.dump(content, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def _walk(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int], file: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, i)] = item.start_mark.line + 1
            _walk(item, (*path, i), lines, file)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"{file}:{line}: a key must be text; put a number, true, false or null in quotes")
        if key.value in seen:
            name = ".".join(map(str, (*path, key.value)))
            raise ValueError(f"{file}:{line}: {name} is given twice, first in line {seen[key.value]}; keep one")
        seen[key.value] = line
        lines[(*path, key.value)] = line
        _walk(value, (*path, key.value), lines, file)
