"""The command line of a training script: which recipe, which overrides, whether to resume. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import sys

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
    try:
        return load_recipe(known.config, overrides), known.resume
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
