"""Whatever the schedule (looks far apart or behind, few rows at once, small budgets, prompts in chunks), completions
are those of the plainest one: everything at once, with a look after every step.

What comes from the device arrives here as late as it may: when a mark behind it is waited for, and not before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout import prefill, rollout, state
from rl.rollout.engine import Engine
from rl.rollout.transfer import Mark
from rl.types import Problem, RolloutGroup, RolloutRequest, SamplingParams

CONFIG = PolicyConfig(
    vocab_size=26, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=4, intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=1, initializer_range=0.3,
)  # fmt: skip
Limits = list[list[int]] | None


@pytest.fixture(scope="module")
def policy() -> Policy:
    return init_policy(CONFIG, seed=0)


@contextmanager
def late_copies() -> Iterator[None]:
    """Copies to the host as on a GPU: rubbish until the device has come so far."""
    under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.full_like(tensor, 99)
        under_way.append((copy, tensor.clone()))
        return copy

    class LateMark(Mark):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.before = list(under_way)

        def wait(self) -> None:
            for copy, tensor in self.before:
                copy.copy_(tensor)
            arrived = {id(pair) for pair in self.before}
            under_way[:] = [pair for pair in under_way if id(pair) not in arrived]

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (prefill, state):
            monkeypatch.setattr(module, "to_host", to_host)
        for module in (rollout, state):
            monkeypatch.setattr(module, "Mark", LateMark)
        yield


def letters(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


def drawn_case(draw: random.Random) -> tuple[list[RolloutRequest], SamplingParams, Limits]:
    requests = [
        RolloutRequest(
            Problem(str(i), "", tuple(draw.randrange(26) for _ in range(draw.choice([1, 2, 15, 16, 17, 30])))),
            tuple(draw.getrandbits(64) for _ in range(draw.randint(1, 5))),
        )
        for i in range(draw.randint(1, 6))
    ]
    params = SamplingParams(
        draw.choice([0, 1, 2, 3, 10, 25]),
        stop_token_ids=tuple(draw.sample(range(26), draw.choice([0, 1, 3]))),
        stop_strings=tuple(letters(draw.choices(range(26), k=draw.randint(1, 2))) for _ in range(draw.choice([0, 3]))),
        temperature=draw.choice([0.0, 0.7, 1.0]),
        top_p=draw.choice([1.0, 1.0, 0.8]),
    )
    limits = [[draw.randint(1, 26) for _ in request.seeds] for request in requests]
    return requests, params, draw.choice([None, limits])


def drawn_schedule(draw: random.Random) -> dict[str, Any]:
    return {
        "max_batch_size": draw.choice([None, 1, 2, 3, 5, 8]),
        "cache_bytes": draw.choice([2**24, 40_000, 20_000]),
        "prefill_tokens": draw.choice([8192, 20, 1]),
        "steps_per_look": draw.choice([1, 2, 3, 4, 8, 40]),
        "look_behind": draw.choice([True, True, False]),
        "batch_invariant": draw.random() < 0.2,
    }


def generate(
    policy: Policy, case: tuple[list[RolloutRequest], SamplingParams, Limits], schedule: dict[str, Any]
) -> list[RolloutGroup]:
    requests, params, limits = case
    engine = Engine(policy, decode_text=letters, **schedule)
    if limits is not None:
        engine.limit_of = lambda request, k: limits[request][k]
    complete: dict[int, RolloutGroup] = {}
    groups = engine.generate(requests, params, on_group=complete.__setitem__)
    assert [complete[i] for i in range(len(requests))] == groups
    return groups


@pytest.mark.parametrize("seed", range(8))
def test_a_schedule_changes_nothing(policy: Policy, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(12):
        case, schedule = drawn_case(draw), drawn_schedule(draw)
        plain = generate(policy, case, {"cache_bytes": 2**24, "steps_per_look": 1, "look_behind": False})
        with late_copies():
            groups = generate(policy, case, schedule)
        for expected, found in zip(plain, groups, strict=True):
            assert found.prompt_routes is not None and expected.prompt_routes is not None
            assert torch.equal(found.prompt_routes.sort(-1).values, expected.prompt_routes.sort(-1).values), schedule
            for one, other in zip(found.completions, expected.completions, strict=True):
                assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason), schedule
                torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
                assert one.routes is not None and other.routes is not None
                assert torch.equal(one.routes.sort(-1).values, other.routes.sort(-1).values), schedule
