"""One step's experience: problems -> completions -> rewards -> advantages, over all ranks.

Problem number b of the step (0 .. B-1) belongs to rank b % world_size; row b * G + k is its k-th completion. Rewards
are scored group by group in the background while the engine goes on sampling. What crosses ranks is small: one
`RowRecord` a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rewards.base import Score
from rewards.scorer import RewardScorer, ScoredBatch, merge_batches
from rl.distributed import derive_seed, gather_objects, rank, world_size
from rl.grpo.advantages import ScaleRewards, group_advantages
from rl.train.batching import Row
from rl.types import Completion, Problem, RolloutEngine, RolloutGroup, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class RowRecord:
    """What every rank knows of every row: its number b * G + k, its problem, text (for the log), length, reward and
    what each reward function says."""

    index: int
    problem_id: str
    prompt: str
    text: str
    tokens: int
    truncated: bool
    reward: float | None
    scores: dict[str, Score]


@dataclass(slots=True)
class Experience:
    """groups: this rank's, in the order of their positions b. positions: these b. records: of all ranks, by row number.
    scored: of all ranks, by row number. rewards, advantages: (B, G) float32 over all ranks; a masked reward is NaN with
    advantage 0."""

    groups: list[RolloutGroup]
    positions: list[int]
    records: list[RowRecord]
    scored: ScoredBatch
    rewards: torch.Tensor
    advantages: torch.Tensor

    @property
    def routes_recorded(self) -> bool:
        """Whether the engine told which experts each token went through; the same on every rank."""
        return all(group.prompt_routes is not None for group in self.groups)

    def table(self) -> list[dict[str, Any]]:
        """One dict a row, for the log: what was asked, answered, scored, and why."""
        return [
            {
                "index": record.index,
                "problem_id": record.problem_id,
                "prompt": record.prompt,
                "completion": record.text,
                "tokens": record.tokens,
                "truncated": record.truncated,
                "reward": record.reward,
                "advantage": float(advantage),
                **{f"rewards/{name}": score.value for name, score in record.scores.items()},
                "explanations": explanations(record.scores),
            }
            for record, advantage in zip(self.records, self.advantages.flatten(), strict=True)
        ]

    def sample_text(self, step: int) -> str:
        """The best and the worst completion of the first group, to look at."""
        group = self.records[: self.rewards.shape[1]]
        scored = [record for record in group if record.reward is not None] or group
        best, worst = (pick(scored, key=lambda record: record.reward or 0.0) for pick in (max, min))
        lines = [f"--- step {step}: {best.prompt.strip()[-300:]}"]
        for record in (best,) if best is worst else (best, worst):
            scores = ", ".join(f"{name} {score.value}" for name, score in record.scores.items())
            lines.append(f"    [{scores}; {record.tokens} tokens] {record.text.strip()[:600]}")
        return "\n".join(lines)

    def rows(self, *, mask_truncated: bool) -> list[Row]:
        """This rank's rows for training, with their routes if they were recorded. mask_truncated: completions that were
        cut off get no loss."""
        per_group = self.rewards.shape[1]
        return [
            Row(
                index=b * per_group + k,
                prompt_ids=group.problem.prompt_ids,
                completion_ids=completion.token_ids,
                advantage=float(self.advantages[b, k]),
                sampling_logprobs=completion.logprobs,
                routes=_row_routes(group, completion),
                trained=not (mask_truncated and completion.truncated) and not bool(self.rewards[b, k].isnan()),
            )
            for b, group in zip(self.positions, self.groups, strict=True)
            for k, completion in enumerate(group.completions)
        ]


def collect(
    problems: Sequence[Problem],
    *,
    engine: RolloutEngine,
    params: SamplingParams,
    num_generations: int,
    seed: int,
    step: int,
    scorer: RewardScorer,
    decode: TextOf,
    scale_rewards: ScaleRewards,
    clock: Callable[[str], AbstractContextManager[None]],
) -> Experience:
    """Sample and score all `problems` of the step (the same list on every rank; each rank does its own).

    clock: times the stages "rollout" (sampling, with the scoring that overlaps it) and "reward" (what had to be waited
    for) of this rank; waiting for the other ranks belongs to neither."""
    positions = list(range(rank(), len(problems), world_size()))
    requests = [
        RolloutRequest(
            problems[b],
            tuple(derive_seed(seed, "rollout", step, problems[b].id, k) for k in range(num_generations)),
        )
        for b in positions
    ]
    with clock("rollout"):
        groups, pending = sample_and_submit(requests, engine=engine, params=params, scorer=scorer, decode=decode)
    with clock("reward"):
        scored = merge_batches([future.result() for future in pending])
    records, scored = _share(groups, positions, scored, decode)
    rewards = torch.tensor([float("nan") if r.reward is None else r.reward for r in records]).view(-1, num_generations)
    return Experience(groups, positions, records, scored, rewards, group_advantages(rewards, scale=scale_rewards))


def explanations(scores: Mapping[str, Score]) -> dict[str, dict[str, str | None]]:
    """Why each reward function decided as it did, for the log: the answer as `extracted`, the reference as understood
    (`gold`), the `rule` that decided and its `reason`. Functions that say nothing beside their number are left out."""
    told = {name: score.explanation for name, score in scores.items()}
    return {name: explanation for name, explanation in told.items() if any(explanation.values())}


class TextOf:
    """Token ids -> the text that rewards read: a final one of `end_tokens` is taken off, everything else is shown as it
    is (also a </answer> that ended the completion)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int]) -> None:
        self.tokenizer, self.end_tokens = tokenizer, frozenset(end_tokens)

    def __call__(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        if ids and ids[-1] in self.end_tokens:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def sample_and_submit(
    requests: Sequence[RolloutRequest],
    *,
    engine: RolloutEngine,
    params: SamplingParams,
    scorer: RewardScorer,
    decode: TextOf,
) -> tuple[list[RolloutGroup], list[Future[ScoredBatch]]]:
    """This rank's groups and their scores to come, in the order of the requests. A group is scored as soon as it is
    complete."""
    pending: dict[int, Future[ScoredBatch]] = {}

    def score_group(index: int, group: RolloutGroup) -> None:
        size = len(group.completions)
        pending[index] = scorer.submit(
            prompts=[group.problem.prompt] * size,
            completions=[decode(completion.token_ids) for completion in group.completions],
            completion_ids=[completion.token_ids for completion in group.completions],
            columns={name: [value] * size for name, value in group.problem.columns.items()},
            group_ids=[index] * size,
        )

    groups = engine.generate(requests, params, on_group=score_group)
    return groups, [pending[i] for i in range(len(requests))]


def _share(
    groups: list[RolloutGroup], positions: list[int], scored: ScoredBatch, decode: TextOf
) -> tuple[list[RowRecord], ScoredBatch]:
    """Everybody's records and scores in row order. A rank's local rows are in the order of its positions."""
    records = []
    row = 0
    for b, group in zip(positions, groups, strict=True):
        for k, completion in enumerate(group.completions):
            records.append(_record(b * len(group.completions) + k, group.problem, completion, scored, row, decode))
            row += 1
    parts = gather_objects((records, scored))
    everyone = [record for part, _ in parts for record in part]
    order = sorted(range(len(everyone)), key=lambda i: everyone[i].index)
    return [everyone[i] for i in order], _reordered(merge_batches([batch for _, batch in parts]), order)


def _reordered(batch: ScoredBatch, order: Sequence[int]) -> ScoredBatch:
    def pick(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [values[i] for i in order] for name, values in table.items()}

    return replace(
        batch,
        rewards=[batch.rewards[i] for i in order],
        by_function=pick(batch.by_function),
        scores=pick(batch.scores),
        statuses=pick(batch.statuses),
        latencies=pick(batch.latencies),
    )


def _record(
    index: int, problem: Problem, completion: Completion, scored: ScoredBatch, row: int, decode: TextOf
) -> RowRecord:
    return RowRecord(
        index=index,
        problem_id=problem.id,
        prompt=problem.prompt,
        text=decode(completion.token_ids),
        tokens=len(completion.token_ids),
        truncated=completion.truncated,
        reward=scored.rewards[row],
        scores={name: values[row] for name, values in scored.scores.items()},
    )


def _row_routes(group: RolloutGroup, completion: Completion) -> torch.Tensor | None:
    if group.prompt_routes is None or completion.routes is None:
        return None
    return torch.cat([group.prompt_routes, completion.routes])
