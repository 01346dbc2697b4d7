"""The learner: micro-batches and a loss -> one optimizer step. The only importer of accelerate and deepspeed.

It alone knows the world size, accumulation, ZeRO and gradient clipping. Losses arrive as sums over tokens together with
one divisor that counts every row of the optimizer step on every rank, so the step is the same however rows are split
into micro-batches and ranks:

    gradient = d/dw  (sum over ranks and micro-batches of loss_sum) / divisor

DDP and DeepSpeed average gradients over ranks, hence each micro-batch's loss is multiplied by the world size;
DeepSpeed's own division by accumulation steps is switched off (`scale_wrt_gas=False`) because their number differs from
step to step. Ranks may hold different numbers of micro-batches: those that run out compute idle ones (exactly zero
gradient).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config

from rl.config import OptimizerSection
from rl.distributed import max_over_ranks, sum_over_ranks, world_size
from rl.grpo.logprobs import suggest_chunk_tokens, token_logprobs
from rl.policy.hf import HFPolicy
from rl.policy.model import Policy, full_dim
from rl.train.batching import MicroBatch, idle_micro_batch
from rl.train.reference import ReferenceWeights
from rl.train.schedule import learning_rate_at


class Scored(NamedTuple):
    """What the policy says about one micro-batch. logprobs, entropy: (n, T) float32, zeros where there is no token.
    routes: (S, Lm, K) the experts used, None for a policy without experts."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    routes: torch.Tensor | None


TrainablePolicy = Policy | HFPolicy
LossFunction = Callable[[Scored, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(slots=True)
class StepResult:
    """One optimizer step, the same on every rank. loss: the total over all ranks, after division. grad_norm: before
    clipping. skipped: the loss or the gradient was not finite on some rank, and the weights did not move on any. sums:
    the loss function's metric sums over all ranks."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    sums: dict[str, float] = field(default_factory=dict)


class PolicyScorer(nn.Module):
    """The trained module: a policy and the scoring of its completion tokens, in one forward so that ZeRO-3's hooks see
    it all."""

    policy: TrainablePolicy

    def __init__(self, policy: TrainablePolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, batch: MicroBatch, temperature: float, chunk_tokens: int, num_chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        output = self.policy(batch.tokens, batch.cu_seqlens, batch.max_seqlen, routes=batch.routes)
        hidden = output.hidden.index_select(0, batch.predict)
        logprobs, entropy = token_logprobs(
            hidden,
            self.policy.lm_head,
            batch.targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            num_chunks=num_chunks,
        )
        return logprobs, entropy, output.routes


def make_accelerator(dtype: torch.dtype) -> Accelerator:
    """The accelerator of this process, as `accelerate launch` described it; mixed precision follows the recipe's dtype.

    Raises ValueError when bfloat16 weights would be trained without fp32 master weights (that needs DeepSpeed, ZeRO >=
    1)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls functions that torch has renamed; its users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if dtype == torch.bfloat16 and not wants_deepspeed:
        raise ValueError(
            "model.dtype: bfloat16 keeps fp32 master weights in DeepSpeed; launch with "
            "--config_file recipes/accelerate_configs/zero1.yaml (zero2, zero3), or set model.dtype: float32"
        )
    handlers = []
    if wants_deepspeed or world_size() > 1:
        # On CPU, accelerate would let DeepSpeed look for CCL. Ranks wait for the slowest rollout, hence the long
        # timeout.
        backend = None if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=2)))
    accelerator = Accelerator(
        # without cpu=True accelerate leaves several CPU processes unwrapped, each training on its own
        cpu=not (torch.cuda.is_available() or wants_deepspeed),
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        kwargs_handlers=handlers,
    )
    if wants_deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(f"DeepSpeed was asked for but accelerate chose {accelerator.distributed_type}")
    stage = zero_stage(accelerator)
    if dtype == torch.bfloat16 and stage == 0:
        raise ValueError("model.dtype: bfloat16 needs ZeRO stage 1, 2 or 3 (the launch config asks for stage 0)")
    if stage == 3 and not accelerator.state.deepspeed_plugin.zero3_init_flag:
        # accelerate announces ZeRO-3 to transformers whatever the flag says, and transformers would split weights while
        # it makes a model, drawing random ones in another order than at every other stage.
        unset_hf_deepspeed_config()
    return accelerator


