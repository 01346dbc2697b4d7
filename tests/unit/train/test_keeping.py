"""The final policy: whole or not at all, and never less than there was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl.config import load_recipe
from rl.data import load_tokenizer
from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.policy.weights import load_policy
from rl.train.keeping import save_final_policy
from tests.integration.test_update_invariance import DEEPSEEK

TOKENIZER = load_tokenizer(load_recipe(Path(__file__).parents[3] / "recipes" / "quickstart.yaml").model)


class FakeLearner:
    """Holds a policy and nothing else."""

    def __init__(self, seed: int) -> None:
        self.policy = init_policy(PolicyConfig.from_dict(DEEPSEEK), seed=seed)

    @contextmanager
    def gathered(self) -> Iterator[Policy]:
        yield self.policy


def save(seed: int, folder: Path, **options: Any) -> None:
    save_final_policy(FakeLearner(seed), folder, TOKENIZER, **options)  # type: ignore[arg-type]


def saved_seed(folder: Path) -> int:
    """Which of two policies lies in the folder."""
    found = load_policy(folder).lm_head.weight
    return next(seed for seed in (1, 2) if FakeLearner(seed).policy.lm_head.weight.equal(found))


def test_a_policy_replaces_the_one_before(tmp_path: Path) -> None:
    save(1, tmp_path / "policy", summary={"steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}
    save(2, tmp_path / "policy")
    assert saved_seed(tmp_path / "policy") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "summary.json"]


def test_a_crash_while_it_is_replaced_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1, tmp_path / "policy")
    rename = os.rename

    def crashing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "policy":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crashing)
        with pytest.raises(KeyboardInterrupt):
            save(2, tmp_path / "policy")
    assert saved_seed(tmp_path / "policy.replaced") == 1
    save(2, tmp_path / "policy")
    assert saved_seed(tmp_path / "policy") == 2 and not (tmp_path / "policy.replaced").exists()
