"""Held-out problems -> accuracy (greedy), pass@k and maj@k, with confidence intervals and the answers themselves.

Whether an answer is right is what a reward function says: `eval.metric`, or the first of the recipe's rightness
functions that has a value for it, so that in a mixture each task is judged by its own. Answers that none has a value
for (they do not apply, or failed) count neither as right nor as wrong: `eval/none_frac` is their share, and every other
number is over the rest (of a problem's samples; a problem with fewer than k of them takes no part in pass@k). maj@k is
one vote of all samples of a problem, k = num_samples; it needs answers to compare, so it is left out when no function
extracts any. Without a rightness function only lengths are measured.

Problem i is answered by rank i % world_size. Draws are seeded by the problem alone, not by the step: two evaluations of
a run differ only by the weights (common random numbers), which makes small gains visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewards.base import Score
from rewards.registry import resolve_name
from rewards.reward_entry import RewardEntry
from rewards.scorer import RewardScorer, ScoredBatch, merge_batches
from rl.config import EvalSection
from rl.distributed import derive_seed, gather_objects, rank, world_size
from rl.train.evaluation_stats import Estimate, majority_accuracy, pass_at_k_interval, wilson_interval
from rl.train.experience import TextOf, explanations, sample_and_submit
from rl.types import Completion, Problem, RolloutEngine, RolloutRequest, SamplingParams

# Reward functions that say whether an answer is right, in order of preference, for recipes that do not name one.
RIGHTNESS = ("accuracy", "exact_match", "multiple_choice", "countdown", "code")


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a held-out problem. scores: what each reward function says. right: the function that judged it
    gave 1 or more; None when none gave a value. extracted: the answer it read."""

    problem_id: str
    prompt: str
    text: str
    tokens: int
    truncated: bool
    scores: dict[str, Score]
    right: bool | None
    extracted: str | None


@dataclass(slots=True)
class Evaluation:
    """metrics: `eval/...` by name. greedy, sampled: one list of answers per problem, in problem order."""

    metrics: dict[str, float]
    greedy: list[list[Answer]]
    sampled: list[list[Answer]]

    def table(self) -> list[dict[str, Any]]:
        """One dict an answer, for the samples file: what was asked, answered, scored, and why."""
        kinds = (("greedy", self.greedy), ("sampled", self.sampled))
        return [
            {
                "kind": kind,
                **asdict(answer),
                "scores": {name: score.value for name, score in answer.scores.items()},
                "explanations": explanations(answer.scores),
            }
            for kind, found in kinds
            for answers in found
            for answer in answers
        ]


def rightness_functions(entries: Sequence[RewardEntry], wanted: str | None) -> tuple[str, ...]:
    """Names of the reward functions that decide whether an answer is right, in the order in which they are asked:
    `wanted`, else those of `RIGHTNESS` that the recipe uses, under whatever names.

    ValueError if `wanted` is not the name of one of `entries`."""
    names = [entry.name for entry in entries]
    if wanted is not None and wanted not in names:
        raise ValueError(f"eval.metric = {wanted!r}: not among rewards.reward_funcs; allowed: {', '.join(names)}")
    if wanted is not None:
        return (wanted,)
    return tuple(entry.name for right in RIGHTNESS for entry in entries if entry.path == resolve_name(right))


