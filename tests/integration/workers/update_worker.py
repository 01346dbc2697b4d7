"""One process of the invariance test: a fixed experience, two GRPO steps, a rollout, a save and a return to it.

Run by tests/integration/test_update_invariance.py under several launchers; every launch must give the same numbers.
Usage: update_worker.py OUT.pt SCRATCH MICRO_BATCH_TOKENS DTYPE LOSS_TYPE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rewards.scorer import ScoredBatch
from rl.config import GRPOSection, OptimizerSection
from rl.distributed import gather_objects, leave_process_group, rank, world_size
from rl.grpo.advantages import group_advantages
from rl.policy.config import PolicyConfig
from rl.policy.model import init_policy, moe_leaf_classes
from rl.rollout.engine import Engine
from rl.train.balance import update_router_biases
from rl.train.batching import MicroBatch, pack_rows
from rl.train.experience import Experience, RowRecord
from rl.train.keeping import Keeper
from rl.train.learner import Learner, Scored, make_accelerator
from rl.train.update import GRPOUpdate
from rl.types import Completion, Problem, RolloutGroup, RolloutRequest, SamplingParams

PROBLEMS, GROUP = 6, 4
CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_theta": 100.0,
    "initializer_range": 0.06,
    "max_position_embeddings": 128,
}


def make_experience(seed: int) -> Experience:
    """The same problems, completions and rewards on every rank; each rank holds every world_size-th group. Lengths
    differ much, one completion is cut off, one has no reward."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    def draw_routes(tokens: int) -> torch.Tensor:
        """(tokens, 2 MoE layers, 2 of 8 experts)"""
        return torch.rand(tokens, 2, 8, generator=g).argsort(-1)[..., :2].to(torch.uint8)

    groups, records = [], []
    rewards = torch.randn(PROBLEMS, GROUP, generator=g)
    rewards[1, 2] = float("nan")
    for b in range(PROBLEMS):
        prompt = tuple(torch.randint(2, 40, (draw(1, 9),), generator=g).tolist())
        problem = Problem(id=f"p{b}", prompt=str(b), prompt_ids=prompt)
        completions = []
        for k in range(GROUP):
            ids = torch.randint(2, 40, (draw(1, 20),), generator=g).tolist()
            completions.append(
                Completion(
                    token_ids=ids,
                    logprobs=-3.7 + 0.3 * torch.randn(len(ids), generator=g),
                    finish_reason="length" if (b, k) == (0, 1) else "stop",
                    routes=draw_routes(len(ids) - 1),
                )
            )
            reward = float(rewards[b, k])
            records.append(
                RowRecord(
                    b * GROUP + k,
                    problem.id,
                    "",
                    "",
                    len(ids),
                    (b, k) == (0, 1),
                    None if reward != reward else reward,
                    {},
                )
            )
        groups.append(RolloutGroup(problem, completions, draw_routes(len(prompt))))
    positions = list(range(rank(), PROBLEMS, world_size()))
    advantages = group_advantages(rewards)
    return Experience([groups[b] for b in positions], positions, records, ScoredBatch([], {}, {}), rewards, advantages)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    with learner.gathered() as policy:
        return {name: tensor.detach().float().clone() for name, tensor in policy.state_dict().items()}


def survives_nan(learner: Learner) -> bool:
    """A loss that is not a number leaves the weights alone and says so, and the next step is a step again."""
    [batch] = pack_rows(make_experience(0).rows(mask_truncated=False, replay_routes=True)[:3], max_tokens=10_000)

    def broken(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return scored.logprobs.sum() * float("nan"), {}

    def sound(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -scored.logprobs.sum(), {}

    before = weights_of(learner)
    result = learner.step([batch], broken, divisor=1.0, step=50)
    after = weights_of(learner)
    next_result = learner.step([batch], sound, divisor=10.0, step=51)
    moved = weights_of(learner)
    return (
        result.skipped
        and all(torch.equal(before[name], after[name]) for name in before)
        and not next_result.skipped
        and not all(torch.equal(before[name], moved[name]) for name in before)
        and all(bool(torch.isfinite(value).all()) for value in moved.values())
    )


def main() -> None:
    out, scratch, micro_batch_tokens, dtype_name, loss_type = sys.argv[1:]
    torch.set_num_threads(1)
    dtype = getattr(torch, dtype_name)
    accelerator = make_accelerator(dtype)
    policy = init_policy(PolicyConfig.from_dict(CONFIG), seed=0, dtype=dtype)
    learner = Learner(
        policy,
        # A large epsilon: Adam divides by |gradient|, so with 1e-8 a rounding error of a gradient near 0 moves a weight
        # by the full learning rate, and the comparison would show Adam instead of the learner.
        OptimizerSection(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.01, adam_epsilon=1e-3),
        accelerator=accelerator,
        total_steps=100,
        with_reference=True,
        zero3_leaf_classes=moe_leaf_classes(policy),
    )
    section = GRPOSection(
        steps=2,
        loss_type=loss_type,
        beta=0.05,
        unbiased_kl=loss_type == "dapo",
        num_iterations=2,
        mini_batches=3,
        mask_truncated_completions=True,
    )
    update = GRPOUpdate(
        learner, section, micro_batch_tokens=int(micro_batch_tokens), temperature=0.8, max_completion_length=32
    )
    keeper = Keeper(Path(scratch), learner, keep=2)

    def step(number: int) -> dict[str, float]:
        result = update.run(make_experience(number), step=number, replay_routes=True, after_each=lambda result: None)
        assert result.expert_load is not None
        update_router_biases(learner.policy, result.expert_load, rate=0.01)
        return {**result.metrics, **{f"loss/{i}": r.loss for i, r in enumerate(result.steps)}}

    metrics = [step(0)]
    keeper.save(1, elapsed_s=0.0)
    metrics.append(step(1))
    after = weights_of(learner)
    with learner.gathered():
        requests = [RolloutRequest(Problem(f"q{i}", "", (3 + i, 5, 7)), (i,)) for i in range(4)]
        tokens = [
            g.completions[0].token_ids for g in Engine(policy).generate(requests, SamplingParams(12, temperature=0.0))
        ]
    assert keeper.restore(keeper.store.latest_valid()) == 1
    again_metrics = step(1)
    again = weights_of(learner)
    same = all(torch.equal(after[name], again[name]) for name in after)
    resumed_exactly = all(gather_objects(same and again_metrics == metrics[1]))
    guarded = all(gather_objects(survives_nan(learner)))
    if rank() == 0:
        torch.save(
            {
                "metrics": metrics,
                "weights": after,
                "tokens": tokens,
                "resumed_exactly": resumed_exactly,
                "guarded": guarded,
                "stage": learner.stage,
            },
            out,
        )
    leave_process_group()


if __name__ == "__main__":
    main()
