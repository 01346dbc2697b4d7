"""One process of the invariance test: a fixed experience, one GRPO step for each loss in turn, a rollout, a save and a
return to it.

Run by tests/integration/test_update_invariance.py under several launchers; every launch must give the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from rewards.scorer import ScoredBatch
from rl.config import GRPOSection, OptimizerSection
from rl.distributed import die_with_launcher, end_program, gather_objects, rank, world_size
from rl.grpo.advantages import group_advantages
from rl.policy.hf import init_any, load_any
from rl.policy.model import Policy, moe_leaf_classes
from rl.rollout.engine import Engine
from rl.rollout.hf_engine import HFEngine
from rl.train.balance import update_router_biases
from rl.train.batching import MicroBatch, pack_rows
from rl.train.experience import Experience, RowRecord
from rl.train.keeping import Keeper
from rl.train.learner import Learner, Scored, TrainablePolicy, make_accelerator
from rl.train.update import GRPOUpdate
from rl.types import Completion, Problem, RolloutGroup, RolloutRequest, SamplingParams

PROBLEMS, GROUP = 6, 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", help="what this launch found, written by rank 0")
    parser.add_argument("scratch", help="folder for the checkpoint")
    parser.add_argument("--model", required=True, help="config.json as text, or the folder of a checkpoint")
    parser.add_argument("--losses", required=True, help="names, joined by commas; the checkpoint is before the last")
    parser.add_argument("--tokens", type=int, required=True, help="micro_batch_tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


def make_experience(seed: int, *, with_routes: bool = True) -> Experience:
    """The same problems, completions and rewards on every rank; each rank holds every world_size-th group. Lengths
    differ much, one completion is cut off, one has no reward."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    def draw_routes(tokens: int) -> torch.Tensor | None:
        """(tokens, 2 MoE layers, 2 of 8 experts)"""
        if not with_routes:
            return None
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


FLAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "value": lambda loss: loss + float("nan"),
    "gradient": lambda loss: loss + (0 * loss).sqrt(),
    "value and gradient": lambda loss: loss * float("nan"),
}


def survives_nan(learner: Learner, flaw: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """A flaw on the last rank alone leaves this rank's weights alone and is told here; the next step is a step
    again."""
    rows = make_experience(0, with_routes=isinstance(learner.policy, Policy)).rows(mask_truncated=False)
    batches = pack_rows(rows[:3], max_tokens=20)

    def sound(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -scored.logprobs.sum(), {}

    def flawed(scored: Scored, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = sound(scored, batch)
        return (flaw(loss) if rank() == world_size() - 1 else loss), sums

    before = weights_of(learner)
    result = learner.step(batches, flawed, divisor=10.0, step=50)
    after = weights_of(learner)
    next_result = learner.step(batches, sound, divisor=10.0, step=51)
    moved = weights_of(learner)
    return (
        result.skipped
        and all(torch.equal(before[name], after[name]) for name in before)
        and not next_result.skipped
        and not all(torch.equal(before[name], moved[name]) for name in before)
        and all(bool(torch.isfinite(value).all()) for value in moved.values())
    )


def sample(policy: TrainablePolicy) -> list[list[int]]:
    """Greedy completions of five prompts, divided among the ranks, one row at a time: with two ranks one of them calls
    the engine's decoder three times and the other twice."""
    requests = [RolloutRequest(Problem(f"q{i}", "", (3 + i, 5, 7)), (i,)) for i in range(5)]
    engine = Engine(policy) if isinstance(policy, Policy) else HFEngine(policy, max_batch_size=1)
    groups = engine.generate(requests[rank() :: world_size()], SamplingParams(12, temperature=0.0))
    mine = {group.problem.id: group.completions[0].token_ids for group in groups}
    return [tokens for _, tokens in sorted(item for part in gather_objects(mine) for item in part.items())]


def make_learner(arguments: argparse.Namespace) -> Learner:
    dtype = getattr(torch, arguments.dtype)
    accelerator = make_accelerator(dtype)
    if arguments.model.startswith("{"):
        policy = init_any(json.loads(arguments.model), seed=0, dtype=dtype)
    else:
        policy = load_any(arguments.model, dtype=dtype)
    policy.gradient_checkpointing = arguments.checkpointing
    learner = Learner(
        policy,
        # A large epsilon: Adam divides by |gradient|, so with 1e-8 a rounding error of a gradient near 0 moves a weight
        # by the full learning rate, and the comparison would show Adam instead of the learner.
        OptimizerSection(learning_rate=3e-3, max_grad_norm=0.5, weight_decay=0.01, adam_epsilon=1e-3),
        accelerator=accelerator,
        total_steps=100,
        with_reference=True,
        zero3_leaf_classes=moe_leaf_classes(policy),
    )
    learner.chunk_tokens = max(4, arguments.tokens // 4)  # several chunks a micro-batch, as with a large vocabulary
    return learner


def main() -> None:
    arguments = parse_arguments()
    die_with_launcher()
    torch.set_num_threads(1)
    learner = make_learner(arguments)
    keeper = Keeper(Path(arguments.scratch), learner, keep=2, data="")

    def step(number: int, loss: str) -> dict[str, float]:
        section = GRPOSection(
            steps=6,
            loss_type=loss,
            beta=0.05,
            unbiased_kl=loss == "dapo",
            num_iterations=2,
            mini_batches=3,
            mask_truncated_completions=True,
        )
        update = GRPOUpdate(
            learner, section, micro_batch_tokens=arguments.tokens, temperature=0.8, max_completion_length=32
        )
        replay = isinstance(learner.policy, Policy)
        experience = make_experience(number, with_routes=replay)
        result = update.run(experience, step=number, replay_routes=replay, after_each=lambda result: None)
        if result.expert_load is not None:
            update_router_biases(learner.policy, result.expert_load, rate=0.01)
        return {**result.metrics, **{f"loss/{i}": r.loss for i, r in enumerate(result.steps)}}

    *first, last = enumerate(arguments.losses.split(","))
    metrics = [step(*each) for each in first]
    keeper.save(1, elapsed_s=0.0)
    metrics.append(step(*last))
    after = weights_of(learner)
    with learner.gathered() as policy:
        tokens = sample(policy)
    assert keeper.restore(keeper.store.latest_valid()) == 1
    same_metrics = step(*last) == metrics[-1]
    again = weights_of(learner)
    resumed_exactly = same_metrics and all(torch.equal(after[name], again[name]) for name in after)
    unguarded = [name for name, flaw in FLAWS.items() if not all(gather_objects(survives_nan(learner, flaw)))]
    found = {
        "metrics": metrics,
        "weights": after,
        "tokens": tokens,
        "resumed_exactly": all(gather_objects(resumed_exactly)),
        "unguarded": unguarded,
    }
    if rank() == 0:
        torch.save(found, arguments.out)
    end_program()


if __name__ == "__main__":
    main()
