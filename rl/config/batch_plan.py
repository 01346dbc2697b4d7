"""Batch arithmetic: from what the recipe says (problems a step, completions a problem) to what each process does.

prompts_per_step x num_generations = rows; rows / world_size = rows of a process; these / mini_batches = the rows of a
process in one optimizer step, packed into micro-batches of at most micro_batch_tokens tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl.config.sections import DataSection, RolloutSection
from rl.config.training import GRPOSection, OptimizerSection, SFTSection


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Numbers of one step. `*_per_rank` are those of one process.

    longest_row_tokens: prompt and completion at their limits. min_rows_per_micro_batch: rows of that length that fit
    into one micro-batch. max_accumulation: micro-batches per optimizer step on a process if every row had that length
    (packing shorter rows needs fewer). sft_rows_per_rank: 0 without a cold start.
    """

    world_size: int
    prompts_per_step: int
    num_generations: int
    rows: int
    prompts_per_rank: int
    rows_per_rank: int
    mini_batches: int
    num_iterations: int
    rows_per_mini_batch: int
    rows_per_rank_per_mini_batch: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    micro_batch_tokens: int
    longest_row_tokens: int
    min_rows_per_micro_batch: int
    max_accumulation: int
    sft_rows_per_rank: int

    def __str__(self) -> str:
        lines = [
            (
                "problems a step",
                f"{self.prompts_per_step}",
                f"{self.prompts_per_rank} on each of {self.world_size} processes",
            ),
            ("completions a problem", f"{self.num_generations}", "one group"),
            ("completions a step", f"{self.rows}", f"{self.rows_per_rank} on each process"),
            (
                "optimizer steps a step",
                f"{self.optimizer_steps_per_step}",
                f"{self.mini_batches} mini-batches x {self.num_iterations} iterations; {self.optimizer_steps} in all",
            ),
            (
                "rows an optimizer step",
                f"{self.rows_per_mini_batch}",
                f"{self.rows_per_rank_per_mini_batch} on each process",
            ),
            (
                "tokens a micro-batch",
                f"{self.micro_batch_tokens}",
                f"at least {self.min_rows_per_micro_batch} rows; a row has at most {self.longest_row_tokens}",
            ),
            ("accumulation", f"<= {self.max_accumulation}", "micro-batches an optimizer step on each process"),
        ]
        if self.sft_rows_per_rank:
            lines.append(
                (
                    "cold-start batch",
                    f"{self.sft_rows_per_rank * self.world_size}",
                    f"{self.sft_rows_per_rank} on each process",
                )
            )
        return "\n".join(f"  {name:<24}{number:>10}  {note}" for name, number, note in lines)


def plan_batch(
    rollout: RolloutSection,
    data: DataSection,
    grpo: GRPOSection,
    optimizer: OptimizerSection,
    sft: SFTSection | None,
    *,
    world_size: int,
) -> BatchPlan:
    """Derive the numbers for `world_size` processes; ValueError names every key that does not divide, and its
    neighbours."""
    if world_size < 1:
        raise ValueError(f"world_size = {world_size}: at least one process is needed")
    problems = []
    if rollout.prompts_per_step % world_size:
        problems.append(_not_divisible("rollout.prompts_per_step", rollout.prompts_per_step, world_size, "processes"))
    rows_per_rank = rollout.prompts_per_step // world_size * rollout.num_generations
    if not problems and rows_per_rank % grpo.mini_batches:
        problems.append(
            f"grpo.mini_batches = {grpo.mini_batches}: must divide the {rows_per_rank} completions of each of "
            f"{world_size} processes without remainder"
        )
    if sft is not None and sft.batch_size % world_size:
        problems.append(_not_divisible("sft.batch_size", sft.batch_size, world_size, "processes"))
    if problems:
        raise ValueError("the batch cannot be divided:\n  " + "\n  ".join(problems))
    rows = rollout.prompts_per_step * rollout.num_generations
    longest = data.max_prompt_length + rollout.max_completion_length
    min_rows = optimizer.micro_batch_tokens // longest
    rows_per_rank_per_mini_batch = rows_per_rank // grpo.mini_batches
    return BatchPlan(
        world_size=world_size,
        prompts_per_step=rollout.prompts_per_step,
        num_generations=rollout.num_generations,
        rows=rows,
        prompts_per_rank=rollout.prompts_per_step // world_size,
        rows_per_rank=rows_per_rank,
        mini_batches=grpo.mini_batches,
        num_iterations=grpo.num_iterations,
        rows_per_mini_batch=rows // grpo.mini_batches,
        rows_per_rank_per_mini_batch=rows_per_rank_per_mini_batch,
        optimizer_steps_per_step=grpo.mini_batches * grpo.num_iterations,
        optimizer_steps=grpo.steps * grpo.mini_batches * grpo.num_iterations,
        micro_batch_tokens=optimizer.micro_batch_tokens,
        longest_row_tokens=longest,
        min_rows_per_micro_batch=min_rows,
        max_accumulation=-(-rows_per_rank_per_mini_batch // min_rows),
        sft_rows_per_rank=0 if sft is None else sft.batch_size // world_size,
    )


def _not_divisible(key: str, value: int, parts: int, what: str) -> str:
    below = value // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    return f"{key} = {value}: must be a multiple of the {parts} {what}; nearest: {near}"
