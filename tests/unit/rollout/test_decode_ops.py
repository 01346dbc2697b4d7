"""The pieces of a decode step against slow, obvious forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rl.policy.config import PolicyConfig
from rl.policy.model import init_policy
from rl.policy.moe import experts_reference
from rl.rollout import ops
from rl.rollout.arena import torch_zeros
from rl.rollout.cache import CacheShape, LatentCache
from rl.rollout.prefill import Prefill
from rl.rollout.scheduler import Group
from rl.rollout.state import PlanBuilder, RowSpec, RowState
from rl.rollout.stop_strings import StopStrings
from rl.types import Problem, RolloutRequest

ZEROS = torch_zeros(torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize("spread", ["random", "one expert", "first and last"])
@pytest.mark.parametrize(("width", "inner"), [(12, 8), (10, 7)])  # 10 and 7 floats are no multiple of 16 bytes
def test_experts_equal_the_reference(tokens: int, spread: str, width: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    gate_up = torch.randn(6, 2 * inner, width, generator=generator)
    down = torch.randn(6, width, inner, generator=generator)
    x, weights = torch.randn(tokens, width, generator=generator), torch.rand(tokens, 2, generator=generator)
    experts = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
    if spread == "one expert":
        experts = torch.tensor([4, 3]).repeat(tokens, 1)
    elif spread == "first and last":
        experts = torch.tensor([0, 5]).repeat(tokens, 1)
    expected = experts_reference(x, experts, weights, gate_up, down)
    torch.testing.assert_close(ops.experts_by_rows(x, experts, weights, gate_up, down), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.experts_grouped(x, experts, weights, gate_up, down), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
def test_rotation_in_place(dtype: torch.dtype, offset: int) -> None:
    """offset 1: a slice that complex views cannot take."""
    whole = torch.randn(5, 3, 7 + offset, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = whole[..., offset : offset + 6]
    angles = torch.rand(5, 3)
    expected = torch.empty(5, 3, 6)
    for pair in range(3):
        a, b = x[..., 2 * pair].float(), x[..., 2 * pair + 1].float()
        cos, sin = angles[:, None, pair].cos(), angles[:, None, pair].sin()
        expected[..., 2 * pair], expected[..., 2 * pair + 1] = a * cos - b * sin, b * cos + a * sin
    untouched = whole[..., offset + 6 :].clone()
    ops.rotate(x, torch.polar(torch.ones(5, 3), angles))
    torch.testing.assert_close(x, expected.to(dtype))
    assert torch.equal(whole[..., offset + 6 :], untouched)


def test_rotation_of_one_row_behind_a_latent_of_odd_rank() -> None:
    """The slice is contiguous, but complex views cannot take where it begins."""
    row = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
    turns = torch.polar(torch.ones(1, 3), torch.rand(1, 3))
    expected = row[:, 5:].clone()
    ops.rotate(expected, turns)
    ops.rotate(row[:, 5:], turns)
    assert torch.equal(row[:, 5:], expected)


# Rows of one group side by side, of groups mixed and uneven, prompt slots in any order, a single row.
ARRANGEMENTS = {
    "regular": ([0, 0, 1, 1, 2, 2], [3, 40, 5]),
    "mixed": ([2, 0, 2, 1, 2, 0, 2], [1, 33, 9]),
    "gap": ([2, 2, 0, 0], [7, 1, 2]),
    "one": ([1], [1, 64, 1]),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_attention_is_one_softmax_over_prompt_and_own(arrangement: str) -> None:
    prompt_slots, prompt_lens = ARRANGEMENTS[arrangement]
    rows, heads, rank, width = len(prompt_slots), 3, 6, 10
    generator = torch.Generator().manual_seed(0)
    cache = LatentCache(
        CacheShape(8, 3, 50, 64), layers=1, width=width, dtype=torch.float32, zeros=ZEROS
    )
    state = RowState(
        8, limit=50, stop_token_ids=(), routes_shape=None, routes_dtype=torch.uint8, zeros=ZEROS
    )
    cache.own.normal_(generator=generator)
    cache.prompt.normal_(generator=generator)
    state.start([RowSpec(r, slot, prompt_lens[slot], r, 50) for r, slot in enumerate(prompt_slots)])
    own_lens = [(5 * r) % 41 + 1 for r in range(rows)]
    state.own_len[:rows] = torch.tensor(own_lens) - 1
    plans = PlanBuilder(state, cache)
    plans.regroup(prompt_slots, [prompt_lens[slot] for slot in prompt_slots])
    plan = plans.plan(max(own_lens))
    assert plan.regular == (arrangement == "regular")
    q = torch.randn(rows, heads, width, generator=generator)
    result = ops.attention(q, cache.own[0], cache.prompt[0], plan, 0.3, rank)
    assert result.shape == (rows, heads, rank)
    for r in range(rows):
        seen = torch.cat(
            (cache.prompt[0, prompt_slots[r], : prompt_lens[prompt_slots[r]]], cache.own[0, r, : own_lens[r]])
        )
        expected = F.softmax(q[r] @ seen.t() * 0.3, dim=-1) @ seen[:, :rank]
        torch.testing.assert_close(result[r], expected, rtol=1e-5, atol=1e-6)


def test_rows_that_have_ended_stand_still() -> None:
    state = RowState(
        3, limit=4, stop_token_ids=(9,), routes_shape=None, routes_dtype=torch.uint8, zeros=ZEROS
    )
    state.start([RowSpec(r, 0, 1, 0, 4) for r in range(3)])
    drawn = [[5, 9, 1], [9, 7, 2], [8, 7, 3], [8, 7, 4], [8, 7, 5], [8, 7, 6]]
    for tokens in drawn:
        state.record(torch.arange(3), torch.tensor(tokens), torch.tensor(tokens).float())
    assert state.done.tolist() == [True] * 3
    lengths = (state.own_len + 1).tolist()
    assert lengths == [2, 1, 4]
    assert [row.tokens for row in state.read([0, 1, 2], lengths)] == [[5, 9], [9], [1, 2, 3, 4]]


@pytest.mark.parametrize("routes_shape", [None, (3, 2)])
def test_a_rows_bytes_are_those_of_its_tensors(routes_shape: tuple[int, int] | None) -> None:
    def held(slots: int) -> int:
        state = RowState(
            slots, limit=11, stop_token_ids=(), routes_shape=routes_shape, routes_dtype=torch.int16,
            zeros=ZEROS,
        )  # fmt: skip
        tensors = [
            t for name, t in vars(state).items() if isinstance(t, torch.Tensor) and name not in ("rows", "stops")
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert held(5) - held(4) == RowState.row_bytes(11, routes_shape, torch.int16)


def test_prompts_are_packed_into_chunks_of_bounded_size() -> None:
    """Shortest first; a prompt that is longer than a chunk goes alone."""
    config = PolicyConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=4, qk_rope_head_dim=2,
        qk_nope_head_dim=2, v_head_dim=2, intermediate_size=8,
    )  # fmt: skip
    policy, packed = init_policy(config, seed=0), []
    lengths = [9, 3, 4, 2, 3, 12]
    groups = [Group(i, RolloutRequest(Problem("", "", (1,) * n), (0,)), prompt_slot=i) for i, n in enumerate(lengths)]
    cache = LatentCache(CacheShape(1, 6, 1, 16), layers=1, width=6, dtype=torch.float32, zeros=ZEROS)
    policy.register_forward_hook(lambda module, inputs, output: packed.append(inputs[1].diff().tolist()))
    prefill = Prefill(policy, cache, column_order=None, chunk_tokens=8, routes_dtype=torch.uint8)
    with torch.no_grad():
        prefill.run(groups)
    assert packed == [[2, 3, 3], [4], [9], [12]]


def test_stop_strings_end_at_the_first_token_that_completes_one() -> None:
    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    stops = StopStrings(("</answer>", "é"), decode)
    text = list(b"abc </answer> tail")
    assert stops.cut(text, 0) == len("abc </answer>")
    assert stops.cut(text, len("abc </answe")) == len("abc </answer>")
    assert stops.cut(text[:11], 0) is None
    assert stops.cut(list("xyéz".encode()), 0) == 4  # two bytes: complete with the second
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("",), decode)


def test_stop_strings_of_characters_that_take_several_tokens_each() -> None:
    """Looked at after every token, with a text before it that is longer than what is decoded again."""
    string = "到此为止，谢谢你的提问。"
    tokens = list(("-" * 100 + string).encode())
    stops = StopStrings((string,), lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    cuts = [stops.cut(tokens[: seen + 1], seen) for seen in range(len(tokens))]
    assert cuts == [None] * (len(tokens) - 1) + [len(tokens)]
