"""Experience -> optimizer steps: mini-batches, old and reference logprobs, and the loss of one micro-batch.

A rollout is used `num_iterations` times, each time in `mini_batches` optimizer steps. Rows are dealt out to
mini-batches across the problems (the first completion of each problem, then the second of each, ...): the same set of
rows on any number of ranks, and equally many of them on each rank. DeepSeek-R1 too splits a rollout without regard to
groups, at random (arXiv 2501.12948); advantages are those of whole groups in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rl.config import GRPOSection
from rl.distributed import sum_over_ranks
from rl.grpo.loss import loss_divisor, policy_loss, summarize_metrics
from rl.grpo.mismatch import logprob_mismatch, routing_disagreement, summarize_mismatch
from rl.train.balance import ExpertLoad
from rl.train.batching import MicroBatch, Row, make_micro_batch, pack_rows
from rl.train.experience import Experience
from rl.train.learner import Learner, Scored, StepResult

PROBE_ROWS = 8


@dataclass(slots=True)
class MiniBatch:
    """One optimizer step: this rank's micro-batches, and the divisor of the loss, which counts all ranks."""

    batches: list[MicroBatch]
    divisor: float


@dataclass(slots=True)
class UpdateResult:
    """steps: one per optimizer step. metrics: over all of them. expert_load: (Lm, E) tokens that each expert got in
    them, over all ranks; None for a policy whose experts cannot be seen."""

    steps: list[StepResult]
    metrics: dict[str, float]
    expert_load: torch.Tensor | None


