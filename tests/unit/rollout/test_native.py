"""decode.c against torch at awkward sizes: widths that are no multiple of a vector, three heads, one row, one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rl.policy.config import PolicyConfig
from rl.policy.moe import Router, experts_reference
from rl.rollout import ops
from rl.rollout.native import library
from rl.rollout.sampling import Sampler

native = library.load()
pytestmark = pytest.mark.skipif(native is None, reason="no C compiler that takes decode.c")


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (5, 64), (4, 130)])
def test_rms_norm(rows: int, width: int) -> None:
    x, weight = random(rows, width), random(width)
    torch.testing.assert_close(native.rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))
    assert native.rms_norm(torch.zeros(1, width), weight, 1e-6).eq(0).all()


def test_silu_mul_over_the_whole_range() -> None:
    gate = torch.cat((torch.linspace(-120, 120, 4001), random(101)))
    up = random(gate.shape[0])
    result = native.silu_mul(torch.cat((gate, up))[None])[0]
    torch.testing.assert_close(result, F.silu(gate) * up, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(4, 32, 32), (3, 6, 4), (1, 16, 16), (5, 16, 16), (8, 64, 16), (2, 33, 6)]
)
@pytest.mark.parametrize("turned", [True, False])
def test_attend(heads: int, rank: int, rope: int, turned: bool) -> None:
    rows, width = 7, rank + rope
    prompt_slot, prompt_lens = torch.tensor([2, 0, 2, 1, 2, 0, 1]), torch.tensor([1, 33, 9])
    own_len = torch.tensor([1, 2, 3, 4, 5, 40, 17])
    q, own, prompt = random(rows, heads, width), random(9, 40, width), random(3, 64, width)
    turns = torch.polar(torch.ones(rows, rope // 2), random(rows, rope // 2))
    result = native.attend(
        q, turns if turned else None, own, own_len, prompt, prompt_slot, prompt_lens[prompt_slot], rank=rank, scale=0.3
    )
    if turned:
        ops.rotate(q[..., rank:], turns)
    for r in range(rows):
        keys = torch.cat((prompt[prompt_slot[r], : prompt_lens[prompt_slot[r]]], own[r, : own_len[r]]))
        expected = F.softmax(q[r].double() @ keys.t().double() * 0.3, dim=-1) @ keys[:, :rank].double()
        torch.testing.assert_close(result[r].double(), expected, rtol=0, atol=1e-5)  # measured: 3e-6


def test_attend_survives_scores_of_a_thousand() -> None:
    q, keys = torch.full((1, 4, 32), 30.0), torch.ones(1, 20, 32)
    keys[0, 7] = 2.0
    one, slot = torch.tensor([1]), torch.tensor([0])
    result = native.attend(q, None, keys, torch.tensor([20]), keys, slot, one, rank=16, scale=1.0)
    torch.testing.assert_close(result, torch.full((1, 4, 16), 2.0))


@pytest.mark.parametrize("compressed", [True, False])
def test_split_joined_writes_the_cache(compressed: bool) -> None:
    rows, query, rank, rope = 5, 11, 6, 4
    joined, own = random(rows, query + rank + rope), random(rows, 9, rank + rope)
    before, positions = own.clone(), torch.tensor([0, 8, 3, 3, 1])
    turns = torch.polar(torch.ones(rows, rope // 2), random(rows, rope // 2))
    weight, latent_weight = random(query), random(rank)
    result = native.split_joined(
        joined, (weight, 1e-6) if compressed else None, (latent_weight, 1e-6), turns, own, positions
    )
    plain = joined[:, :query]
    torch.testing.assert_close(result, F.rms_norm(plain, (query,), weight, 1e-6) if compressed else plain.contiguous())
    for r in range(rows):
        ops.write_latent(
            joined[r : r + 1, query:].clone(), latent_weight, 1e-6, turns[r : r + 1], before,
            torch.tensor([r]), positions[r : r + 1],
        )  # fmt: skip
    torch.testing.assert_close(own, before)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("spread", ["random", "one expert"])
def test_experts(rows: int, spread: str) -> None:
    gate_up, down, x = random(6, 16, 12), random(6, 12, 8), random(rows, 12)
    weights = torch.rand(rows, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    if spread == "one expert":
        experts = torch.tensor([5, 0]).repeat(rows, 1)
    gathered, offsets, place, fewest = native.gather_by_expert(x, experts, 6, spare=ops.MIN_MATMUL_ROWS)
    counts = torch.bincount(experts.view(-1), minlength=6)
    assert offsets.tolist() == counts.cumsum(0).tolist() and fewest == counts[counts > 0].min()
    assert torch.equal(gathered[place.long()], x[:, None].expand(-1, 2, -1))
    hidden = native.silu_mul(ops.rows_by_expert(gathered, gate_up, offsets, choices=2 * rows, fewest=fewest))
    parts = ops.rows_by_expert(hidden, down, offsets, choices=2 * rows, fewest=fewest)
    result = native.add_experts(x.clone(), parts, place, weights)
    torch.testing.assert_close(result, x + experts_reference(x, experts, weights, gate_up, down), rtol=1e-5, atol=1e-5)


needs_panels = pytest.mark.skipif(native is None or not native._panel_width, reason="no AVX-512")


@needs_panels
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 100])
def test_dense_mlp_in_panels(rows: int) -> None:
    gate_up, down, x, residual = random(128, 20), random(64, 64), random(rows, 20), random(rows, 64)
    wide = F.pad(x, (0, 44))  # 64 inputs and outputs
    panels = native.panels(F.pad(gate_up, (0, 44))), native.panels(down)
    expected = residual + ops.silu_mul(F.linear(x, gate_up)) @ down.t()
    native.dense_mlp(residual, wide, *panels)
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


@needs_panels
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("spread", ["random", "one expert"])
def test_experts_in_panels(rows: int, spread: str) -> None:
    gate_up, down, x, residual = random(6, 64, 64), random(6, 64, 32), random(rows, 64), random(rows, 64)
    weights = torch.rand(rows, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    if spread == "one expert":
        experts = torch.tensor([5, 0]).repeat(rows, 1)
    expected = residual + experts_reference(x, experts, weights, gate_up, down)
    native.experts(residual, x, experts, weights, native.panels(gate_up), native.panels(down))
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-3)  # sums of thousands


@needs_panels
def test_panels_are_whole_or_none() -> None:
    width = native._panel_width
    matrix = torch.arange(2.0 * width * 3).view(2 * width, 3)
    packed = native.panels(matrix)
    assert packed.shape == (2, 3, width) and packed[1, 2, 5] == matrix[width + 5, 2]
    assert native.panels(matrix[:-1]) is None and native.panels(None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        {"model_type": "deepseek_v2", "topk_method": "greedy"},
        {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ],
)
def test_route_is_the_router(changes: dict[str, Any]) -> None:
    values = {
        "vocab_size": 9, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "intermediate_size": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    router = Router(PolicyConfig.from_dict({**values, **changes}))
    with torch.no_grad():
        router.weight.copy_(random(8, 24))
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(0.3 * random(8))
        x = random(50, 24)
        expected, expected_weights = router(x)
        found, weights = native.route(x, router)
    order, expected_order = found.argsort(-1), expected.argsort(-1)
    assert torch.equal(found.gather(1, order), expected.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocab", [1, 5, 48, 3001])
def test_draw_is_the_sampler(vocab: int, temperature: float) -> None:
    logits = 4 * random(64, vocab)
    logits[0, 1:] = float("-inf")
    seeds, steps = torch.arange(64) * 7919 - 2**62, torch.arange(64) % 9
    sampler = Sampler(temperature)
    tokens, logprobs = sampler(logits, seeds, steps)
    found, found_logprobs = native.draw(logits, seeds, steps, temperature)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logprobs, logprobs, rtol=1e-5, atol=2e-6)


def test_draw_follows_the_distribution() -> None:
    rows = 200_000
    logits = torch.tensor([0.3, -2.0, 1.5, -9.0, float("-inf")])
    found, _ = native.draw(logits.repeat(rows, 1), torch.arange(rows), torch.zeros(rows, dtype=torch.int64), 1.0)
    share = torch.bincount(found, minlength=5) / rows
    assert (share - logits.softmax(-1)).abs().max() < 4e-3  # more than three standard deviations


def test_greedy_tells_logits_apart_that_differ_in_their_last_bit() -> None:
    logits = torch.tensor([[1.0, 1.0000001, 0.5]])
    zero = torch.zeros(1, dtype=torch.int64)
    assert native.draw(logits, zero, zero, 0.0)[0].item() == 1


def test_without_a_compiler_there_is_none_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert library.load.__wrapped__() is None
    assert [(r.levelname, r.message[:13]) for r in caplog.records] == [("WARNING", "no C compiler")]


def test_a_source_that_does_not_compile_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "decode.c"
    broken.write_text("not C")
    monkeypatch.setattr(library, "_SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.load.__wrapped__() is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "with -fopenmp: " in caplog.text and "with -fopenmp-simd: " in caplog.text and "error" in caplog.text
