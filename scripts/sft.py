"""Cold start: train a policy on (prompt, completion) rows, the section `sft` of a recipe.

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml scripts/sft.py --config recipes/NAME.yaml
        [--resume] [--section.key value ...]

The policy is left in <run folder>/cold_start/policy, where scripts/grpo.py with the same recipe starts from.
"""

from __future__ import annotations

from rl.train.launch import run_command, user_mistakes


def main() -> None:
    recipe, resume = run_command(__doc__ or "")
    from rl.distributed import end_program
    from rl.train.sft import ColdStart  # after the recipe is known to be good: this loads torch and friends

    with user_mistakes():
        cold_start = ColdStart(recipe, resume=resume)
    cold_start.train()
    end_program()


if __name__ == "__main__":
    main()
