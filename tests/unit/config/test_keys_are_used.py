"""No recipe key is ignored silently: each is read somewhere outside of rl/config."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from rl.config import Recipe
from rl.config.loading import _section_in

ROOT = Path(__file__).parents[3]

# Keys that rl/config itself turns into something that is read: run_folder.
READ_IN_CONFIG = {"output_dir"}


@cache
def attributes_read() -> set[str]:
    names: set[str] = set()
    for folder in ("rl", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parts[len(ROOT.parts) :][:2] != ("rl", "config"):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


def keys(section: type[BaseModel], before: str = "") -> list[str]:
    found = []
    for key, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        found += [before + key, *(keys(inner, f"{before}{key}.") if inner else [])]
    return found


@pytest.mark.parametrize("key", keys(Recipe))
def test_key_is_read(key: str) -> None:
    name = key.rsplit(".", 1)[-1]
    assert name in READ_IN_CONFIG or name in attributes_read(), f"nothing outside of rl/config reads {key}"
