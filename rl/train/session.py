"""What every kind of run needs before its first step: recipe checks, folder, tokenizer, data, policy, engine.

Cheap checks come first (recipe, batch arithmetic, reward functions, data), weights last, so that a mistake costs
seconds.
"""

from __future__ import annotations

import fcntl
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedTokenizerBase

from rewards.scorer import RewardScorer
from rl.config import ModelSection, Recipe
from rl.data import load_tokenizer, sampling_stops
from rl.distributed import die_with_launcher, is_main_process, share_cpu_threads, world_size
from rl.policy.hf import init_any, load_any
from rl.rollout.engine import Engine
from rl.train.experience import TextOf
from rl.train.learner import Accelerator, TrainablePolicy, make_accelerator
from rl.types import RolloutEngine, SamplingParams

COLD_START = "cold_start"
POLICY_FOLDER = "policy"
LOCK_FILE = ".lock"
_LOCKS: list[IO[str]] = []  # open files; the lock goes with the process
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class Session:
    """A run's surroundings on this process. folder: where everything of the run is written."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase

    @property
    def decode(self) -> TextOf:
        return TextOf(self.tokenizer)

    def sampling_params(self) -> SamplingParams:
        """How training rollouts are drawn."""
        rollout = self.recipe.rollout
        token_ids, strings = sampling_stops(self.recipe.data.template, rollout.stop_strings, self.tokenizer)
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
        )


def open_session(recipe: Recipe, *, folder: Path | None = None) -> Session:
    """Check the recipe against this launch, make the run folder and write the resolved recipe into it."""
    die_with_launcher()
    plan = recipe.batch_plan(world_size())
    accelerator = make_accelerator(DTYPES[recipe.model.dtype])
    share_cpu_threads()
    folder = folder or recipe.run_folder
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        recipe.dump(folder / "recipe.yaml")
        print(f"[aha] run folder {folder}\n[aha] batch plan on {plan.world_size} process(es)\n{plan}", flush=True)
    else:
        logging.getLogger().setLevel(logging.ERROR)
    return Session(recipe, folder, accelerator, load_tokenizer(recipe.model))


def _lock(folder: Path) -> None:
    """Hold the run folder for as long as this process lives. ValueError if another run holds it."""
    handle = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run; choose another output_dir or name, or end it") from None
    _LOCKS.append(handle)


def make_scorer(recipe: Recipe) -> RewardScorer:
    """The recipe's reward functions. ValueError for unknown names, parameters or weights."""
    rewards = recipe.rewards
    return RewardScorer(
        rewards.reward_funcs, rewards.reward_weights, on_error=rewards.on_error, task_column=rewards.task_column
    )


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
        policy = init_any(_config_values(model, tokenizer), seed=seed, dtype=dtype, device=device)
    policy.gradient_checkpointing = model.gradient_checkpointing
    known = int(policy.config.vocab_size)
    if len(tokenizer) > known:
        raise ValueError(f"model: the tokenizer has {len(tokenizer)} tokens, the policy's vocab_size is {known}")
    return policy


def _config_values(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from rl.policy.weights import read_config

    if isinstance(model.from_config, str):
        path = Path(model.from_config)
        values = read_config(path if path.is_dir() else path.parent)
    else:
        assert model.from_config is not None
        values = dict(model.from_config)
    values.setdefault("vocab_size", len(tokenizer))
    values.setdefault("eos_token_id", tokenizer.eos_token_id)
    values.setdefault("pad_token_id", tokenizer.pad_token_id)
    return values


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
