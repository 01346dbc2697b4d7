"""The command line of a training script: which recipe, which overrides, whether to resume. Nothing heavy is imported
here."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl.config import Recipe, load_recipe

OUR_CODE = tuple(str(Path(__file__).parents[2] / package) + os.sep for package in ("rl", "rewards", "scripts"))
LAUNCHER_S = 5.0  # within this the launcher has ended the other processes of a machine on which one has failed


def run_command(description: str, arguments: list[str] | None = None) -> tuple[Recipe, bool]:
    """(recipe, resume) from `--config FILE [--resume] [--section.key value ...]`.

    A mistake in the recipe, or a batch that cannot be divided among the processes of this launch, ends the program with
    its text and exit code 2, without a traceback."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="recipe (YAML)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    known, overrides = parser.parse_known_args(arguments)
    with user_mistakes():
        recipe = load_recipe(known.config, overrides)
        recipe.batch_plan(int(os.environ.get("WORLD_SIZE", "1")))
    return recipe, known.resume


@contextmanager
def user_mistakes() -> Iterator[None]:
    """While a run is being set up, a ValueError that our own code raises is about the user's recipe or data: tell it
    and end with exit code 2. Used around set-up only; in the middle of training a traceback is what helps.

    One raised inside a library, or in a function of the user's, is told with its traceback; AHA_TRACEBACK=1 shows it
    for every error. A mistake that all ranks meet is told once a machine: the other processes leave the launcher time
    to end them, and one that it does not end has a reason of its own and tells it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
        if local_rank != "0":
            time.sleep(LAUNCHER_S)
        hint = " (AHA_TRACEBACK=1 shows where this was raised)"
        if os.environ.get("AHA_TRACEBACK", "0") != "0" or not _raised_by_our_code(error):
            traceback.print_exception(error)
            hint = ""
        who = "" if rank == "0" else f" on rank {rank}"
        print(f"\n[aha] cannot start{who}: {error}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _raised_by_our_code(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(OUR_CODE)
