"""The in-process engine: samples groups of completions from the trainer's own policy module.

In: requests (a prompt and one seed per completion) and `SamplingParams`. Out: `RolloutGroup`s with tokens, the
log-probability of each under the distribution it was drawn from, and the experts it went through. Each group's prompt
is prefilled once; decode uses absorbed MLA over a cache of latents; rows that end leave the batch, waiting ones take
their place.

A completion depends on the weights, its prompt and its seed: noise is a function of (seed, step, token id), and no
row reads another. What remains is rounding: where a matmul's bits depend on the other rows, log-probabilities move by
about 1e-6 and a token changes only if two candidates tie that closely. `batch_invariant=True` removes that too
(bit-equal results for any batch; prompts are then prefilled one at a time). On a CPU, MKL must be told to keep to one
kernel: start Python with MKL_CBWR=AUTO,STRICT (needed on a Sapphire Rapids, not on every AVX-512 processor). On a GPU
products and splits follow the number of rows, so every step runs with the same number, `max_batch_size` or else 256,
most of them standing still where few are asked for.

    engine = Engine(policy, cache_bytes=2**30)
    groups = engine.generate([RolloutRequest(problem, seeds=(1, 2))], SamplingParams(64, stop_token_ids=(2,)))
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rl.rollout.arena import torch_zeros
from rl.rollout.kernels import unsupported
from rl.rollout.rollout import Rollout
from rl.types import RolloutGroup, RolloutRequest, SamplingParams

_log = logging.getLogger(__name__)

OnGroup = Callable[[int, RolloutGroup], None]


class Engine:
    """Implements `rl.types.RolloutEngine` for `rl.policy.model.Policy`.

    max_batch_size: most rows decoded at once (None: as many as fit). cache_bytes: budget of the latent cache and the
    row outputs (None: a share of the free memory). decode_text: token ids -> text, needed for stop strings.
    prefill_tokens: most prompt tokens in one forward (None: 8,192, on a GPU 32,768). steps_per_look: decode steps
    between two looks of the host at which rows have ended (None: 1; where steps are captured in CUDA graphs, 2 to 8).
    look_behind: queue those steps before reading the look that precedes them, so that the device decodes while the host
    takes rows out and prefills prompts; ended rows stay that much longer (None: where steps are captured).
    batch_invariant: see the top of this file. `stats` describes the last `generate`."""

    def __init__(
        self,
        policy: Any,
        *,
        max_batch_size: int | None = None,
        cache_bytes: int | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
        prefill_tokens: int | None = None,
        steps_per_look: int | None = None,
        look_behind: bool | None = None,
        batch_invariant: bool = False,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("cache_bytes", cache_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} = {value}: must be at least 1, or null for as much as fits")
        self.policy = policy
        captured = self.plain_because is None
        if not captured and policy.lm_head.weight.device.type != "cpu":
            _log.warning("decode goes without kernels and CUDA graphs, which is slower: %s", self.plain_because)
        on_mkl = policy.lm_head.weight.device.type == "cpu" and torch.backends.mkl.is_available()
        if batch_invariant and on_mkl and "STRICT" not in os.environ.get("MKL_CBWR", ""):
            _log.warning("batch_invariant: MKL may not keep to one kernel; set MKL_CBWR=AUTO,STRICT before the start")
        if steps_per_look is None:
            steps_per_look = _steps_per_look(policy) if captured else 1
        if prefill_tokens is None:
            prefill_tokens = 32768 if policy.lm_head.weight.is_cuda else 8192
        for name, value in (("prefill_tokens", prefill_tokens), ("steps_per_look", steps_per_look)):
            if value < 1:
                raise ValueError(f"rollout.{name} = {value}: must be at least 1")
        self.max_batch_size, self.cache_bytes = max_batch_size, cache_bytes
        self.decode_text = decode_text
        self.prefill_tokens, self.steps_per_look = prefill_tokens, steps_per_look
        self.look_behind = captured if look_behind is None else look_behind
        self.batch_invariant = batch_invariant
        # For measurements with lengths drawn beforehand: (request, k) -> most tokens, at most max_completion_length.
        self.limit_of: Callable[[int, int], int] | None = None
        self.stats: dict[str, Any] = {}
        self._keeper: Any = None
        self.longest_prompt = 0  # tokens, of any rollout so far

    @property
    def plain_because(self) -> str | None:
        """Why steps go without kernels and CUDA graphs; None: they go with them."""
        return unsupported(self.policy)

    def graph_keeper(self) -> Any:
        """What CUDA graphs of several rollouts share (`rl.rollout.cuda.GraphKeeper`), made at first use."""
        device = self.policy.lm_head.weight.device
        if self._keeper is None or self._keeper.device != device:
            from rl.rollout.cuda import GraphKeeper

            self._keeper = GraphKeeper(device)
        return self._keeper

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """One group per request, in their order; `on_group(index, group)` as soon as a group is complete.

        Leaves the policy's mode, its gradients and torch's generators untouched. ValueError: a request without seeds or
        prompt tokens, parameters out of range, stop strings without `decode_text`, a cache budget below one row.
        """
        check_requests(requests, params)
        if not requests:
            return []
        began = time.perf_counter()
        device = self.policy.lm_head.weight.device
        with _current(device):
            arena = None if self.plain_because else self.graph_keeper().arena
            with arena or contextlib.nullcontext():
                zeros = torch_zeros(device) if arena is None else arena.zeros
                rollout = Rollout(self, requests, params, on_group, zeros)
                groups = rollout.run()
                stats = rollout.stats() | {"arena_bytes": 0 if arena is None else arena.bytes}
        seconds = time.perf_counter() - began  # with taking and giving back memory
        self.stats = stats | {"seconds": seconds, "tokens_per_s": stats["tokens"] / seconds}
        return groups


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current GPU. What fails waits for all streams: their memory is free from then on."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a broken device, whose own error is on its way already
                torch.cuda.synchronize(device)
            raise


def _steps_per_look(policy: Any) -> int:
    """So many that a GPU takes some milliseconds for them, the host's time to take rows out and start others; more
    would leave ended rows standing. By the policy's size, not by the clock: batches must be the same in every run.
    Under ZeRO-3 a parameter is empty here and `ds_numel` is its size."""
    weight_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in policy.parameters())
    return max(2, min(8, 2**34 // max(weight_bytes, 1)))


def check_requests(requests: Sequence[RolloutRequest], params: SamplingParams) -> None:
    """ValueError naming what no engine can sample."""
    if params.max_completion_length < 0:
        raise ValueError(f"SamplingParams.max_completion_length = {params.max_completion_length}: must be >= 0")
    for request in requests:
        if not request.seeds:
            raise ValueError(f"request for problem {request.problem.id!r} has no seeds: one per completion is needed")
        if not request.problem.prompt_ids:
            raise ValueError(f"problem {request.problem.id!r} has an empty prompt: at least one token is needed")
