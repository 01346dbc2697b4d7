"""Names of reward functions: all of them exist, listing them is cheap, and a wrong one is told with the nearest."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.registry import BUILTINS, absolute_name, load_function, resolve_name

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_every_name_leads_to_a_documented_function(name: str) -> None:
    function = load_function(name)
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:2] == ["prompts", "completions"]
    assert any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())


def test_listing_imports_nothing_heavy() -> None:
    script = "import sys, rewards.scorer; print([name for name in ('torch', 'sympy', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_docstrings_are_contracts(name: str) -> None:
    """Each says range and source and has a worked example, which is run unless it needs a sandbox or a server."""
    function = load_function(name)
    text = function.__doc__ or ""
    assert "Range" in text and "Source" in text
    if name in ("code", "judge"):
        assert "   ->  " in text
        return
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(function.__globals__))
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0 and result.failed == 0


def test_unknown_names_are_told_with_the_nearest_and_all_allowed() -> None:
    with pytest.raises(ValueError, match=r"'acuracy'; did you mean 'accuracy'\? Allowed: .*tag_count"):
        resolve_name("acuracy")
    with pytest.raises(ValueError, match=r"no module 'nowhere'"):
        load_function("nowhere.deep:f")
    with pytest.raises(ValueError, match=r"has no 'lod'; did you mean 'load'"):
        load_function("json:lod")
    with pytest.raises(ValueError, match=r"is a str, not a function"):
        load_function("os:sep")
    with pytest.raises(ValueError, match=r"there is no file /.*nothing\.py"):
        load_function("nothing.py:f")


def test_functions_of_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\ndef f(): return A()\n"
    )
    by_folder = load_function("mine.py:f", base_folder=tmp_path)
    assert by_folder().x == 1
    assert load_function(f"{tmp_path}/mine.py:f") is by_folder  # one module, however it is named
    assert absolute_name("mine.py:f", base_folder=tmp_path) == f"{tmp_path}/mine.py:f"
    (tmp_path / "broken.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):  # the user's own traceback
        load_function("broken.py:f", base_folder=tmp_path)
    (tmp_path / "broken.py").write_text("def f(): return 2\n")
    assert load_function("broken.py:f", base_folder=tmp_path)() == 2  # a failed import is not remembered
