"""Cold start: supervised training on (prompt, completion) rows, the loss on completions only.

The same policy, data code, learner and checkpoints as GRPO; only the loss differs: minus the sum of the completion
tokens' logprobs, divided by their number over all ranks and micro-batches of the optimizer step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rl.config import Recipe
from rl.data import ProblemOrder, fingerprint, load_sft_rows, refuse_overlap
from rl.data.sft_rows import SFTRow
from rl.distributed import derive_seed, is_main_process, rank, world_size
from rl.policy.model import moe_leaf_classes
from rl.train.balance import ExpertLoad, update_router_biases
from rl.train.batching import MicroBatch, Row, pack_rows
from rl.train.keeping import Keeper, check_finite, save_final_policy
from rl.train.learner import Learner, Scored
from rl.train.metrics import MetricsLogger, Progress
from rl.train.run_folder import check_same_data
from rl.train.session import POLICY_FOLDER, load_data, make_policy, make_scorer, open_session


def completion_loss(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over completion tokens of -logprob, in nats; and the sum of entropies."""
    loss = -(scored.logprobs * batch.loss_mask).sum()
    return loss, {"entropy_sum": (scored.entropy * batch.loss_mask).sum()}


class ColdStart:
    """The `sft` section of a recipe, ready to run. Construction checks and loads everything, also what only GRPO will
    need: a mistake there must not come out when the cold start has been paid for (ValueError: the recipe or its
    data)."""

    def __init__(self, recipe: Recipe, *, resume: bool = False) -> None:
        if recipe.sft is None:
            raise ValueError("this recipe has no section sft, so there is no cold start to run")
        self.recipe, self.section = recipe, recipe.sft
        scorer = make_scorer(recipe)
        self.session = open_session(recipe, stage="sft", resume=resume)
        tokenizer = self.session.tokenizer
        self.rows = load_sft_rows(self.section, recipe.data.template, tokenizer, seed=recipe.seed)
        _, held_out = load_data(recipe, tokenizer, scorer)
        scorer.close()
        if held_out is not None:
            trained = [row.prompt for row in self.rows]
            refuse_overlap(trained, held_out, on_overlap=recipe.data.eval_overlap, key="sft.data")
        data = fingerprint(self.rows)
        check_same_data(self.session.found, data, key="sft.data")
        policy = make_policy(recipe.model, tokenizer, seed=recipe.seed, device=self.session.accelerator.device)
        self.learner = Learner(
            policy,
            self.section,
            accelerator=self.session.accelerator,
            total_steps=self.section.steps,
            zero3_leaf_classes=moe_leaf_classes(policy),
        )
        self.order = ProblemOrder(len(self.rows), derive_seed(recipe.seed, "sft"), self.section.batch_size)
        self.keeper = Keeper(self.session.folder, self.learner, keep=recipe.checkpoint.save_total_limit, data=data)
        self.start_step = self.keeper.restore(self.session.found)

    def train(self) -> Path:
        """All steps that are left; returns the folder of the trained policy (hub layout)."""
        recipe, section = self.recipe, self.section
        began = time.monotonic() - self.keeper.elapsed_s
        with MetricsLogger(self.session.folder, recipe, stage="sft", resume_step=self.start_step) as log:
            progress = Progress(
                "cold start", total=section.steps, initial=self.start_step, disable=not is_main_process()
            )
            for done in range(self.start_step + 1, section.steps + 1):
                metrics = self.step(done - 1)
                if done == min(section.logging_steps, section.steps):  # the first that is logged
                    metrics["data/overlong_sft_rows"] = float(self.rows.overlong)
                if done % section.logging_steps == 0 or done == section.steps:
                    log.log(done, metrics)
                progress.update(loss=metrics["loss"])
                elapsed_s = time.monotonic() - began
                self.keeper.save_if_due(done, recipe.checkpoint.save_steps, total=section.steps, elapsed_s=elapsed_s)
            progress.close()
        folder = self.session.folder / POLICY_FOLDER
        summary: dict[str, Any] = {
            "train_seconds": time.monotonic() - began,
            "steps": section.steps,
            "seed": recipe.seed,
            "overlong_sft_rows": self.rows.overlong,
        }
        save_final_policy(self.learner, folder, self.session.tokenizer, summary=summary)
        return folder

    def step(self, step: int) -> dict[str, float]:
        """Optimizer step number `step` (0-based) and its metrics."""
        tick = time.monotonic()
        indices = self.order.indices(step)
        loss_tokens = sum(sum(self.rows[i].loss_mask) for i in indices)
        mine = [_as_row(n, self.rows[i]) for n, i in enumerate(indices) if n % world_size() == rank()]
        batches = pack_rows(mine, max_tokens=self.section.micro_batch_tokens, padded=self.learner.pads_rows)
        load = ExpertLoad(self.learner.policy)
        result = self.learner.step(batches, load.counting(completion_loss), divisor=loss_tokens, step=step)
        check_finite(result, step=step + 1, on_nonfinite=self.section.on_nonfinite)
        rate = self.recipe.model.router_bias_update_rate
        if rate:
            counts = load.over_ranks(self.learner.device)
            assert counts is not None
            update_router_biases(self.learner.policy, counts, rate=rate)
        return {
            "loss": result.loss,
            "entropy": result.sums["entropy_sum"] / loss_tokens,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "skipped_updates": float(result.skipped),
            "num_tokens": float(loss_tokens),
            "time/step_s": time.monotonic() - tick,
        }


def _as_row(index: int, row: SFTRow) -> Row:
    """Prompt and completion of an SFT row (its loss mask is zeros, then ones)."""
    border = len(row.loss_mask) - sum(row.loss_mask)
    return Row(index=index, prompt_ids=row.token_ids[:border], completion_ids=row.token_ids[border:])
