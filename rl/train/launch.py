"""The command line of a training script: which recipe, which overrides, whether to resume. Nothing heavy is imported
here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rl.config import Recipe, load_recipe


def run_command(description: str, arguments: list[str] | None = None) -> tuple[Recipe, bool]:
    """(recipe, resume) from `--config FILE [--resume] [--section.key value ...]`.

    A mistake in the recipe ends the program with its text and exit code 2, without a traceback."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="recipe (YAML)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    known, overrides = parser.parse_known_args(arguments)
    with user_mistakes():
        return load_recipe(known.config, overrides), known.resume


@contextmanager
def user_mistakes() -> Iterator[None]:
    """While a run is being set up, a ValueError is about the user's recipe or data: tell it, once, and end with exit
    code 2. Used around set-up only; in the middle of training a traceback is what helps."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n[aha] cannot start: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
