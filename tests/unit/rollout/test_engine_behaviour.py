"""What the engine promises besides equal numbers: limits, stops, order, budgets, and leaving everything as it was."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout.engine import Engine
from rl.types import Problem, RolloutGroup, RolloutRequest, SamplingParams

CONFIG = PolicyConfig(
    vocab_size=26, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, q_lora_rank=16,
    qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, intermediate_size=48, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, initializer_range=0.2,
)  # fmt: skip


def letters(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


def request(name: str, length: int, group: int) -> RolloutRequest:
    ids = tuple((7 * i + len(name)) % 26 for i in range(length))
    return RolloutRequest(Problem(name, letters(list(ids)), ids), tuple(range(group)))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return init_policy(CONFIG, seed=3)


def test_one_token_limit_needs_no_decode_step(policy: Policy) -> None:
    engine = Engine(policy, cache_bytes=2**22)
    (group,) = engine.generate([request("a", 5, 3)], SamplingParams(1))
    assert engine.stats["steps"] == 0 and engine.stats["tokens"] == 3
    for completion in group.completions:
        assert len(completion.token_ids) == 1 and completion.finish_reason == "length" and completion.truncated
        assert completion.logprobs.shape == (1,)
        assert completion.routes is not None and completion.routes.shape == (0, 1, 2)
    assert group.prompt_routes is not None and group.prompt_routes.shape == (5, 1, 2)
    assert group.prompt_routes.dtype == torch.uint8


def test_zero_token_limit_gives_empty_completions(policy: Policy) -> None:
    (group,) = Engine(policy, cache_bytes=2**22).generate([request("a", 5, 2)], SamplingParams(0))
    for completion in group.completions:
        assert completion.token_ids == [] and completion.logprobs.shape == (0,) and completion.truncated


def test_the_stop_token_is_kept_and_nothing_follows_it(policy: Policy) -> None:
    requests = [request("a", 4, 8), request("bb", 9, 8)]
    free = Engine(policy, cache_bytes=2**22).generate(requests, SamplingParams(40))
    for stops, behind in product(((4,), (4, 17), tuple(range(26))), (False, True)):
        engine = Engine(policy, cache_bytes=2**22, steps_per_look=3, look_behind=behind)
        stopped = engine.generate(requests, SamplingParams(40, stops))
        for one, other in zip(free, stopped, strict=True):
            for long, short in zip(one.completions, other.completions, strict=True):
                ends = [t for t, token in enumerate(long.token_ids) if token in stops]
                expected = long.token_ids[: ends[0] + 1] if ends else long.token_ids
                assert short.token_ids == expected
                assert short.finish_reason == ("stop" if ends else "length")
                assert len(short.logprobs) == len(expected)
                assert short.routes is not None and len(short.routes) == len(expected) - 1


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("steps_per_look", [1, 4, 100])
def test_stop_strings_cut_at_the_token_that_completes_them(policy: Policy, steps_per_look: int, behind: bool) -> None:
    requests = [request("a", 4, 8), request("bb", 9, 8)]
    free = Engine(policy, cache_bytes=2**22).generate(requests, SamplingParams(40))
    text = letters(free[0].completions[0].token_ids)
    strings = (text[10:13], "z")
    engine = Engine(policy, cache_bytes=2**22, decode_text=letters, steps_per_look=steps_per_look, look_behind=behind)
    stopped = engine.generate(requests, SamplingParams(40, stop_strings=strings))
    cut = 0
    for one, other in zip(free, stopped, strict=True):
        for long, short in zip(one.completions, other.completions, strict=True):
            whole = letters(long.token_ids)
            ends = [whole.index(s) + len(s) for s in strings if s in whole]
            assert letters(short.token_ids) == (whole[: min(ends)] if ends else whole)
            assert short.finish_reason == ("stop" if ends else "length")
            assert len(short.logprobs) == len(short.token_ids)
            cut += bool(ends)
    assert cut >= 2


def test_stop_strings_need_a_decoder(policy: Policy) -> None:
    with pytest.raises(ValueError, match="decode_text"):
        Engine(policy, cache_bytes=2**22).generate([request("a", 4, 1)], SamplingParams(4, stop_strings=("x",)))


def test_groups_come_in_order_and_each_is_reported_once_when_complete(policy: Policy) -> None:
    requests = [request("n" * i, 3 + 4 * i, 1 + i % 3) for i in range(7)]
    seen: list[tuple[int, RolloutGroup]] = []
    engine = Engine(policy, cache_bytes=2**22, max_batch_size=4)
    groups = engine.generate(requests, SamplingParams(16, (1, 2, 3)), on_group=lambda i, g: seen.append((i, g)))
    assert [group.problem for group in groups] == [r.problem for r in requests]
    assert [len(group.completions) for group in groups] == [len(r.seeds) for r in requests]
    assert sorted(i for i, _ in seen) == list(range(7))
    assert all(groups[i] is group for i, group in seen)
    assert engine.stats["max_batch"] == 4
    assert engine.stats["tokens"] == sum(len(c.token_ids) for g in groups for c in g.completions)


def test_a_budget_for_one_row_queues_and_a_smaller_one_is_refused(policy: Policy) -> None:
    requests = [request("a", 30, 2), request("bb", 7, 2)]
    params = SamplingParams(8)
    with pytest.raises(ValueError, match=r"rollout\.cache_bytes = 1000: must be at least (\d+)") as error:
        Engine(policy, cache_bytes=1000).generate(requests, params)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ValueError, match="cache_bytes"):
        Engine(policy, cache_bytes=least - 1).generate(requests, params)
    engine = Engine(policy, cache_bytes=least)
    groups = engine.generate(requests, params)
    assert engine.stats["max_batch"] == 1 and engine.stats["cache_bytes"] <= least
    plenty = Engine(policy).generate(requests, params)
    assert [c.token_ids for g in groups for c in g.completions] == [c.token_ids for g in plenty for c in g.completions]


@pytest.mark.parametrize("budget", [9_000, 14_000, 40_000])
def test_the_cache_stays_within_its_budget(policy: Policy, budget: int) -> None:
    engine = Engine(policy, cache_bytes=budget)
    engine.generate([request("n" * i, 1 + i, 3) for i in range(9)], SamplingParams(12))
    assert engine.stats["cache_bytes"] <= budget


@pytest.mark.parametrize("options", [{}, {"steps_per_look": 4}, {"steps_per_look": 4, "look_behind": True}])
def test_lengths_can_be_given_for_each_row(policy: Policy, options: dict[str, int]) -> None:
    engine = Engine(policy, cache_bytes=2**22, max_batch_size=3, **options)
    engine.limit_of = lambda request, k: 1 + 5 * request + k
    groups = engine.generate([request("a", 4, 3), request("bb", 4, 3)], SamplingParams(16))
    assert [[len(c.token_ids) for c in group.completions] for group in groups] == [[1, 2, 3], [6, 7, 8]]
    short = engine.generate([request("a", 4, 3), request("bb", 4, 3)], SamplingParams(2))
    assert [[len(c.token_ids) for c in group.completions] for group in short] == [[1, 2, 2], [2, 2, 2]]


def test_nothing_of_the_caller_changes(policy: Policy) -> None:
    policy.train()
    policy.gradient_checkpointing = True
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    Engine(policy, cache_bytes=2**22).generate([request("a", 4, 4)], SamplingParams(8))
    policy.gradient_checkpointing = False
    assert policy.training and torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[name], tensor) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())


def test_a_device_without_kernels_is_a_warning(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    Engine(policy)
    assert not caplog.records  # on a CPU there are none
    with torch.device("meta"):
        Engine(Policy(CONFIG))
    assert [(r.levelname, r.message.split(": ")[1]) for r in caplog.records] == [
        ("WARNING", "its parameters are on meta")
    ]


def test_bits_that_mkl_may_change_are_a_warning(
    policy: Policy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    Engine(policy, batch_invariant=True)
    monkeypatch.delenv("MKL_CBWR")
    Engine(policy)
    assert not caplog.records
    Engine(policy, batch_invariant=True)
    found = [(r.levelname, "MKL_CBWR=AUTO,STRICT" in r.message) for r in caplog.records]
    assert found == ([("WARNING", True)] if torch.backends.mkl.is_available() else [])


def test_bad_requests_are_named(policy: Policy) -> None:
    engine = Engine(policy, cache_bytes=2**22)
    assert engine.generate([], SamplingParams(4)) == []
    with pytest.raises(ValueError, match="'a' has no seeds"):
        engine.generate([request("a", 4, 0)], SamplingParams(4))
    with pytest.raises(ValueError, match="'a' has an empty prompt"):
        engine.generate([request("a", 0, 1)], SamplingParams(4))
    with pytest.raises(ValueError, match="max_completion_length = -1"):
        engine.generate([request("a", 4, 1)], SamplingParams(-1))
    with pytest.raises(ValueError, match=r"rollout\.max_batch_size = 0"):
        Engine(policy, max_batch_size=0)
    with pytest.raises(ValueError, match=r"rollout\.steps_per_look = 0"):
        Engine(policy, steps_per_look=0)


def test_many_rows_and_a_wide_expert_index() -> None:
    config = PolicyConfig.from_dict({**CONFIG.to_dict(), "n_routed_experts": 300, "num_hidden_layers": 2})
    (group,) = Engine(init_policy(config, seed=1), cache_bytes=2**24).generate([request("a", 4, 5)], SamplingParams(6))
    routes = torch.cat([c.routes for c in group.completions if c.routes is not None])
    assert routes.dtype == torch.int16 and int(routes.max()) > 127


def test_looking_behind_wastes_no_step_where_lengths_are_known(policy: Policy) -> None:
    engine = Engine(policy, cache_bytes=2**22, max_batch_size=4, steps_per_look=4, look_behind=True)
    groups = engine.generate([request("a", 5, 4), request("bb", 9, 4)], SamplingParams(23))
    assert {len(c.token_ids) for group in groups for c in group.completions} == {23}
    assert engine.stats["steps"] == 2 * 22 and engine.stats["busy_frac"] == 1