class GRPOUpdate:
    """The update stage of a step, for one recipe."""

    def __init__(
        self,
        learner: Learner,
        section: GRPOSection,
        *,
        micro_batch_tokens: int,
        temperature: float,
        max_completion_length: int,
    ) -> None:
        self.learner = learner
        self.section = section
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.max_completion_length = max_completion_length

    def run(
        self, experience: Experience, *, step: int, replay_routes: bool, after_each: Callable[[StepResult], None]
    ) -> UpdateResult:
        """All optimizer steps of GRPO step number `step` (0-based). after_each: called after each optimizer step; what
        it raises ends the update there."""
        recorded = experience.rows(mask_truncated=self.section.mask_truncated_completions)
        probe = self._probe_own_routes(recorded) if experience.routes_recorded else {}
        rows = recorded if replay_routes else [replace(row, routes=None) for row in recorded]
        mini_batches = self._split(rows, experience)
        spare = next(batch for mini in mini_batches for batch in mini.batches)
        self._score_before_update(mini_batches)
        load = ExpertLoad(self.learner.policy)
        loss = load.counting(self.loss)
        results, first = [], step * self.section.num_iterations * len(mini_batches)
        for iteration in range(self.section.num_iterations):
            for m, mini in enumerate(mini_batches):
                number = first + iteration * len(mini_batches) + m
                result = self.learner.step(
                    mini.batches,
                    loss,
                    divisor=mini.divisor,
                    step=number,
                    temperature=self.temperature,
                    spare=spare,
                )
                after_each(result)
                results.append(result)
        return UpdateResult(results, {**_summarize(results), **probe}, load.over_ranks(self.learner.device))

    def loss(self, scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The GRPO loss of one micro-batch, as a sum, and its metric sums."""
        section = self.section
        # The first and only update of a rollout is on-policy: the old logprobs are the present ones.
        old = scored.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        sums = policy_loss(
            scored.logprobs,
            old,
            batch.advantages,
            batch.loss_mask,
            loss_type=section.loss_type,
            epsilon=section.epsilon,
            epsilon_high=section.epsilon_high,
            delta=section.delta,
            beta=section.beta,
            ref_logprobs=batch.ref_logprobs,
            unbiased_kl=section.unbiased_kl,
            off_policy_mask_threshold=section.off_policy_mask_threshold,
            sampling_logprobs=batch.sampling_logprobs,
            importance_sampling_cap=section.importance_sampling_cap,
        )
        metrics = dict(sums.metrics)
        metrics["entropy_sum"] = (scored.entropy * batch.loss_mask).sum()
        if batch.sampling_logprobs is not None:
            metrics |= logprob_mismatch(batch.sampling_logprobs, old, batch.loss_mask)
        return sums.loss, metrics

    def _split(self, rows: Sequence[Row], experience: Experience) -> list[MiniBatch]:
        parts = mini_batch_rows(*experience.rewards.shape, parts=self.section.mini_batches)
        masked = self.section.mask_truncated_completions
        minis = []
        for numbers in parts:
            records = [record for record in experience.records if record.index in numbers]
            counted = [r.tokens for r in records if r.reward is not None and not (masked and r.truncated)]
            divisor = loss_divisor(
                self.section.loss_type,
                num_sequences=len(numbers),
                num_tokens=sum(counted),
                max_completion_length=self.max_completion_length,
            )
            mine = [row for row in rows if row.index in numbers]
            minis.append(MiniBatch(self._pack(mine), divisor))
        return minis

    def _pack(self, rows: Sequence[Row]) -> list[MicroBatch]:
        return pack_rows(rows, max_tokens=self.micro_batch_tokens, padded=self.learner.pads_rows)

    def _score_before_update(self, minis: Sequence[MiniBatch]) -> None:
        """Fill in old_logprobs (needed once weights move between uses of a rollout) and ref_logprobs."""
        batches = [batch for mini in minis for batch in mini.batches]
        if self.section.num_iterations * len(minis) > 1:
            for batch, scored in zip(batches, self.learner.score(batches, temperature=self.temperature), strict=True):
                batch.old_logprobs = scored.logprobs.cpu()
        if self.section.beta > 0:
            reference = self.learner.reference_logprobs(batches, temperature=self.temperature)
            for batch, logprobs in zip(batches, reference, strict=True):
                batch.ref_logprobs = logprobs.cpu()

    def _probe_own_routes(self, rows: Sequence[Row]) -> dict[str, float]:
        """How often the router, left to itself, would choose other experts than those recorded in `rows`, and what the
        mismatch is then: measured on the step's first rows, before the update."""
        few = [row for row in rows if row.index < PROBE_ROWS]
        batches = self._pack(few)
        recorded = [batch.routes for batch in batches]
        for batch in batches:
            batch.routes = None
        spare = make_micro_batch([replace(rows[0], routes=None)])
        assert rows[0].routes is not None
        nothing = rows[0].routes[:0]
        sums = logprob_mismatch(torch.zeros(0), torch.zeros(0), torch.zeros(0)) | routing_disagreement(nothing, nothing)
        own = self.learner.score(batches, temperature=self.temperature, spare=spare)
        for batch, routes, scored in zip(batches, recorded, own, strict=True):
            assert batch.sampling_logprobs is not None and routes is not None and scored.routes is not None
            found = logprob_mismatch(batch.sampling_logprobs, scored.logprobs.cpu(), batch.present)
            found |= routing_disagreement(routes, scored.routes.cpu())
            sums = {name: value + found[name] for name, value in sums.items()}
        totals = sum_over_ranks({name: float(value) for name, value in sums.items()}, self.learner.device)
        summary = summarize_mismatch(totals)
        return {
            name if name.startswith("routing/") else f"{name}_without_replay": value for name, value in summary.items()
        }


def mini_batch_rows(problems: int, per_problem: int, *, parts: int) -> list[frozenset[int]]:
    """The row numbers b * G + k of each of `parts` equal mini-batches; rows are dealt out in the order of k, then b.

    Problem b is on rank b % world_size, so a stretch of this order visits the ranks in turn. Example: 4 problems x 2
    completions in 2 parts: rows {0, 2, 4, 6} (every first completion) and {1, 3, 5, 7}."""
    order = [b * per_problem + k for k in range(per_problem) for b in range(problems)]
    size = len(order) // parts
    return [frozenset(order[m * size : (m + 1) * size]) for m in range(parts)]


def _summarize(results: Sequence[StepResult]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for result in results:
        for name, value in result.sums.items():
            totals[name] = totals.get(name, 0.0) + value
    return {
        "loss": sum(r.loss for r in results) / len(results),
        "grad_norm": sum(r.grad_norm for r in results) / len(results),
        "learning_rate": results[-1].learning_rate,
        "skipped_updates": float(sum(r.skipped for r in results)),
        "entropy": totals["entropy_sum"] / (totals["loss_tokens"] or math.nan),
        **summarize_metrics(totals),
        **summarize_mismatch(totals),
    }
