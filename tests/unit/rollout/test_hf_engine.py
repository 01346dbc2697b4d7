"""transformers' generate behind the engine's protocol, on a tiny Qwen2."""

from __future__ import annotations

import pytest
import torch

from rl.policy.hf import HFPolicy, init_any
from rl.rollout.hf_engine import HFEngine
from rl.rollout.sampling import Sampler, sampling_logprobs
from rl.types import Problem, RolloutRequest, SamplingParams


def letters(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    values = {
        "model_type": "qwen2", "vocab_size": 26, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 128,
        "attention_dropout": 0.5, "use_sliding_window": False,
    }  # fmt: skip
    policy = init_any(values, seed=1)
    assert isinstance(policy, HFPolicy)
    policy.inner.generation_config.repetition_penalty = 1.5  # a checkpoint's habits must not leak into sampling
    policy.inner.generation_config.eos_token_id = 3
    return policy.train()


REQUESTS = [
    RolloutRequest(Problem("a", "", (4, 5, 6, 7, 8, 9)), (1, 2**64 - 3, 3)),
    RolloutRequest(Problem("b", "", (9,)), (7,)),
    RolloutRequest(Problem("c", "", (2, 2, 11)), (8, 9)),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_the_trainers_and_batching_does_not_matter(policy: HFPolicy, temperature: float) -> None:
    params = SamplingParams(max_completion_length=20, stop_token_ids=(3, 12), temperature=temperature, top_k=20)
    before, habits = torch.get_rng_state(), policy.inner.generation_config
    seen: list[int] = []
    groups = HFEngine(policy).generate(REQUESTS, params, on_group=lambda i, group: seen.append(i))
    assert sorted(seen) == [0, 1, 2] and torch.equal(before, torch.get_rng_state())
    assert policy.training and all(module.training for module in policy.modules())
    assert policy.inner.generation_config is habits  # it is saved with the policy
    alone = [HFEngine(policy, max_batch_size=1).generate([request], params)[0] for request in REQUESTS]
    sampler = Sampler.from_params(params)
    policy.eval()
    for request, group, other in zip(REQUESTS, groups, alone, strict=True):
        assert group.problem is request.problem and len(group.completions) == len(request.seeds)
        for completion, twin in zip(group.completions, other.completions, strict=True):
            assert completion.token_ids == twin.token_ids
            ids = [*request.problem.prompt_ids, *completion.token_ids]
            with torch.no_grad():
                hidden, _ = policy(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
                logits = policy.lm_head(hidden)[len(request.problem.prompt_ids) - 1 : -1]
            tokens = torch.tensor(completion.token_ids)
            expected = sampling_logprobs(logits, sampler).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)
            ended = tokens[-1].item() in (3, 12)
            assert completion.finish_reason == ("stop" if ended else "length")
            assert not set(completion.token_ids[:-1]) & {3, 12} and (ended or len(tokens) == 20)
    policy.train()


def test_stop_strings_and_limits(policy: HFPolicy) -> None:
    free = HFEngine(policy).generate(REQUESTS, SamplingParams(20))[0].completions
    text = letters(free[0].token_ids)[6:8]
    params = SamplingParams(20, stop_strings=(text,))
    stopped = HFEngine(policy, decode_text=letters).generate(REQUESTS, params)[0].completions
    for one, other in zip(free, stopped, strict=True):
        whole = letters(one.token_ids)
        expected = whole[: whole.index(text) + 2] if text in whole else whole
        assert letters(other.token_ids) == expected and len(other.logprobs) == len(expected)
        assert other.finish_reason == ("stop" if text in whole else "length")
    with pytest.raises(ValueError, match="decode_text"):
        HFEngine(policy).generate(REQUESTS, params)
    for limit in (0, 1):
        for group in HFEngine(policy).generate(REQUESTS, SamplingParams(limit)):
            assert all(len(c.token_ids) == limit == len(c.logprobs) and c.truncated for c in group.completions)