def zero_stage(accelerator: Accelerator) -> int | None:
    """0 to 3 under DeepSpeed, None without it."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


class Learner:
    """Trains `policy` in place.

    After construction `policy`'s parameters are what the optimizer updates; under ZeRO-3 they are partitioned, so look
    at them only inside `gathered()`. chunk_tokens: completion tokens that go through the output head at a time.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        optimizer: OptimizerSection,
        *,
        accelerator: Accelerator,
        total_steps: int,
        with_reference: bool = False,
        zero3_leaf_classes: Sequence[type] = (),
    ) -> None:
        self.policy = policy
        self.section = optimizer
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.stage = zero_stage(accelerator)
        self.chunk_tokens = suggest_chunk_tokens(int(policy.config.vocab_size))
        self.device = accelerator.device
        adam = torch.optim.AdamW(
            _decay_groups(policy, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
            fused=None if self.stage is not None else True,
        )
        self.module, self.optimizer = self._prepare(PolicyScorer(policy), adam, zero3_leaf_classes)
        self.reference = ReferenceWeights(policy) if with_reference else None

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def pads_rows(self) -> bool:
        """Whether the policy computes on a padded grid, as models of transformers do: `pack_rows` must know."""
        return isinstance(self.policy, HFPolicy)

    def _prepare(self, scorer: PolicyScorer, adam: torch.optim.Optimizer, leaves: Sequence[type]) -> tuple[Any, Any]:
        if self.stage is None:
            return self.accelerator.prepare(scorer, adam)
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1  # no dataloader to read it from; rows are packed by tokens
        config["gradient_accumulation_steps"] = 1  # the boundary is set by hand
        config["steps_per_print"] = float("inf")
        if self.accelerator.mixed_precision == "bf16":
            # Sums of many micro-batches lose their small terms in bf16.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            if self.stage == 1:  # else it rounds those sums to bf16 for its all-reduce, on one rank too
                config["communication_data_type"] = "fp32"
        # Stage 0 in fp32 clips without telling the norm and has no guard against NaN: `_finish_step` does both itself.
        config["gradient_clipping"] = 0.0 if self.stage == 0 else float(self.section.max_grad_norm or 0.0)
        if self.stage == 3 and leaves:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(scorer, list(leaves))
        return self.accelerator.prepare(scorer, adam)

    def step(
        self,
        batches: Sequence[MicroBatch],
        loss_function: LossFunction,
        *,
        divisor: float,
        step: int,
        temperature: float = 1.0,
        spare: MicroBatch | None = None,
    ) -> StepResult:
        """One optimizer step over `batches`, this rank's part of it.

        loss_function(scored, batch) -> (sum of the loss over the batch's tokens, metric sums), the same names on every
        rank. divisor: of the whole step, over all ranks. step: 0-based, decides the learning rate. spare: any
        micro-batch to idle with; needed where `batches` may be empty on this rank. At the end a non-finite gradient
        leaves the weights alone and says so."""
        rate = learning_rate_at(self.section, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        padded, num_chunks = self._in_step_with_other_ranks(batches, spare)
        totals: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(padded):
            with self._accumulating(last=i == len(padded) - 1):
                moved = batch.to(self.device)
                loss_sum, sums = loss_function(self._score(moved, temperature, num_chunks), moved)
                # 0 * inf = NaN: a loss that is not finite spoils its gradient too, so one guard on all ranks sees both.
                self._backward(loss_sum * (self.world_size / divisor + 0.0 * loss_sum.detach()))
            for name, value in {"loss": loss_sum.detach(), **sums}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        grad_norm, skipped = self._finish_step()
        summed = sum_over_ranks({name: float(total) for name, total in totals.items()}, self.device)
        loss = summed.pop("loss") / divisor
        return StepResult(loss, grad_norm, rate, skipped, summed)

    @torch.no_grad()
    def score(
        self, batches: Sequence[MicroBatch], *, temperature: float, spare: MicroBatch | None = None
    ) -> list[Scored]:
        """What the current weights say about each of this rank's `batches`. spare: as in `step`."""
        self.module.train()
        padded, num_chunks = self._in_step_with_other_ranks(batches, spare)
        results = [self._score(batch.to(self.device), temperature, num_chunks) for batch in padded]
        return results[: len(batches)]

    @torch.no_grad()
    def reference_logprobs(self, batches: Sequence[MicroBatch], *, temperature: float) -> list[torch.Tensor]:
        """(n, T) logprobs of each batch under the frozen reference. Its own router chooses: with the experts that the
        policy's chose it would be another policy, which follows wherever that router goes. (So `kl` in bfloat16 starts
        near `mismatch_kl_without_replay`, not at 0.)"""
        assert self.reference is not None, "the learner was made without a reference"
        free = [replace(batch, routes=None) for batch in batches]
        with self.reference.swapped_in():
            return [scored.logprobs for scored in self.score(free, temperature=temperature)]

    def _score(self, batch: MicroBatch, temperature: float, num_chunks: int) -> Scored:
        logprobs, entropy, routes = self.module(batch, temperature, self.chunk_tokens, num_chunks)
        return Scored(batch.padded(logprobs), batch.padded(entropy), routes)

    def _in_step_with_other_ranks(
        self, batches: Sequence[MicroBatch], spare: MicroBatch | None = None
    ) -> tuple[list[MicroBatch], int]:
        """Every rank must run equally many forwards and equally many chunks of the head: pad with idle
        micro-batches."""
        chunks = max((math.ceil(len(b.targets) / self.chunk_tokens) for b in batches), default=1)
        count, chunks = max_over_ranks([len(batches), chunks], self.device)
        template = batches[0] if batches else spare
        assert template is not None, "a rank without rows needs a spare micro-batch to idle with"
        return [*batches, *(idle_micro_batch(template) for _ in range(count - len(batches)))], chunks

    @contextmanager
    def _accumulating(self, *, last: bool) -> Iterator[None]:
        if self.stage is not None:
            self.module.set_gradient_accumulation_boundary(last)
            yield
        else:
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                yield

    def _backward(self, loss: torch.Tensor) -> None:
        if self.stage is not None:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def _finish_step(self) -> tuple[float, bool]:
        """Clip, guard against non-finite gradients, update. Returns the gradient norm before clipping and whether it
        was skipped."""
        if self.stage is None or self.stage == 0:
            limit = self.section.max_grad_norm or float("inf")
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
            finite = math.isfinite(norm)
            if finite:
                (self.optimizer if self.stage is None else self.module).step()
            self.module.zero_grad()
            return norm, not finite
        self.module.step()
        norm = self.module.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        skipped = bool(getattr(self.module.optimizer, "overflow", False)) or not math.isfinite(norm) or norm < 0
        if skipped and self.stage in (1, 2):
            # With the optimizer offloaded DeepSpeed keeps the sums of a skipped step, and would skip every later one.
            # (Its optimizer for bfloat16 at stage 1 keeps none.)
            gradients = getattr(self.module.optimizer, "averaged_gradients", {})
            gradients.update(dict.fromkeys(gradients))
        return norm, skipped

    @contextmanager
    def gathered(self) -> Iterator[TrainablePolicy]:
        """The policy with all its parameters in place, for rollouts and exports; collective under ZeRO-3 only on entry,
        so ranks may leave at different times. Under ZeRO-3 the training hooks are taken off meanwhile: they would free
        weights after each use."""
        if self.stage != 3:
            yield self.policy
            return
        import deepspeed

        offload = self.module.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.policy.parameters())):
            parameters: list[Any] = list(self.policy.parameters())
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            # Not removed for good: DeepSpeed would register them with `_register_deepspeed_module`, which throws away
            # the order of modules that it has traced, and with it prefetching in the next update.
            hooks = [(h.hooks_dict_ref(), h.id) for h in (*offload.forward_hooks, *offload.backward_hooks)]
            taken = [(registered, key, registered.pop(key)) for registered, key in hooks]
            try:
                yield self.policy
            finally:
                for registered, key, hook in taken:
                    registered[key] = hook

    def save_state(self, folder: str) -> None:
        """Weights, optimizer and reference of this run into `folder`; every rank writes its part."""
        if self.stage is not None:
            self.module.save_checkpoint(folder, tag="deepspeed", save_latest=False)
        elif self.rank == 0:
            torch.save(
                {
                    "module": self.accelerator.unwrap_model(self.module).state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                os.path.join(folder, "learner.pt"),
            )
        if self.reference is not None and (self.stage == 3 or self.rank == 0):
            self.reference.save(self._reference_file(folder))

    def load_state(self, folder: str) -> None:
        """Continue from `save_state`, on the same number of ranks and the same ZeRO stage."""
        if self.stage is not None:
            path, _ = self.module.load_checkpoint(folder, tag="deepspeed", load_lr_scheduler_states=False)
            if path is None:
                raise ValueError(
                    f"{folder} holds no DeepSpeed state for {self.world_size} ranks at ZeRO stage {self.stage}"
                )
        else:
            state = torch.load(os.path.join(folder, "learner.pt"), map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.module).load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load(self._reference_file(folder))

    def _reference_file(self, folder: str) -> str:
        """One for all ranks, which hold the same; under ZeRO-3 one for each rank's shards."""
        return os.path.join(folder, f"reference.{self.rank if self.stage == 3 else 0}.safetensors")


def _decay_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; norms are left alone."""
    matrices = [p for p in policy.parameters() if p.requires_grad and full_dim(p) >= 2]
    vectors = [p for p in policy.parameters() if p.requires_grad and full_dim(p) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
