"""Train a policy with GRPO.

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml scripts/grpo.py --config recipes/NAME.yaml
        [--resume] [--section.key value ...]

Any key of the recipe can be set on the command line, for example `--rollout.temperature 0.8`; `python -m rl.config`
prints all of them with their meaning (a JSON schema).
"""

from __future__ import annotations

from rl.train.launch import run_command, user_mistakes


def main() -> None:
    recipe, resume = run_command(__doc__ or "")
    from rl.distributed import end_program
    from rl.train.trainer import GRPOTrainer  # after the recipe is known to be good: this loads torch and friends

    with user_mistakes():
        trainer = GRPOTrainer(recipe, resume=resume)
    trainer.train()
    end_program()


if __name__ == "__main__":
    main()
