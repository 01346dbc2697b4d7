"""What README.md tells a new user to type and to write is there and is accepted."""

from __future__ import annotations

import re
from pathlib import Path

from rl.config import load_recipe

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REST = """
name: try
model: {from_config: {hidden_size: 64}, tokenizer: {type: bytes}, dtype: float32}
grpo: {steps: 2}
"""


def test_the_recipe_that_it_shows_is_accepted(tmp_path: Path) -> None:
    sections = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(REST + "".join(sections))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train.extract == {"answer": r"####\s*(.+)"} and len(recipe.rewards.reward_funcs) == 3


def test_the_files_that_it_names_are_there() -> None:
    named = set(re.findall(r"\b(?:scripts|recipes|rl|tests)/[\w./]*[\w/]|\brewards/\w+\.\w+", TEXT))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_commands_of_the_environment_come_after_its_activation() -> None:
    assert 0 < TEXT.index("source .venv/bin/activate") < TEXT.index("accelerate launch")
