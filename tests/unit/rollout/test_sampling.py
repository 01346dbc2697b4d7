"""Draws: the noise against a plain SplitMix64, the distribution against its probabilities, truncation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rl.rollout.sampling import Sampler, exponential_noise, row_keys, sampling_logprobs, to_int64
from rl.types import SamplingParams

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_noise_is_splitmix64_of_seed_step_and_token() -> None:
    # The generator's published first output for state 0 is the mix of the golden ratio.
    assert splitmix64(GOLDEN) == 0xE220A8397B1DCDAF
    cases = [(0, 0), (1, 7), (2**63 + 12345, 3), (MASK, 100_000)]
    keys = row_keys(torch.tensor([to_int64(s) for s, _ in cases]), torch.tensor([t for _, t in cases]))
    noise = exponential_noise(keys, 50)
    for row, (seed, step) in enumerate(cases):
        key = splitmix64((splitmix64((seed + GOLDEN) & MASK) + step * GOLDEN) & MASK)
        for token in (0, 1, 49):
            bits = splitmix64((key + (token + 1) * GOLDEN) & MASK) >> 32
            expected = -math.log1p(-(bits + 0.5) / 2**32)
            assert noise[row, token].item() == pytest.approx(expected, rel=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 40,000 draws of 8 tokens; 7 degrees of freedom exceed 30 with probability 1e-4."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 0.0, 1.5])
    count = 40_000
    for temperature in (1.0, 0.5):
        tokens, logprobs = Sampler(temperature)(logits.expand(count, -1), torch.arange(count), torch.full((count,), 5))
        expected = (logits / temperature).softmax(-1)
        torch.testing.assert_close(logprobs, expected.log()[tokens])
        seen = torch.bincount(tokens, minlength=8).float()
        assert ((seen - count * expected) ** 2 / (count * expected)).sum() < 30


def test_steps_seeds_and_tokens_are_independent() -> None:
    seeds, steps = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    noise = exponential_noise(row_keys(seeds.reshape(-1), steps.reshape(-1)), 16)
    assert noise.unique().numel() > 0.998 * noise.numel()  # float32 has 2^24 steps: about 128 pairs meet
    assert noise.mean().item() == pytest.approx(1.0, abs=0.01) and noise.var().item() == pytest.approx(1.0, abs=0.03)
    uniform = (-noise).exp().view(64, 64, 16)
    for shifted in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(1, 2)):
        correlation = torch.corrcoef(torch.stack((uniform.reshape(-1), shifted.reshape(-1))))[0, 1]
        assert abs(correlation.item()) < 0.015  # 4 standard errors of 65,536 pairs


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    seeds, steps = torch.arange(9) * 77, torch.arange(9)
    tokens, logprobs = Sampler()(logits, seeds, steps)
    for row in range(9):
        token, logprob = Sampler()(logits[row : row + 1], seeds[row : row + 1], steps[row : row + 1])
        assert token.item() == tokens[row].item() and logprob.item() == logprobs[row].item()


def test_greedy_reports_the_untempered_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    token, logprob = Sampler(temperature=0.0)(logits, torch.tensor([1]), torch.tensor([0]))
    assert token.item() == 1 and logprob.item() == pytest.approx(math.log(0.75))


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(top_k=2), [0.4, 0.3, 0.0, 0.0]),
        (Sampler(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampler(top_p=0.69), [0.4, 0.3, 0.0, 0.0]),
        (Sampler(top_p=0.05), [0.4, 0.0, 0.0, 0.0]),
        (Sampler(top_p=0.75), [0.4, 0.3, 0.2, 0.0]),
        (Sampler(min_p=0.6), [0.4, 0.3, 0.0, 0.0]),
        (Sampler(top_k=3, top_p=0.8), [0.4, 0.3, 0.2, 0.0]),  # of the three left, 0.44 + 0.33 < 0.8
        (Sampler(top_k=3, top_p=0.7), [0.4, 0.3, 0.0, 0.0]),
        (Sampler(temperature=0.5, min_p=0.3), [0.16, 0.09, 0.0, 0.0]),
    ],
)
def test_truncation_by_hand(sampler: Sampler, kept: list[float]) -> None:
    order = [2, 0, 3, 1]  # the tokens are not sorted by probability
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])[:, order]
    expected = torch.tensor([kept])[:, order] / sum(kept)
    torch.testing.assert_close(sampling_logprobs(probs.log(), sampler).exp(), expected)
    tokens, logprobs = sampler(probs.log().expand(500, -1), torch.arange(500), torch.zeros(500, dtype=torch.int64))
    assert set(tokens.tolist()) == {i for i, p in enumerate(expected[0].tolist()) if p > 0}
    torch.testing.assert_close(logprobs.exp(), expected[0][tokens])


def test_bf16_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = sampling_logprobs(logits, Sampler(temperature=0.9))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (logits.float() / 0.9).log_softmax(-1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, 1e-38, math.inf, math.nan)),
        *(("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.0), ("min_p", -0.1)),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams.{field} = {value}"):
        Sampler.from_params(SamplingParams(4, **{field: value}))  # type: ignore[arg-type]
