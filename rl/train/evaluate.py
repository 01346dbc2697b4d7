"""Held-out problems -> accuracy (greedy), pass@k and maj@k, with confidence intervals and the answers themselves.

Problem i is answered by rank i % world_size. Draws are seeded by the problem alone, not by the step: two evaluations of
a run differ only by the weights (common random numbers), which makes small gains visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewards.scorer import RewardScorer, merge_batches
from rl.config import EvalSection
from rl.distributed import derive_seed, gather_objects, rank, world_size
from rl.train.evaluation_stats import majority_accuracy, pass_at_k_interval, wilson_interval
from rl.train.experience import TextOf, sample_and_submit
from rl.types import Problem, RolloutEngine, RolloutRequest, SamplingParams

# Reward functions that say whether an answer is right, in order of preference, for recipes that do not name one.
RIGHTNESS = ("accuracy", "exact_match", "multiple_choice", "countdown", "code")


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a held-out problem. right: the metric function gave 1 or more. extracted: the answer it
    read."""

    problem_id: str
    prompt: str
    text: str
    tokens: int
    truncated: bool
    scores: dict[str, float | None]
    right: bool
    extracted: str | None


@dataclass(slots=True)
class Evaluation:
    """metrics: `eval/...` by name. greedy, sampled: one list of answers per problem, in problem order."""

    metrics: dict[str, float]
    greedy: list[list[Answer]]
    sampled: list[list[Answer]]

    def table(self) -> list[dict[str, Any]]:
        """One dict an answer, for the samples file."""
        kinds = (("greedy", self.greedy), ("sampled", self.sampled))
        return [{"kind": kind, **asdict(a)} for kind, found in kinds for answers in found for a in answers]


def rightness_function(names: Sequence[str], wanted: str | None) -> str:
    """Which of the recipe's reward functions decides whether an answer is right. ValueError if `wanted` is none of
    them."""
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"eval.metric = {wanted!r}: not among rewards.reward_funcs; allowed: {', '.join(names)}")
        return wanted
    return next((name for name in RIGHTNESS if name in names), names[-1])


class Evaluator:
    """Evaluates the policy behind `engine` on `problems`; the same on every rank."""

    def __init__(
        self,
        section: EvalSection,
        problems: Sequence[Problem],
        *,
        engine: RolloutEngine,
        scorer: RewardScorer,
        decode: TextOf,
        params: SamplingParams,
        seed: int,
    ) -> None:
        self.section = section
        self.problems = list(problems)
        self.engine = engine
        self.scorer = scorer
        self.decode = decode
        self.seed = seed
        length = section.max_completion_length or params.max_completion_length
        self.params = replace(params, max_completion_length=length)
        self.metric = rightness_function(scorer.names, section.metric)

    def run(self) -> Evaluation:
        """Answer every problem. Under ZeRO-3 call inside `learner.gathered()`."""
        section = self.section
        greedy: list[list[Answer]] = []
        sampled: list[list[Answer]] = []
        if section.greedy:
            greedy = self._answers(1, replace(self.params, temperature=0.0))
        if section.num_samples:
            cut = replace(self.params, temperature=section.temperature, top_p=section.top_p, top_k=section.top_k)
            sampled = self._answers(section.num_samples, cut)
        return Evaluation(self._metrics(greedy, sampled), greedy, sampled)

    def _answers(self, per_problem: int, params: SamplingParams) -> list[list[Answer]]:
        mine = list(range(rank(), len(self.problems), world_size()))
        requests = [
            RolloutRequest(
                self.problems[i],
                tuple(derive_seed(self.seed, "eval", self.problems[i].id, k) for k in range(per_problem)),
            )
            for i in mine
        ]
        groups, pending = sample_and_submit(
            requests, engine=self.engine, params=params, scorer=self.scorer, decode=self.decode
        )
        scored = merge_batches([future.result() for future in pending])
        answers: list[tuple[int, list[Answer]]] = []
        row = 0
        for i, group in zip(mine, groups, strict=True):
            answers.append((i, []))
            for completion in group.completions:
                verdict = scored.scores[self.metric][row]
                answers[-1][1].append(
                    Answer(
                        problem_id=group.problem.id,
                        prompt=group.problem.prompt,
                        text=self.decode(completion.token_ids),
                        tokens=len(completion.token_ids),
                        truncated=completion.truncated,
                        scores={name: values[row] for name, values in scored.by_function.items()},
                        right=verdict.value is not None and verdict.value >= 1.0,
                        extracted=verdict.extracted,
                    )
                )
                row += 1
        everyone = [pair for part in gather_objects(answers) for pair in part]
        return [found for _, found in sorted(everyone, key=lambda pair: pair[0])]

    def _metrics(self, greedy: list[list[Answer]], sampled: list[list[Answer]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if greedy:
            right = sum(found[0].right for found in greedy)
            low, high = wilson_interval(right, len(greedy))
            metrics |= {"eval/accuracy": right / len(greedy), "eval/accuracy_low": low, "eval/accuracy_high": high}
            metrics |= _lengths("eval/greedy", greedy)
        if sampled:
            counts = [sum(a.right for a in found) for found in sampled]
            n = self.section.num_samples
            metrics["eval/sampled_accuracy"] = sum(counts) / (n * len(counts))
            for k in _powers(n):
                value, low, high = pass_at_k_interval(counts, n, k, seed=self.seed)
                metrics |= {f"eval/pass@{k}": value, f"eval/pass@{k}_low": low, f"eval/pass@{k}_high": high}
            votes = [[(a.extracted, a.right) for a in found] for found in sampled]
            value, low, high = majority_accuracy(votes, seed=self.seed)
            metrics |= {f"eval/maj@{n}": value, f"eval/maj@{n}_low": low, f"eval/maj@{n}_high": high}
            metrics |= _lengths("eval/sampled", sampled)
        return metrics


def _lengths(prefix: str, answers: list[list[Answer]]) -> dict[str, float]:
    flat = [a for found in answers for a in found]
    return {
        f"{prefix}_mean_length": sum(a.tokens for a in flat) / len(flat),
        f"{prefix}_truncated_frac": sum(a.truncated for a in flat) / len(flat),
    }


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    ks = [1]
    while ks[-1] * 2 < n:
        ks.append(ks[-1] * 2)
    return ks if n == 1 else [*ks, n]
