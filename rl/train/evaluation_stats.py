"""Counts of right answers -> accuracy, pass@k, maj@k, each with a confidence interval.

    pass@k  chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k) for c right among n samples, the
            unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), eq. 1; 1 - (1 - c/n)^k would be too low
    maj@k   chance that the most frequent answer of k samples is right (self-consistency, 2203.11171)

An accuracy has a Wilson interval (it stays inside [0, 1] and is honest at 0 and 100 %). pass@k and maj@k have a
bootstrap interval over PROBLEMS: samples of one problem are not independent, so more samples a problem must not shrink
it to nothing. Where all problems agree on 0 or on 1, resampling them shows no spread; there Wilson's is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Vote = tuple[str | None, bool]
"""(the answer read from a sample in a form that can be compared, or None when there was none; whether it is right)."""


class Estimate(NamedTuple):
    """A mean over problems with its confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(right: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): `right` of `total` independent trials. (0, 1) for no trial.

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= right <= total:
        raise ValueError(f"right={right} of total={total}: expected 0 <= right <= total")
    if total == 0:
        return 0.0, 1.0
    z2 = _quantile(confidence) ** 2
    share = right / total
    middle = share + z2 / (2 * total)
    spread = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2)))
    scale = 1 + z2 / total
    # exact at the ends, where rounding would leave 1e-17
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == total else (middle + spread) / scale
    return low, high


def pass_at_k(right: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of pass@k for one problem, from `right` of `num_samples` samples; needs k <= num_samples.

    >>> pass_at_k(1, 4, 2)    # of the 6 pairs, 3 hold the right one
    0.5
    """
    if not 0 <= right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"right={right}, num_samples={num_samples}, k={k}: expected right and k within the samples")
    return 1.0 - math.comb(num_samples - right, k) / math.comb(num_samples, k)


def pass_at_k_interval(
    right: Sequence[int], num_samples: int, k: int, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """pass@k over problems: `right[i]` of `num_samples` samples of problem i are right."""
    return _share([pass_at_k(count, num_samples, k) for count in right], seed=seed, confidence=confidence)


def majority_vote(votes: Sequence[Vote]) -> float:
    """1 if the most frequent answer is right, 0 if it is wrong.

    Samples without an answer do not vote; if none has one, 0. A tie is drawn by lot: the result is the share of right
    ones among the answers in front. The same answer judged differently (a verifier that reads more than the answer)
    counts with the share of its votes judged right.

    >>> majority_vote([("7", True), ("8", False), ("7", True), (None, False)])
    1.0
    >>> majority_vote([("7", True), ("8", False)])
    0.5
    """
    verdicts: dict[str, list[bool]] = {}
    for answer, right in votes:
        if answer is not None:
            verdicts.setdefault(answer, []).append(right)
    if not verdicts:
        return 0.0
    most = max(len(found) for found in verdicts.values())
    leaders = [sum(found) / most for found in verdicts.values() if len(found) == most]
    return sum(leaders) / len(leaders)


def majority_accuracy(
    votes: Sequence[Sequence[Vote]], *, k: int | None = None, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """maj@k over problems, `votes[i]` of problem i. k: votes counted at a time, all if left out.

    With more than k samples, the result of a problem is the mean over its disjoint blocks of k (a remainder stays
    unused): unbiased, since samples are independent, and the same at every call.
    """
    results = []
    for found in votes:
        size = len(found) if k is None else k
        if not 1 <= size <= len(found):
            raise ValueError(f"k={k} votes of a problem with {len(found)} samples: expected 1 <= k <= samples")
        blocks = [majority_vote(found[i : i + size]) for i in range(0, len(found) - size + 1, size)]
        results.append(sum(blocks) / len(blocks))
    return _share(results, seed=seed, confidence=confidence)


def bootstrap_mean(
    per_problem: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Mean over problems with the percentile bootstrap interval (Efron 1979); same seed, same interval.

    If all problems have the same value there is no spread to resample, and the interval is the point itself.
    """
    if not per_problem:
        raise ValueError("no problems: an estimate needs at least one")
    values = np.asarray(per_problem, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    # one row at a time: resamples x problems indices at once would be gigabytes for large sets
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def _share(per_problem: Sequence[float], *, seed: int, confidence: float) -> Estimate:
    """Bootstrap mean of results in [0, 1]; Wilson's interval where all are 0 or all are 1, which says nothing of the
    spread."""
    estimate = bootstrap_mean(per_problem, seed=seed, confidence=confidence)
    if estimate.value in (0.0, 1.0):
        n = len(per_problem)
        return Estimate(estimate.value, *wilson_interval(int(estimate.value) * n, n, confidence=confidence))
    return estimate


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
