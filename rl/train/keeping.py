"""What a run keeps: checkpoints to resume from, and the final policy.

A checkpoint holds the learner (weights, optimizer, reference), the router biases, the resolved recipe, the tracker's
run id, and a small JSON state. No random state: every draw is derived from the seed and the step
(rl.distributed.derive_seed), and data order is a function of the step.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rl.distributed import barrier, gather_objects, is_main_process, world_size
from rl.policy.hf import save_any
from rl.train.checkpoint import (
    CheckpointStore,
    FoundCheckpoint,
    load_json,
    load_tensors,
    replace_folder,
    save_json,
    save_tensors,
    sync_tree,
)
from rl.train.learner import Learner, StepResult
from rl.train.metrics import RUN_ID_FILE
from rl.train.record import to_json
from rl.train.run_folder import CHECKPOINTS, RECIPE_FILE, STATE_FILE


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite and the recipe says to stop. The weights are those before
    that optimizer step."""


class Keeper:
    """Checkpoints of one run, written and read by all ranks together.

    data: `rl.data.fingerprint` of what is trained on. elapsed_s: training seconds before this process started. extra:
    what the trainer stored beside the step."""

    def __init__(self, folder: Path, learner: Learner, *, keep: int | None, data: str) -> None:
        self.folder = folder
        self.learner = learner
        self.data = data
        self.elapsed_s = 0.0
        self.extra: dict[str, Any] = {}
        self.store = CheckpointStore(
            folder / CHECKPOINTS, keep=keep, is_writer=is_main_process(), agree=lambda mine: all(gather_objects(mine))
        )

    def restore(self, found: FoundCheckpoint | None) -> int:
        """Take up the state of the checkpoint that `claim_folder` found on rank 0; returns the step to go on with, 0
        without one. What other ranks pass does not matter."""
        [found] = _from_rank_zero([found])
        if found is None:
            return 0
        state = load_json(found.path / STATE_FILE)
        self.learner.load_state(str(found.path))
        _load_buffers(self.learner, load_tensors(found.path / "buffers.safetensors"))
        self.elapsed_s = float(state["elapsed_s"])
        self.extra = dict(state["extra"])
        if is_main_process():
            if (found.path / RUN_ID_FILE).exists():  # whatever became of the folder's: the tracker's run goes on
                shutil.copy(found.path / RUN_ID_FILE, self.folder / RUN_ID_FILE)
            print(f"[aha] resumed from {found.path}", flush=True)
        return int(found.step)

    def save_if_due(
        self, step: int, every: int, *, total: int, elapsed_s: float, extra: dict[str, Any] | None = None
    ) -> None:
        """Write the checkpoint of `step` (steps done) when the recipe says so; always after the last."""
        if (every and step % every == 0) or step == total:
            self.save(step, elapsed_s=elapsed_s, extra=extra)

    def save(self, step: int, *, elapsed_s: float, extra: dict[str, Any] | None = None) -> None:
        with self.store.writing(step) as folder:
            self.learner.save_state(str(folder))
            if is_main_process():
                save_tensors(folder / "buffers.safetensors", _buffers(self.learner))
                state = {
                    "step": step,
                    "elapsed_s": elapsed_s,
                    "world_size": world_size(),
                    "zero_stage": self.learner.stage,
                    "data": self.data,
                    "extra": to_json(extra or {}),  # a counter of a user's function may be NaN
                }
                save_json(folder / STATE_FILE, state)
                for name in (RECIPE_FILE, RUN_ID_FILE):
                    if (self.folder / name).exists():
                        shutil.copy(self.folder / name, folder / name)


def check_finite(result: StepResult, *, step: int, on_nonfinite: Literal["stop", "skip"]) -> None:
    """Stop the run, or say that an optimizer step was skipped, when its loss or gradient was not finite. step: of the
    run, counted as the log does, from 1."""
    if not result.skipped and math.isfinite(result.loss):
        return
    message = (
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, "
        "this optimizer step did not change the weights"
    )
    if on_nonfinite == "stop":
        raise NonFiniteError(f"{message} (optimizer.on_nonfinite: skip would go on)")
    if is_main_process():
        print(f"[aha] {message}; skipped", file=sys.stderr, flush=True)


def save_final_policy(
    learner: Learner, folder: Path, tokenizer: PreTrainedTokenizerBase, *, summary: dict[str, Any] | None = None
) -> None:
    """The policy in the hub's layout, which transformers and vLLM open; whole or not at all: a policy that is there
    already stays until the new one is on the disk. `summary` goes beside the folder."""
    temporary = folder.with_name(folder.name + ".writing")
    with learner.gathered() as policy:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            save_any(policy, temporary, tokenizer=tokenizer)
            sync_tree(temporary)
            replace_folder(temporary, folder)
            if summary is not None:
                save_json(folder.parent / "summary.json", summary)
    barrier()


def _buffers(learner: Learner) -> dict[str, torch.Tensor]:
    """Persistent buffers (the routers' selection biases), which ZeRO's own files do not all keep."""
    persistent = learner.policy.state_dict().keys()
    return {name: b.detach().cpu().clone() for name, b in learner.policy.named_buffers() if name in persistent}


def _load_buffers(learner: Learner, saved: dict[str, torch.Tensor]) -> None:
    buffers = dict(learner.policy.named_buffers())
    for name, value in saved.items():
        buffers[name].copy_(value)


def _from_rank_zero(objects: list[Any]) -> list[Any]:
    if world_size() > 1:
        dist.broadcast_object_list(objects, src=0)
    return objects
