"""The engine on a GPU (Triton decode in CUDA graphs) against the same engine in plain torch, and against the
trainer's forward."""

import os
from collections.abc import Callable

import pytest
import torch

import rl.rollout.engine as engine_module
from rl.grpo.mismatch import logprob_mismatch
from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout.engine import Engine
from rl.rollout.prefill import Prefill
from rl.types import Problem, RolloutGroup, RolloutRequest, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from rl.rollout.arena import Arena
    from rl.rollout.cuda import CudaStepper, batch_rung, tile_rung


def make_policy(dtype: torch.dtype, **changes: object) -> Policy:
    values: dict = {
        "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_lora_rank": 64,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "intermediate_size": 512,
        "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "initializer_range": 0.06,
    }  # fmt: skip
    return init_policy(PolicyConfig(**(values | changes)), seed=1, dtype=dtype, device="cuda")


def make_requests(groups: list[tuple[int, int]]) -> list[RolloutRequest]:
    """One request per (prompt tokens, rows)."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for i, (length, rows) in enumerate(groups):
        ids = torch.randint(0, 1000, (length,), generator=generator).tolist()
        requests.append(RolloutRequest(Problem(str(i), "", tuple(ids)), tuple(range(100 * i, 100 * i + rows))))
    return requests


def tokens_of(groups: list[RolloutGroup]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group.completions]


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(engine_module, "unsupported", lambda policy: "the reference is wanted")


RAGGED = [(1, 3), (33, 1), (7, 8), (64, 5), (50, 6), (2, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 48, "n_group": 4, "topk_group": 2}, {"n_routed_experts": None, "n_shared_experts": 0}],
    ids=["plain", "v3", "dense"],
)
def test_fp32_tokens_equal_plain_torch(
    in_torch: Callable[[], None], temperature: float, changes: dict[str, object]
) -> None:
    policy = make_policy(torch.float32, **changes)
    params = SamplingParams(70, stop_token_ids=(3, 17), temperature=temperature)
    found = Engine(policy).generate(make_requests(RAGGED), params)
    few = Engine(policy, max_batch_size=7, steps_per_look=3).generate(make_requests(RAGGED), params)
    in_torch()
    engine = Engine(policy)
    expected = engine.generate(make_requests(RAGGED), params)
    assert engine.stats["backend"] == "torch"
    assert tokens_of(found) == tokens_of(expected) == tokens_of(few)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert (a.logprobs - b.logprobs).abs().max() < 1e-4
            assert a.finish_reason == b.finish_reason
            if a.routes is not None and b.routes is not None:
                assert torch.equal(a.routes.sort(-1).values, b.routes.sort(-1).values)


@pytest.mark.parametrize("invariant", [False, True])
def test_lean_prefill_and_the_policys_forward_give_equal_tokens(
    monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    policy, params = make_policy(torch.float32, q_lora_rank=48, n_group=4, topk_group=2), SamplingParams(30)
    large, forward = [], Prefill._policy_forward
    monkeypatch.setattr(Prefill, "_policy_forward", lambda *args: large.append(1) or forward(*args))
    found = Engine(policy, max_batch_size=24, batch_invariant=invariant).generate(make_requests(RAGGED), params)
    assert not large
    monkeypatch.setattr(CudaStepper, "lean_prefill", lambda self, routes_dtype: None)
    expected = Engine(policy, max_batch_size=24, batch_invariant=invariant).generate(make_requests(RAGGED), params)
    assert large
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.prompt_routes is not None and other.prompt_routes is not None
        assert one.prompt_routes.dtype == other.prompt_routes.dtype
        assert torch.equal(one.prompt_routes.sort(-1).values, other.prompt_routes.sort(-1).values)
        for a, b in zip(one.completions, other.completions, strict=True):
            assert (a.logprobs - b.logprobs).abs().max() < 1e-4


@torch.no_grad()
def trainer_logprobs(policy: Policy, group: RolloutGroup, k: int, *, replay: bool) -> torch.Tensor:
    completion, prompt = group.completions[k], list(group.problem.prompt_ids)
    sequence = torch.tensor(prompt + completion.token_ids, device="cuda")
    routes = None
    if replay:
        assert group.prompt_routes is not None and completion.routes is not None
        last = completion.routes[-1:] if len(completion.routes) else group.prompt_routes[-1:]
        routes = torch.cat((group.prompt_routes, completion.routes, last)).cuda().long()
    ends = torch.tensor([0, len(sequence)], dtype=torch.int32, device="cuda")
    hidden = policy(sequence, ends, len(sequence), routes=routes).hidden[len(prompt) - 1 : -1]
    logprobs = policy.lm_head(hidden).float().log_softmax(-1)
    return logprobs.gather(1, sequence[len(prompt) :, None])[:, 0].cpu()


def test_bf16_logprobs_are_the_trainers_with_replayed_routes() -> None:
    policy = make_policy(torch.bfloat16, initializer_range=0.02)
    groups = Engine(policy).generate(make_requests(RAGGED), SamplingParams(64))
    sums = {"mismatch_kl_sum": 0.0, "mismatch_abs_sum": 0.0, "mismatch_tokens": 0.0}
    for group in groups:
        for k, completion in enumerate(group.completions):
            trainer = trainer_logprobs(policy, group, k, replay=True)
            found = logprob_mismatch(completion.logprobs, trainer, torch.ones_like(trainer))
            sums = {key: value + float(found[key]) for key, value in sums.items()}
    assert sums["mismatch_abs_sum"] / sums["mismatch_tokens"] < 1e-2
    assert sums["mismatch_kl_sum"] / sums["mismatch_tokens"] < 1e-3


def test_same_seeds_same_tokens_and_graphs_follow_an_update() -> None:
    policy = make_policy(torch.bfloat16)
    engine = Engine(policy)
    first = tokens_of(engine.generate(make_requests(RAGGED), SamplingParams(40)))
    assert tokens_of(engine.generate(make_requests(RAGGED), SamplingParams(40))) == first
    with torch.no_grad():
        policy.model.layers[2].self_attn.q_proj.weight.add_(0.05)
    changed = tokens_of(engine.generate(make_requests(RAGGED), SamplingParams(40)))
    assert changed != first
    assert changed == tokens_of(Engine(policy).generate(make_requests(RAGGED), SamplingParams(40)))


def test_truncated_sampling_and_a_small_budget() -> None:
    policy = make_policy(torch.float32)
    params = SamplingParams(30, temperature=0.8, top_p=0.9, top_k=50, min_p=0.01)
    everything = Engine(policy).generate(make_requests(RAGGED), params)
    small = Engine(policy, cache_bytes=600_000)
    assert tokens_of(small.generate(make_requests(RAGGED), params)) == tokens_of(everything)
    assert small.stats["max_batch"] < 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_rows_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    params = SamplingParams(40, stop_token_ids=(3,))
    requests = make_requests(RAGGED)
    expected = Engine(policy, max_batch_size=48, batch_invariant=True).generate(requests, params)
    for subset in ([2], [5, 0], [4, 3, 2, 1, 0]):
        engine = Engine(policy, max_batch_size=48, batch_invariant=True)
        for i, group in zip(subset, engine.generate([requests[i] for i in subset], params), strict=True):
            for one, other in zip(group.completions, expected[i].completions, strict=True):
                assert one.token_ids == other.token_ids
                assert torch.equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("stops", [{"stop_token_ids": tuple(range(0, 1000, 40))}, {"stop_strings": ("77", " 3 ")}])
def test_looking_behind_changes_nothing_but_time(behind: bool, stops: dict) -> None:
    def generate(**options: object) -> list[list[int]]:
        engine = Engine(policy, decode_text=lambda ids: " ".join(map(str, ids)), **options)  # type: ignore[arg-type]
        engine.limit_of = lambda request, k: 50 - 7 * k
        return tokens_of(engine.generate(make_requests(RAGGED), SamplingParams(50, **stops)))

    policy = make_policy(torch.float32)
    everything = generate(steps_per_look=1, look_behind=False)
    assert generate(max_batch_size=9, steps_per_look=3, look_behind=behind) == everything
    assert len({len(tokens) for tokens in everything}) > 8  # rows end at different times, by limits and by stops


def test_the_host_waits_at_looks_only() -> None:
    engine = Engine(make_policy(torch.bfloat16), max_batch_size=9)
    params = SamplingParams(40, stop_token_ids=tuple(range(0, 1000, 40)))
    expected = tokens_of(engine.generate(make_requests(RAGGED), params))
    torch.cuda.set_sync_debug_mode("error")  # for any other wait
    try:
        assert tokens_of(engine.generate(make_requests(RAGGED), params)) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def device_memory() -> int:
    """Free bytes; 0 where other tests share the device, and nothing can be said."""
    return 0 if "PYTEST_XDIST_WORKER" in os.environ else torch.cuda.mem_get_info()[0]


def test_graphs_outlive_a_rollout_and_its_memory_does_not() -> None:
    policy = make_policy(torch.bfloat16)
    engine = Engine(policy)
    assert engine.graph_keeper().arena is not None
    greedy, drawn = SamplingParams(20, temperature=0.0), SamplingParams(30, stop_token_ids=(3,))
    expected = {params: tokens_of(Engine(policy).generate(make_requests(RAGGED), params)) for params in (greedy, drawn)}
    free = []
    for round_ in range(4):
        for params in (greedy, drawn):
            assert tokens_of(engine.generate(make_requests(RAGGED), params)) == expected[params]
            assert engine.stats["arena_bytes"] > 0 and (engine.stats["capture_s"] == 0) == (round_ > 0)
        torch.cuda.synchronize()
        free.append((device_memory(), torch.cuda.memory_reserved()))
    assert free[-1] == free[1]
    shorter = [(length // 2 + 1, rows) for length, rows in RAGGED]
    engine.generate(make_requests(shorter), drawn)  # the cache keeps its lengths
    assert engine.stats["capture_s"] == 0
    policy.lm_head.weight.data = policy.lm_head.weight.data.flip(0).clone()
    changed = tokens_of(engine.generate(make_requests(RAGGED), drawn))
    assert engine.stats["capture_s"] > 0
    assert changed != expected[drawn]
    assert changed == tokens_of(Engine(policy).generate(make_requests(RAGGED), drawn))


def test_truncated_sampling_leaves_no_memory_behind() -> None:
    engine = Engine(make_policy(torch.bfloat16, vocab_size=100_000))
    requests, truncated = make_requests(RAGGED * 4), SamplingParams(20, top_p=0.9)
    engine.generate(requests, SamplingParams(20))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        engine.generate(requests, truncated)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_an_error_while_capturing_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(torch.bfloat16)
    params = SamplingParams(20, temperature=0.0)
    expected = tokens_of(Engine(policy).generate(make_requests(RAGGED), params))
    engine = Engine(policy)
    step, calls = CudaStepper._step, []

    def fails(self: CudaStepper, *size: int) -> None:
        step(self, *size)
        calls.append(size)
        if len(calls) == 2:  # a capture: each size is run once before it
            raise KeyboardInterrupt

    monkeypatch.setattr(CudaStepper, "_step", fails)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_requests(RAGGED), params)
    torch.cuda.empty_cache()  # fails for good where a capture is still open
    arena = engine.graph_keeper().arena
    assert arena is None or arena.bytes == 0
    assert tokens_of(engine.generate(make_requests(RAGGED), params)) == expected


def test_prompts_of_an_earlier_rollout_do_not_take_this_ones_memory() -> None:
    policy = make_policy(torch.bfloat16)
    for budget in (2**k for k in range(18, 30)):  # the smallest that both fit in, one at a time
        engine = Engine(policy, cache_bytes=budget)
        try:
            engine.generate(make_requests([(1500, 1)]), SamplingParams(4))
            engine = Engine(policy, cache_bytes=budget)
            engine.generate(make_requests([(4, 1)]), SamplingParams(1500))
            break
        except ValueError:
            continue
    engine.longest_prompt = 100_000
    engine.generate(make_requests([(4, 1)]), SamplingParams(1500))


def test_a_rollout_inside_of_another_is_refused() -> None:
    engine = Engine(make_policy(torch.bfloat16))
    if engine.graph_keeper().arena is None:
        pytest.skip("this driver maps no memory")
    requests, params = make_requests([(4, 2)]), SamplingParams(5)
    with pytest.raises(RuntimeError, match="in the middle of a rollout"):
        engine.generate(requests, params, on_group=lambda index, group: engine.generate(requests, params) and None)
    assert engine.generate(requests, params)


def test_an_arena_keeps_addresses_and_gives_memory_back() -> None:
    arena = Arena(torch.device("cuda"))
    seen = []
    for _ in range(2):
        free = device_memory()
        with arena:
            large = arena.zeros((3, 2**27), torch.bfloat16)
            small = arena.zeros((5,), torch.int64)
            empty = arena.zeros((0, 4), torch.float32)
            assert empty.shape == (0, 4) and large.sum() == 0 and small.tolist() == [0] * 5
            large.fill_(1.0)
            small.copy_(torch.arange(5))
            assert large[2, -1] == 1 and small.tolist() == [0, 1, 2, 3, 4] and arena.bytes >= 3 * 2**28
            assert device_memory() <= max(free - 3 * 2**28, 0)
            seen.append((large.data_ptr(), small.data_ptr(), arena.layout))
        assert device_memory() == free and arena.bytes == 0
    assert seen[0] == seen[1]
    with pytest.raises(torch.OutOfMemoryError, match="bytes"), arena:
        for _ in range(200):
            arena.zeros((2**30,), torch.uint8)
    assert device_memory() >= free


def test_ladder_by_hand() -> None:
    assert [batch_rung(n, 1000) for n in (1, 3, 8, 9, 10, 17, 33, 65, 100, 256, 257)] == [
        1, 4, 8, 10, 10, 20, 40, 80, 112, 256, 320,
    ]  # fmt: skip
    assert batch_rung(65, 70) == 70
    assert [tile_rung(n, 10, 4) for n in (1, 3, 4, 5, 6, 10)] == [3, 3, 5, 5, 10, 10]
    assert tile_rung(7, 7, 1) == 7
