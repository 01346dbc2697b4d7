"""Who may import whom: the table of the README's map of the code, held by reading every import statement."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The parts of the code (longest prefix wins), and which other parts and packages each may import. A part may always
# import itself and the standard library.
ALLOWED: dict[str, set[str]] = {
    "rl": set(),
    "rl.types": {"torch"},
    "rl.distributed": {"torch"},
    "rl.config": {"pydantic", "yaml"},
    "rl.data": {"rl.config", "rl.types", "rl.distributed", "transformers", "tokenizers", "datasets", "pyarrow"},
    "rl.grpo": {"torch"},
    "rl.policy": {"rl.policy.flash", "rl.policy.kernels", "torch"},
    "rl.policy.weights": {"rl.policy", "torch", "safetensors", "huggingface_hub", "transformers"},
    "rl.policy.hf": {"rl.policy", "rl.policy.weights", "torch", "transformers", "huggingface_hub"},
    "rl.policy.flash": {"rl.policy", "torch", "triton"},
    "rl.policy.kernels": {"rl.policy", "torch", "triton"},
    "rl.rollout": {
        "rl.policy", "rl.policy.kernels", "rl.types", "rl.distributed", "torch", "triton", "transformers", "psutil",
    },
    "rl.train": {
        "rl.config", "rl.data", "rl.distributed", "rl.grpo", "rl.policy", "rl.policy.weights", "rl.policy.hf",
        "rl.rollout", "rl.types", "rewards", "torch", "numpy", "transformers", "safetensors", "matplotlib", "tqdm",
    },
    "rewards": {"math_verify", "latex2sympy2_extended", "mpmath", "sympy", "seccomp"},
    "scripts": {
        "rl.config", "rl.data", "rl.distributed", "rl.grpo", "rl.policy", "rl.policy.weights", "rl.policy.hf",
        "rl.rollout", "rl.train", "rl.types", "rewards", "torch", "numpy", "transformers", "matplotlib", "tqdm",
    },
}  # fmt: skip

# Packages that exactly one file may import, whatever its part.
ONLY_IN = {
    "accelerate": {"rl/train/learner.py"},
    "deepspeed": {"rl/train/learner.py"},
    "wandb": {"rl/train/metrics.py"},
    "vllm": {"scripts/bench_rollout.py"},  # a benchmark may measure a competitor
}

FILES = sorted(path for part in ("rl", "rewards", "scripts") for path in (ROOT / part).rglob("*.py"))


def part_of(module: str) -> str:
    """The longest part of the table that a module belongs to, else its top-level package."""
    names = module.split(".")
    for end in range(len(names), 0, -1):
        if ".".join(names[:end]) in ALLOWED:
            return ".".join(names[:end])
    return names[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Every module named by an import statement anywhere in the file, `from package import module` resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = str(node.module)
            children = {f"{base}.{alias.name}" for alias in node.names}
            modules = {child for child in children if is_module(child)}
            found |= modules or {base}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_inside_the_table(path: Path) -> None:
    me = part_of(module_name(path))
    assert me in ALLOWED, f"{path.relative_to(ROOT)} belongs to no part of the table"
    wrong = []
    for module in sorted(imported_modules(path)):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or part_of(module) == me or top in ALLOWED[me]:
            continue
        if top in ONLY_IN:
            if str(path.relative_to(ROOT)) not in ONLY_IN[top]:
                wrong.append(f"{module} (only {', '.join(ONLY_IN[top])} may)")
            continue
        if part_of(module) not in ALLOWED[me]:
            wrong.append(module)
    assert not wrong, f"{path.relative_to(ROOT)} ({me}) must not import {', '.join(wrong)}"


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import os.path\ndef f():\n    from rl.grpo import loss\n    from rl.types import Problem\n"
    )
    assert imported_modules(tmp_path / "x.py") == {"os.path", "rl.grpo.loss", "rl.types"}


def test_parts_are_told_by_the_longest_prefix() -> None:
    assert part_of("rl.policy.weights") == "rl.policy.weights"
    assert part_of("rl.policy.moe") == "rl.policy"
    assert part_of("torch.nn") == "torch"