class Evaluator:
    """Evaluates the policy behind `engine` on `problems`; the same on every rank. rightness: see
    `rightness_functions`."""

    def __init__(
        self,
        section: EvalSection,
        problems: Sequence[Problem],
        *,
        rightness: Sequence[str],
        engine: RolloutEngine,
        scorer: RewardScorer,
        decode: TextOf,
        params: SamplingParams,
        seed: int,
    ) -> None:
        self.section = section
        self.problems = list(problems)
        self.rightness = rightness
        self.engine = engine
        self.scorer = scorer
        self.decode = decode
        self.seed = seed
        length = section.max_completion_length or params.max_completion_length
        self.params = replace(params, max_completion_length=length)

    def run(self) -> Evaluation:
        """Answer every problem. Under ZeRO-3 call inside `learner.gathered()`."""
        section = self.section
        greedy: list[list[Answer]] = []
        sampled: list[list[Answer]] = []
        counted: dict[str, float] = {}
        if section.greedy:
            greedy = self._answers(1, replace(self.params, temperature=0.0), counted)
        if section.num_samples:
            cut = replace(
                self.params,
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                min_p=section.min_p,
            )
            sampled = self._answers(section.num_samples, cut, counted)
        metrics = self._metrics(greedy, sampled) | {f"eval/{name}": amount for name, amount in counted.items()}
        return Evaluation(metrics, greedy, sampled)

    def _answers(self, per_problem: int, params: SamplingParams, counted: dict[str, float]) -> list[list[Answer]]:
        """counted: what reward functions count by themselves (cost of a judge) is added to it."""
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
                answers[-1][1].append(self._answer(group.problem, completion, scored, row))
                row += 1
        parts = gather_objects((answers, scored.counters))
        for _, counters in parts:
            for name, amount in counters.items():
                counted[name] = counted.get(name, 0.0) + amount
        everyone = [pair for part, _ in parts for pair in part]
        return [found for _, found in sorted(everyone, key=lambda pair: pair[0])]

    def _answer(self, problem: Problem, completion: Completion, scored: ScoredBatch, row: int) -> Answer:
        given = [scored.scores[name][row] for name in self.rightness]
        verdict = next((score for score in given if score.value is not None), Score(None))
        return Answer(
            problem_id=problem.id,
            prompt=problem.prompt,
            text=self.decode(completion.token_ids),
            tokens=len(completion.token_ids),
            truncated=completion.truncated,
            scores={name: values[row] for name, values in scored.scores.items()},
            right=None if verdict.value is None else verdict.value >= 1.0,
            extracted=verdict.extracted,
        )

    def _metrics(self, greedy: list[list[Answer]], sampled: list[list[Answer]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.rightness:
            verdicts = [answer.right for found in (*greedy, *sampled) for answer in found]
            metrics["eval/none_frac"] = verdicts.count(None) / len(verdicts)
            metrics |= _greedy_metrics(_judged(greedy))
            metrics |= _sampled_metrics(_judged(sampled), self.section.num_samples, seed=self.seed)
        for prefix, answers in (("eval/greedy", greedy), ("eval/sampled", sampled)):
            if answers:
                metrics |= _lengths(prefix, answers)
        return metrics


def _judged(answers: list[list[Answer]]) -> list[list[Answer]]:
    """What was judged at all: problems without a judged answer are left out."""
    judged = [[answer for answer in found if answer.right is not None] for found in answers]
    return [found for found in judged if found]


def _greedy_metrics(judged: list[list[Answer]]) -> dict[str, float]:
    if not judged:
        return {}
    right = sum(bool(found[0].right) for found in judged)
    low, high = wilson_interval(right, len(judged))
    return {"eval/accuracy": right / len(judged), "eval/accuracy_low": low, "eval/accuracy_high": high}


def _sampled_metrics(judged: list[list[Answer]], num_samples: int, *, seed: int) -> dict[str, float]:
    if not judged:
        return {}
    counts = [(sum(bool(answer.right) for answer in found), len(found)) for found in judged]
    metrics = {"eval/sampled_accuracy": sum(right / samples for right, samples in counts) / len(counts)}
    for k in _powers(num_samples):
        enough = [(right, samples) for right, samples in counts if samples >= k]
        if enough:
            metrics |= _with_interval(f"eval/pass@{k}", pass_at_k_interval(enough, k, seed=seed))
    votes = [[(answer.extracted, bool(answer.right)) for answer in found] for found in judged]
    if any(extracted is not None for found in votes for extracted, _ in found):
        metrics |= _with_interval(f"eval/maj@{num_samples}", majority_accuracy(votes, seed=seed))
    return metrics


def _with_interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


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
