"""Cold start: supervised training on (prompt, completion) rows, the loss on completions only.

The same policy, data code, learner and checkpoints as GRPO; only the loss differs: minus the sum of the completion tokens' logprobs,
divided by their number over all ranks and micro-batches of the optimizer step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rl.config import Recipe
from rl.data import ProblemOrder, load_problems, load_sft_rows, refuse_overlap
from rl.data.sft_rows import SFTRow
from rl.distributed import derive_seed, is_main_process, rank, world_size
from rl.policy.model import moe_leaf_classes
from rl.train.batching import MicroBatch, Row, pack_rows
from rl.train.keeping import Keeper, save_final_policy
from rl.train.learner import Learner, Scored
from rl.train.metrics import MetricsLogger, Progress
from rl.train.session import COLD_START, POLICY_FOLDER, make_policy, open_session


def completion_loss(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over completion tokens of -logprob, in nats; and what the mean and the accuracy need."""
    loss = -(scored.logprobs * batch.loss_mask).sum()
    return loss, {"tokens": batch.loss_mask.sum(), "entropy_sum": (scored.entropy * batch.loss_mask).sum()}


def train_cold_start(recipe: Recipe, *, resume: bool = False) -> Path:
    """Run the recipe's `sft` section; returns the folder of the trained policy (hub layout)."""
    if recipe.sft is None:
        raise ValueError("this recipe has no section sft, so there is no cold start to run")
    section = recipe.sft
    session = open_session(recipe, folder=recipe.run_folder / COLD_START)
    rows = load_sft_rows(section, recipe.data.template, session.tokenizer, seed=recipe.seed)
    if recipe.data.eval is not None:
        held_out = load_problems(recipe.data, session.tokenizer, "eval", seed=recipe.seed)
        trained = [row.prompt for row in rows]
        refuse_overlap(trained, held_out, on_overlap=recipe.data.eval_overlap, key="sft.data")
    policy = make_policy(recipe.model, session.tokenizer, seed=recipe.seed, device=session.accelerator.device)
    learner = Learner(
        policy,
        section,
        accelerator=session.accelerator,
        total_steps=section.steps,
        zero3_leaf_classes=moe_leaf_classes(policy),
    )
    keeper = Keeper(session.folder, learner, keep=recipe.checkpoint.save_total_limit)
    start = keeper.restore(resume=resume)
    order = ProblemOrder(len(rows), derive_seed(recipe.seed, "sft"), section.batch_size)
    began = time.monotonic() - keeper.elapsed_s
    with MetricsLogger(session.folder, recipe, stage="sft", resume_step=start) as log:
        progress = Progress("cold start", total=section.steps, initial=start, disable=not is_main_process())
        for step in range(start, section.steps):
            indices = order.indices(step)
            loss_tokens = sum(sum(rows[i].loss_mask) for i in indices)
            mine = [_as_row(n, rows[i]) for n, i in enumerate(indices) if n % world_size() == rank()]
            tick = time.monotonic()
            result = learner.step(
                pack_rows(mine, max_tokens=section.micro_batch_tokens), completion_loss, divisor=loss_tokens, step=step
            )
            keeper.check_finite(result, step=step, on_nonfinite=section.on_nonfinite)
            metrics: dict[str, float] = {
                "loss": result.loss,
                "entropy": result.sums["entropy_sum"] / loss_tokens,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "skipped_updates": float(result.skipped),
                "num_tokens": float(loss_tokens),
                "time/step_s": time.monotonic() - tick,
            }
            if (step + 1) % recipe.logging.logging_steps == 0 or step + 1 == section.steps:
                log.log(step + 1, metrics)
            progress.update(loss=result.loss)
            keeper.save_if_due(step + 1, recipe.checkpoint.save_steps, total=section.steps, elapsed_s=time.monotonic() - began)
        progress.close()
    folder = session.folder / POLICY_FOLDER
    summary: dict[str, Any] = {"train_seconds": time.monotonic() - began, "steps": section.steps, "seed": recipe.seed}
    save_final_policy(learner, folder, session.tokenizer, summary=summary)
    return folder


def _as_row(index: int, row: SFTRow) -> Row:
    """Prompt and completion of an SFT row (its loss mask is zeros, then ones)."""
    border = len(row.loss_mask) - sum(row.loss_mask)
    return Row(index=index, prompt_ids=row.token_ids[:border], completion_ids=row.token_ids[border:])
