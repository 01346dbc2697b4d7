"""The folder of a run: one run at a time, one recipe for good.

Nothing in it is changed before it is known that this run may write there; the recipe is written last. (Only whether
its rows are still those of the checkpoint is known later, when they are read: `check_same_data`.)
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import IO

from rl.config import Recipe, load_recipe
from rl.config.resuming import Stage, changes_on_resume
from rl.distributed import world_size
from rl.train.checkpoint import CheckpointStore, FoundCheckpoint, load_json

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.yaml"
STATE_FILE = "trainer.json"
LOCK_FILE = ".lock"
_LOCKS: list[IO[str]] = []  # open files; the lock goes with the process


def claim_folder(
    folder: Path, recipe: Recipe, *, stage: Stage, resume: bool, zero_stage: int | None
) -> FoundCheckpoint | None:
    """Make `folder` this run's and write the resolved recipe into it; the checkpoint to go on from, None to start at 0.
    Call on rank 0.

    ValueError: the folder cannot be written; another run holds it; it has checkpoints of an earlier run and `resume` is
    false; or these are of another recipe, number of processes or ZeRO stage. Checkpoints newer than the one found,
    which are damaged, go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be made or written: {error.strerror}") from error
    store = CheckpointStore(folder / CHECKPOINTS)
    if store.steps() and not resume:
        raise ValueError(
            f"{store.folder} holds checkpoints of an earlier run (steps {store.steps()}): add --resume to continue it, "
            "or choose another output_dir or name"
        )
    found = store.latest_valid() if resume else None
    if found is not None:
        for reason in found.skipped:
            print(f"[aha] skipped a damaged checkpoint: {reason}", file=sys.stderr, flush=True)
        _check_same_launch(found.path, zero_stage)
        for change in _changes_since(found, recipe, stage):
            print(f"[aha] resuming with {change}", flush=True)
        store.discard_after(found.step)
    elif resume:
        print(f"[aha] nothing to resume in {store.folder}; starting at step 0", flush=True)
    recipe.dump(folder / RECIPE_FILE)
    return found


def _lock(folder: Path) -> None:
    """Hold the run folder for as long as this process lives. ValueError if another run holds it."""
    handle = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run; choose another output_dir or name, or end it") from None
    _LOCKS.append(handle)


def _changes_since(found: FoundCheckpoint, recipe: Recipe, stage: Stage) -> list[str]:
    saved = load_recipe(found.path / RECIPE_FILE)
    try:
        return changes_on_resume(saved, recipe, stage=stage, steps_done=found.step)
    except ValueError as error:
        raise ValueError(f"{found.path / RECIPE_FILE}: {error}") from error


def check_same_data(found: FoundCheckpoint | None, data: str, *, key: str) -> None:
    """ValueError if the checkpoint is of a run on other rows than those of the recipe's `key`; data: `fingerprint` of
    these. What is found is known on rank 0; other ranks have nothing to check."""
    if found is None:
        return
    saved = load_json(found.path / STATE_FILE).get("data")
    if saved != data:
        raise ValueError(
            f"{key}: its rows are not those that {found.path} was trained on (digest {data}, there {saved}): their "
            "order would be another; put them back to resume, or give another name or output_dir to start another run"
        )


def _check_same_launch(checkpoint: Path, zero_stage: int | None) -> None:
    state = load_json(checkpoint / STATE_FILE)
    for key, now in (("world_size", world_size()), ("zero_stage", zero_stage)):
        if state[key] != now:
            raise ValueError(
                f"{checkpoint} was written with {key} = {state[key]}, this launch has {now}; resume with the same"
            )
