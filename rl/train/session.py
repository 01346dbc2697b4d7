"""What every kind of run needs before its first step: recipe checks, folder, tokenizer, data, policy, engine.

Cheap checks come first (recipe, batch arithmetic, reward functions, the policy's configuration, the run folder, data),
weights last, so that a mistake costs seconds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rewards.scorer import RewardScorer
from rl.config import ModelSection, Recipe
from rl.config.resuming import Stage
from rl.data import ProblemSet, load_tokenizer, load_train_and_eval, sampling_stops
from rl.distributed import die_with_launcher, is_main_process, share_cpu_threads, world_size
from rl.policy.hf import checkpoint_end_tokens, init_any, load_any
from rl.rollout.engine import Engine
from rl.train.checkpoint import FoundCheckpoint
from rl.train.evaluate import rightness_functions
from rl.train.experience import TextOf
from rl.train.learner import Accelerator, TrainablePolicy, make_accelerator, zero_stage
from rl.train.policy_check import check_policy, config_values
from rl.train.run_folder import claim_folder
from rl.types import RolloutEngine, SamplingParams

COLD_START = "cold_start"
POLICY_FOLDER = "policy"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class Session:
    """A run's surroundings on this process. folder: where everything of the run is written. found: on rank 0, the
    checkpoint to go on from, if there is one. end_tokens: what ends a text or a turn, the tokenizer's end token and
    those that the checkpoint names (read once: a checkpoint may be on the hub)."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    found: FoundCheckpoint | None
    end_tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        own, name = self.tokenizer.eos_token_id, self.recipe.model.name_or_path
        assert own is not None, "load_tokenizer demands an end token"
        named = checkpoint_end_tokens(name) if name is not None else ()
        self.end_tokens = tuple(dict.fromkeys((int(own), *named)))

    @property
    def decode(self) -> TextOf:
        return TextOf(self.tokenizer, self.end_tokens)

    def sampling_params(self) -> SamplingParams:
        """How training rollouts are drawn."""
        rollout = self.recipe.rollout
        token_ids, strings = sampling_stops(
            self.recipe.data.template, rollout.stop_strings, self.tokenizer, self.end_tokens
        )
        return SamplingParams(
            max_completion_length=rollout.max_completion_length,
            stop_token_ids=token_ids,
            stop_strings=strings,
            temperature=rollout.temperature,
        )

    def make_engine(self, policy: TrainablePolicy) -> RolloutEngine:
        """The engine that the recipe names, over the trainer's own policy."""
        rollout = self.recipe.rollout
        if rollout.engine == "hf":
            from rl.rollout.hf_engine import HFEngine

            return HFEngine(policy, max_batch_size=rollout.max_batch_size, decode_text=self.tokenizer.decode)
        return Engine(
            policy,
            max_batch_size=rollout.max_batch_size,
            cache_bytes=rollout.cache_bytes,
            decode_text=self.tokenizer.decode,
            batch_invariant=rollout.batch_invariant,
        )


def open_session(recipe: Recipe, *, stage: Stage, resume: bool, start_from: Path | None = None) -> Session:
    """Check the recipe against this launch and its policy, and claim the run folder for it (the cold start's is inside
    that of the run)."""
    die_with_launcher()
    plan = recipe.batch_plan(world_size())
    tokenizer = load_tokenizer(recipe.model)
    check_policy(recipe, tokenizer, start_from=start_from)
    accelerator = make_accelerator(DTYPES[recipe.model.dtype])
    share_cpu_threads()
    folder = recipe.run_folder / COLD_START if stage == "sft" else recipe.run_folder
    found = None
    if is_main_process():
        print(f"[aha] run folder {folder}\n[aha] batch plan on {plan.world_size} process(es)\n{plan}", flush=True)
        found = claim_folder(folder, recipe, stage=stage, resume=resume, zero_stage=zero_stage(accelerator))
    else:
        logging.getLogger().setLevel(logging.ERROR)
    return Session(recipe, folder, accelerator, tokenizer, found)


def make_scorer(recipe: Recipe) -> RewardScorer:
    """The recipe's reward functions. ValueError for unknown names or parameters, for weights that are all 0, for an
    eval.metric that is none of them, and for a function that cannot run on this machine."""
    rewards = recipe.rewards
    scorer = RewardScorer(
        rewards.reward_funcs, rewards.reward_weights, on_error=rewards.on_error, task_column=rewards.task_column
    )
    if not any(entry.weight for entry in scorer.entries):
        raise ValueError("rewards.reward_funcs: the weights of all functions are 0; at least one must differ")
    rightness_functions(scorer.entries, recipe.eval.metric)
    scorer.check_machine()
    return scorer


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, scorer: RewardScorer
) -> tuple[ProblemSet, ProblemSet | None]:
    """Problems to train on and held-out ones, if the recipe has any. ValueError: bad rows, held-out problems that are
    also trained on, columns that the reward functions miss, fewer problems than a step takes.

    A problem that came twice in a step would be sampled with the same seeds: the same completions twice."""
    train, held_out = load_train_and_eval(recipe.data, tokenizer, seed=recipe.seed)
    scorer.check_columns(train[0].columns, source="data.train", rows=(problem.columns for problem in train))
    if held_out is not None:
        scorer.check_columns(held_out[0].columns, source="data.eval")
    wanted = recipe.rollout.prompts_per_step
    if wanted > len(train):
        dropped = f" ({train.overlong} longer ones were dropped)" if train.overlong else ""
        raise ValueError(
            f"rollout.prompts_per_step = {wanted}: data.train holds {len(train)} problems{dropped}; allowed: at most "
            "that, since a step takes no problem twice"
        )
    return train, held_out


def make_policy(
    model: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    device: torch.device,
    start_from: Path | None = None,
) -> TrainablePolicy:
    """The policy of the recipe: from `start_from`, else a checkpoint, else random weights."""
    dtype = DTYPES[model.dtype]
    name = str(start_from) if start_from is not None else model.name_or_path
    policy: TrainablePolicy
    if name is not None:
        policy = load_any(name, dtype=dtype, device=device)
    else:
        policy = init_any(config_values(model, tokenizer), seed=seed, dtype=dtype, device=device)
    policy.gradient_checkpointing = model.gradient_checkpointing
    return policy


def starting_point(recipe: Recipe, folder: Path) -> Path | None:
    """Where GRPO starts when the recipe has a cold start: the policy that `scripts/sft.py` left. ValueError if it is
    missing."""
    if recipe.sft is None:
        return None
    policy = folder / COLD_START / POLICY_FOLDER
    if not (policy / "config.json").is_file():
        raise ValueError(
            f"this recipe has a cold start (section sft), but {policy} does not exist; run scripts/sft.py with the "
            "same recipe first, or remove the section sft"
        )
    return policy
