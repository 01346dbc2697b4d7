"""Time whole GRPO steps and print where the time goes, one JSON line a step.

    accelerate launch --config_file recipes/accelerate_configs/zero1.yaml scripts/bench_grpo_step.py
        [--config recipes/bench/grpo_step.yaml] [--section.key value ...]

Everything runs as in training: rollout, rewards, advantages, update, optimizer. `rollout_s` holds the sampling,
`reward_s` what had to be waited for after it, `update_s` forward, backward and optimizer (with a single update per
rollout the old logprobs are those of the update's own forward, so there is no pass for them), `rest_s` the remainder of
the step's wall time. The first step, which compiles and captures, is marked `"warm_up": true`.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
from collections.abc import Iterator

DEFAULT = "recipes/bench/grpo_step.yaml"


def noise_prompts(size: int, characters: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`size` prompts of random letters and an answer that nobody will guess."""
    rng = random.Random(seed)
    for _ in range(size):
        yield {"prompt": "".join(rng.choices(string.ascii_letters, k=characters)), "answer": str(rng.randrange(10**9))}


def main() -> None:
    from rl.train.launch import run_command, user_mistakes

    arguments = sys.argv[1:] if "--config" in sys.argv else ["--config", DEFAULT, *sys.argv[1:]]
    recipe, _ = run_command(__doc__ or "", arguments)
    import torch

    from rl.distributed import end_program, gather_objects, is_main_process, world_size
    from rl.train.trainer import GRPOTrainer

    with user_mistakes():
        trainer = GRPOTrainer(recipe)
    on_gpu = torch.cuda.is_available()
    for step in range(recipe.grpo.steps):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        metrics, _ = trainer.step(step)
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.monotonic() - began
        peak = max(gather_objects(torch.cuda.max_memory_allocated() if on_gpu else 0))
        stages = {stage: metrics[f"time/{stage}_s"] for stage in ("rollout", "reward", "update")}
        line = {
            "step": step,
            "warm_up": step == 0,
            "step_s": round(wall, 3),
            **{f"{stage}_s": round(seconds, 3) for stage, seconds in stages.items()},
            "rest_s": round(metrics["time/rest_s"], 3),
            "ranks": world_size(),
            "rollout_frac": round(stages["rollout"] / wall, 3),
            "sampled_tokens": int(metrics["num_tokens"]),
            "capture_s": round(getattr(trainer.engine, "stats", {}).get("capture_s", 0.0), 3),
            "rollout_tokens_per_s": round(metrics["rollout/tokens_per_s"]),
            "mismatch_kl": metrics.get("mismatch_kl"),
            "mismatch_kl_without_replay": metrics.get("mismatch_kl_without_replay"),
            "routing_disagreement_frac": metrics.get("routing/disagreement_frac"),
            "grad_norm": metrics["grad_norm"],
            "peak_memory_gib": round(peak / 2**30, 2) if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }
        if is_main_process():
            print(json.dumps(line), flush=True)
    end_program()


if __name__ == "__main__":
    main()
