"""Sampler-trainer mismatch against hand-computed values and against the exact KL of two distributions."""

import math

import pytest
import torch

from rl.grpo.mismatch import logprob_mismatch, routing_disagreement, summarize_mismatch


def test_logprob_mismatch_by_hand_and_masked() -> None:
    sampling = torch.tensor([[-1.0, -2.0, float("nan")]])
    trainer = torch.tensor([[-1.5, -2.0, 0.0]])
    sums = logprob_mismatch(sampling, trainer, torch.tensor([[1, 1, 0]]))
    found = summarize_mismatch({name: value.item() for name, value in sums.items()})
    assert found["mismatch_kl"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2)
    assert found["mismatch_abs"] == pytest.approx(0.25)


def test_mismatch_kl_estimates_the_kl_from_sampler_to_trainer() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.3, 0.4])
    exact = (sampler * (sampler.log() - trainer.log())).sum().item()
    tokens = torch.multinomial(sampler, 200_000, replacement=True, generator=generator)
    sums = logprob_mismatch(sampler.log()[tokens], trainer.log()[tokens], torch.ones(200_000))
    found = summarize_mismatch({name: value.item() for name, value in sums.items()})["mismatch_kl"]
    assert found == pytest.approx(exact, rel=0.02)  # the reversed KL is 6 % higher


def test_routing_disagreement_compares_sets() -> None:
    recorded = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], dtype=torch.uint8)
    live = torch.tensor([[[1, 0], [2, 4]], [[4, 5], [1, 0]]])
    sums = routing_disagreement(recorded, live)
    assert {name: value.item() for name, value in sums.items()} == {
        "routes_differing": 2.0,
        "experts_differing": 3.0,
        "routes_total": 4.0,
        "experts_total": 8.0,
    }
    found = summarize_mismatch({name: value.item() for name, value in sums.items()})
    assert found == {"routing/disagreement_frac": 0.5, "routing/experts_differing_frac": 3 / 8}


def test_nothing_to_compare_is_not_agreement() -> None:
    found = summarize_mismatch({"mismatch_kl_sum": 0.0, "mismatch_abs_sum": 0.0, "mismatch_tokens": 0.0})
    assert found == pytest.approx({"mismatch_kl": math.nan, "mismatch_abs": math.nan}, nan_ok=True)


def test_routes_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one"):
        routing_disagreement(torch.zeros(2, 1, 2), torch.zeros(3, 1, 2))
