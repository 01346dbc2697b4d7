"""Counts of right answers -> accuracy, pass@k, maj@k, each with a confidence interval.

    pass@k  chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k) for c right among n samples, the
            unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), eq. 1; 1 - (1 - c/n)^k would be too low
    maj@k   chance that the most frequent answer of k samples is right (self-consistency, arXiv 2203.11171): the mean
            over problems of one vote of all its samples, k = n, which is unbiased; a tie counts with the chance that a
            lot falls on the right answer

An accuracy has a Wilson interval (it stays inside [0, 1] and is honest at 0 and 100 %). pass@k and maj@k have a
bootstrap interval over PROBLEMS: samples of one problem are not independent, so more samples a problem must not shrink
it to nothing. Where all problems have one result, resampling them shows no spread; there Wilson's is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from rewards.math_answer import judge_pair

Vote = tuple[str | None, bool]
"""(the answer read from a sample, or None when there was none; whether the sample is right)."""

_MAX_COMPARED_CHARS = 500
# Short enough that no tolerance of the rules for decimals (ten digits) could make two of different value equal.
_PLAIN_NUMBER = re.compile(r"-?(?:\d{1,6}\.\d{1,3}|\d{1,18}(?:/0*[1-9]\d{0,17})?)", re.ASCII)


class Estimate(NamedTuple):
    """A mean over problems with its confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(right: float, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): `right` of `total` independent trials, which may be right in part. (0, 1)
    for no trial.

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
    counts: Sequence[tuple[int, int]], k: int, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """pass@k over problems: `counts[i]` = (right, samples) of problem i, at least k samples each."""
    return _share([pass_at_k(right, samples, k) for right, samples in counts], seed=seed, confidence=confidence)


def majority_vote(votes: Sequence[Vote]) -> float:
    """1 if the most frequent answer is right, 0 if it is wrong; in a tie the share of the right one among those in
    front.

    All right samples gave one answer, however they wrote it. Wrong ones gave the same answer when the exact rules of
    `accuracy` say so. Wrong samples without an answer do not vote.

    >>> majority_vote([("1/2", True), ("0.5", True), ("3", False), ("4", False), (None, False), (None, False)])
    1.0
    >>> majority_vote([("1/2", True), ("3", False), ("3.0", False)])
    0.0
    >>> majority_vote([("7", True), ("8", False)])
    0.5
    """
    right = sum(is_right for _, is_right in votes)
    wrong = [answer for answer, is_right in votes if answer is not None and not is_right]
    if right == 0 or right > len(wrong):  # nothing that comparing the wrong ones could change
        return float(right > 0)
    sizes = _group_sizes(wrong)
    most = max(sizes)
    return 1 / (1 + sizes.count(most)) if most == right else float(right > most)


def _group_sizes(answers: Sequence[str]) -> list[int]:
    """How many times each different answer was given. Numbers are told apart by their value and repeated texts by
    their letters; `judge_pair`, 0.1 to 0.4 ms a pair, sees what is left."""
    sizes: dict[Fraction | str, int] = {}
    for answer in answers:
        key = _key(answer)
        if key not in sizes:
            key = next((known for known in sizes if _same_answer(known, key)), key)
        sizes[key] = sizes.get(key, 0) + 1
    return list(sizes.values())


def _key(answer: str) -> Fraction | str:
    text = " ".join(answer.split())
    return Fraction(text) if _PLAIN_NUMBER.fullmatch(text) else text


def _same_answer(known: Fraction | str, new: Fraction | str) -> bool:
    if isinstance(known, Fraction) and isinstance(new, Fraction):
        return False  # equal ones have one key
    texts = str(known), str(new)
    return max(map(len, texts)) <= _MAX_COMPARED_CHARS and judge_pair(*texts).equal


def majority_accuracy(votes: Sequence[Sequence[Vote]], *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """maj@k over problems: `votes[i]` are the k samples of problem i, which vote together."""
    return _share([majority_vote(found) for found in votes], seed=seed, confidence=confidence)


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
    """Bootstrap mean of results in [0, 1]; Wilson's interval where all are equal, which says nothing of the spread."""
    if len(set(per_problem)) == 1:
        n = len(per_problem)
        return Estimate(per_problem[0], *wilson_interval(per_problem[0] * n, n, confidence=confidence))
    return bootstrap_mean(per_problem, seed=seed, confidence=confidence)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
