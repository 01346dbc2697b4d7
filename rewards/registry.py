"""From the name of a reward function to the function itself.

In: a registry name (`accuracy`), `package.module:function`, or `path/to/file.py:function`. Out: the callable. The names
are those of TRL and open-r1 where the meaning is the same. Listing them imports nothing; only the module asked for is
imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

BUILTINS = MappingProxyType(
    {
        "accuracy": "rewards.math_answer:accuracy_reward",
        "code": "rewards.code:code_reward",
        "code_format": "rewards.code:code_format_reward",
        "cosine": "rewards.length:cosine_reward",
        "countdown": "rewards.countdown:countdown_reward",
        "exact_match": "rewards.exact_match:exact_match_reward",
        "format": "rewards.tag_format:format_reward",
        "format_prefilled": "rewards.tag_format:format_prefilled_reward",
        "json_schema": "rewards.structured:json_schema_reward",
        "judge": "rewards.judge:judge_reward",
        "language_consistency": "rewards.language:language_consistency_reward",
        "majority": "rewards.majority:majority_reward",
        "multiple_choice": "rewards.multiple_choice:multiple_choice_reward",
        "reasoning_steps": "rewards.reasoning_steps:reasoning_steps_reward",
        "regex": "rewards.structured:regex_reward",
        "repetition_penalty": "rewards.repetition:repetition_penalty_reward",
        "soft_overlong_punishment": "rewards.length:soft_overlong_punishment_reward",
        "tag_count": "rewards.tag_format:tag_count_reward",
    }
)


def resolve_name(name: str) -> str:
    """`name` itself when it already says `module:function`, else what the registry has for it.

    Raises ValueError with the nearest name and all that are allowed.
    """
    if ":" in name:
        return name
    if name in BUILTINS:
        return BUILTINS[name]
    nearest = difflib.get_close_matches(name, BUILTINS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"unknown reward function {name!r}{hint} Allowed: {', '.join(sorted(BUILTINS))}, "
        "or your own as package.module:function or path/to/file.py:function"
    )


def load_function(name: str, *, base_folder: Path | None = None) -> Callable[..., Any]:
    """The function that `name` names. A relative file path starts at `base_folder` (default: the working directory).

    Raises ValueError when the module, the file or the function in it does not exist; what the module itself raises
    while it is imported comes through unchanged, so that the user sees the own traceback.
    """
    where, _, attribute = resolve_name(name).rpartition(":")
    module = _load_file(where, name, base_folder) if where.endswith(".py") else _load_module(where, name)
    function = getattr(module, attribute, None)
    if function is None:
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        nearest = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"reward function {name!r}: {where} has no {attribute!r}{hint}")
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"reward function {name!r}: {attribute!r} in {where} is a {kind}, not a function")
    return function


def absolute_name(name: str, *, base_folder: Path | None = None) -> str:
    """`name` resolved, with a file path made absolute, so that another process in another folder finds the same
    function."""
    where, _, attribute = resolve_name(name).rpartition(":")
    if where.endswith(".py"):
        where = str(_file_path(where, base_folder))
    return f"{where}:{attribute}"


def _load_module(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # Only the absence of the named module is a wrong name; a module that misses its own dependency speaks for
        # itself.
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise ValueError(f"reward function {name!r}: there is no module {error.name!r}") from error
        raise


def _load_file(where: str, name: str, base_folder: Path | None) -> ModuleType:
    path = _file_path(where, base_folder)
    if not path.is_file():
        raise ValueError(f"reward function {name!r}: there is no file {path}")
    module_name = f"_reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _file_path(where: str, base_folder: Path | None) -> Path:
    return ((base_folder or Path.cwd()) / Path(where).expanduser()).resolve()
