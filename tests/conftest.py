"""Settings that must hold before the first import of any test."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# MKL reads this at its first call. Without it some processors choose another kernel for other row counts, and then
# nothing above can be batch-invariant (rl/rollout/engine.py).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests.integration.conftest` from anywhere

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():
    # Where Triton is installed without a GPU, its kernels run in the interpreter; they read this when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that launch ranks or bombs must not run side by side. pytest-xdist names the group in the test's id; under
    pytest 9.2.0 version 3.8.0 does not (seen), and the groups would be forgotten without a word."""
    if not hasattr(session.config, "workerinput") or not session.config.getoption("loadgroup"):
        return
    grouped = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group")]
    forgotten = [name for name in grouped if "@" not in name]
    if forgotten:
        raise pytest.UsageError(f"pytest-xdist ignores the group of {forgotten[0]} under pytest {pytest.__version__}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter fails with NumPy 2.4 in Triton 3.6 and works in 3.9 (seen); CUDA builds of torch bring the
    version that they were built with."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        old = pytest.mark.skip(reason=f"no GPU, and the interpreter of triton {version} fails with NumPy 2.4")
        for item in items:
            if item.path.parent.name == "kernels" or item.path.name == "test_policy_kernels.py":
                item.add_marker(old)


@pytest.fixture
def nothing_isolates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without bubblewrap whose kernel refuses namespaces."""
    from rewards.sandbox import isolation_method

    monkeypatch.setattr("rewards.sandbox.shutil.which", lambda name: None)
    monkeypatch.setattr("rewards.sandbox.isolation_problem", lambda method: "refused by the kernel")
    isolation_method.cache_clear()
    yield
    isolation_method.cache_clear()
