"""Whose a run folder is: what is refused, what is left as it was, and what a resumed run is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.config import Recipe, load_recipe
from rl.train import run_folder
from rl.train.checkpoint import CheckpointStore, FoundCheckpoint, save_json
from rl.train.run_folder import check_same_data, claim_folder

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def locks_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own: its locks go with it."""
    monkeypatch.setattr(run_folder, "_LOCKS", [])


def claim(folder: Path, *overrides: str, resume: bool = False, zero_stage: int | None = None) -> FoundCheckpoint | None:
    """Claim the folder in a process that ends at once."""
    try:
        return claim_folder(folder, recipe(*overrides), stage="grpo", resume=resume, zero_stage=zero_stage)
    finally:
        for lock in run_folder._LOCKS:
            lock.close()


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


def save(folder: Path, step: int, *overrides: str) -> None:
    """A checkpoint as a run leaves it, as far as it matters here."""
    with CheckpointStore(folder / "checkpoints").writing(step) as path:
        state = {"step": step, "world_size": 1, "zero_stage": None, "data": "0123456789abcdef"}
        save_json(path / "trainer.json", state)
        recipe(*overrides).dump(path / "recipe.yaml")


def test_a_run_is_not_resumed_on_other_rows(tmp_path: Path) -> None:
    check_same_data(None, "other", key="data.train")  # a new run, or not rank 0
    save(tmp_path, 2)
    found = claim(tmp_path, resume=True)
    check_same_data(found, "0123456789abcdef", key="data.train")
    with pytest.raises(ValueError, match=r"^data\.train: its rows are not those that .*step.* \(digest fe, there 0123"):
        check_same_data(found, "fe", key="data.train")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe(), stage="grpo", resume=False, zero_stage=None)
    with pytest.raises(ValueError, match="in use by another run"):
        claim_folder(tmp_path, recipe("--seed=1"), stage="grpo", resume=False, zero_stage=None)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()


def test_a_folder_that_cannot_be_made_is_a_mistake_in_output_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"output_dir: {folder} cannot be made or written: "):
            claim(folder)


def test_a_new_folder_gets_the_resolved_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claim(tmp_path / "run", resume=True) is None
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe()
    assert "nothing to resume" in capsys.readouterr().out


def test_a_folder_with_checkpoints_is_left_as_it_was(tmp_path: Path) -> None:
    claim(tmp_path)
    save(tmp_path, 20)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run \(steps \[20\]\): add --resume"):
        claim(tmp_path, "--seed=1")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()


def test_another_recipe_cannot_resume(tmp_path: Path) -> None:
    claim(tmp_path)
    save(tmp_path, 20)
    with pytest.raises(ValueError) as caught:
        claim(tmp_path, "--seed=1", "--rollout.num_generations=4", resume=True)
    assert "step-00000020/recipe.yaml: another recipe" in str(caught.value)
    assert "seed: saved 0, given 1" in str(caught.value) and "num_generations: saved 8" in str(caught.value)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()


def test_what_may_change_is_told_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim(tmp_path)
    save(tmp_path, 20)
    found = claim(tmp_path, "--checkpoint.save_steps=5", resume=True)
    assert found is not None and found.step == 20
    assert "resuming with checkpoint.save_steps: 20 -> 5" in capsys.readouterr().out
    assert load_recipe(tmp_path / "recipe.yaml") == recipe("--checkpoint.save_steps=5")


def test_the_recipe_is_compared_with_that_of_the_checkpoint_and_damaged_ones_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 20)
    save(tmp_path, 40, "--seed=1")
    victim = tmp_path / "checkpoints" / "step-00000040" / "trainer.json"
    victim.write_text(victim.read_text().replace("40", "41"))
    found = claim(tmp_path, resume=True)
    assert found is not None and found.step == 20
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [20]


def test_another_launch_cannot_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 20)
    with pytest.raises(ValueError, match="written with zero_stage = None, this launch has 2"):
        claim(tmp_path, resume=True, zero_stage=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="written with world_size = 1, this launch has 4"):
        claim(tmp_path, resume=True)
