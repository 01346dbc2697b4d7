"""Decode on a GPU: the Triton decode step captured in CUDA graphs, one for each size of a ladder of batches.

In: the policy, the rollout's cache and row state. `advance(steps)` replays the graph of the smallest rung that holds
the live rows; sampling, log-probabilities, stop tokens and length limits are part of it, so the host neither waits
nor looks between steps. Rows beyond the live ones, and rows that have ended, stand still: they join no expert's list
and read no cache of their own. What a graph reads from the host's side (who shares a prompt) is a device table that
`regroup` rewrites.

Capturing a graph takes 10 to 40 ms. Cache and state are given back after a rollout; with an `Arena` the next one finds
its tensors at the same addresses and replays the graphs that are there. Kernels are compiled before the first capture
of a size by a step in which every row stands still.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from rl.rollout.arena import Arena, Zeros
from rl.rollout.cache import LatentCache
from rl.rollout.kernels.decoder import FusedDecoder, StepInputs, prompt_tiles
from rl.rollout.kernels.layout import cdiv
from rl.rollout.kernels.prefill import FusedPrefill
from rl.rollout.kernels.rows import Rows, begin, finish
from rl.rollout.kernels.sampling import draw, race
from rl.rollout.sampling import Sampler
from rl.rollout.state import RowState
from rl.rollout.transfer import to_device

_log = logging.getLogger(__name__)
_MOST_KINDS = 4  # kinds of rollouts whose graphs are kept: training, evaluation, and what they were before


class GraphKeeper:
    """What outlives a rollout: the addresses of its tensors (`arena`; None where the driver cannot keep them), graphs
    by all that is fixed in them, the memory pool that they draw their few temporaries from (an empty graph holds it, so
    that rollout after rollout uses the same bytes), and the sizes whose kernels are compiled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warmed: set[Hashable] = set()
        self.arena: Arena | None = None
        try:
            self.arena = Arena(device)
        except RuntimeError as error:
            _log.warning("CUDA graphs are captured anew in each rollout: %s", error)
        self._graphs: dict[Hashable, dict[tuple[int, int], torch.cuda.CUDAGraph]] = {}
        self.stream = torch.cuda.Stream(device)  # one for all captures: the allocator's free blocks belong to a stream
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), capturing(self._anchor):
            self._held = torch.zeros(1, device=device)
        self.pool = self._anchor.pool()

    def graphs_for(self, policy: Any, sampler: Sampler) -> dict[tuple[int, int], torch.cuda.CUDAGraph]:
        """By rows and prompt tiles; for a rollout all of whose tensors are made. Truncated sampling sorts a row of the
        vocabulary for each sequence, gigabytes that must not stay: its graphs go with the rollout."""
        if self.arena is None or sampler.truncates:
            return {}
        weights = tuple(tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers()))
        key = (self.arena.layout, weights)
        graphs = self._graphs.pop(key, {})
        self._graphs[key] = graphs  # last: the one used most recently
        while len(self._graphs) > _MOST_KINDS:
            del self._graphs[next(iter(self._graphs))]
        return graphs


class CudaStepper:
    """keeper: see there. zeros: where memory comes from, as for cache and state, which are made before it. one_size:
    every step has as many rows as the state, however few are live. `capture_s`, `warm_s`: time spent so far on
    capturing and on compiling."""

    name = "triton"

    def __init__(
        self,
        policy: Any,
        cache: LatentCache,
        state: RowState,
        sampler: Sampler,
        *,
        positions: int,
        keeper: GraphKeeper,
        zeros: Zeros,
        one_size: bool = False,
    ) -> None:
        self.cache, self.state, self.sampler = cache, state, sampler
        self.decoder = FusedDecoder(policy, max_rows=state.slots, positions=positions, zeros=zeros)
        self.derived_bytes, self.build_s = self.decoder.derived_bytes, self.decoder.build_s
        self.capture_s = self.warm_s = 0.0
        self._keeper, self._one_size = keeper, one_size
        self._how = zeros((2,), torch.float32).copy_(to_device(sampling_switches(sampler), state.device, torch.float32))
        self._rows = Rows(
            token=state.token,
            own_len=state.own_len,
            prompt_slot=state.prompt_slot,
            prompt_len=state.prompt_len,
            seed=state.seed,
            done=state.done,
            out_tokens=state.out_tokens,
            out_logprobs=state.out_logprobs,
            stops=state.stops,
            row_limit=state.row_limit,
        )
        self._slots = torch.arange(state.slots, out=zeros((state.slots,), torch.int32))
        self._indices = zeros((5, state.slots), torch.int32)
        self._tiles = zeros((state.slots, self.decoder.rows_per_tile), torch.int32).fill_(-1)
        self._graphs = keeper.graphs_for(policy, sampler)
        self._pool = torch.cuda.graph_pool_handle() if sampler.truncates else keeper.pool
        self._size = 0, 0  # rows and prompt tiles of the next steps

    def column_order(self) -> None:
        """The kernels keep the policy's own order of cache columns."""

    def lean_prefill(self, routes_dtype: torch.dtype) -> FusedPrefill:
        return FusedPrefill(self.decoder, routes_dtype=routes_dtype)

    def draw(
        self, sampler: Sampler, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (n, V), seeds and steps (n,) int64 -> token (n,) int64, logprob (n,) float32."""
        if sampler.truncates:
            return sampler(logits, seeds, steps)
        return draw(logits, seeds, steps, self._how)

    def regroup(self, prompt_slots: Sequence[int], prompt_lens: Sequence[int]) -> None:
        """Row r reads prompt slot prompt_slots[r] from now on; rows beyond stand still."""
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(prompt_slots):
            members.setdefault(slot, []).append(row)
        per_tile = self.decoder.rows_per_tile
        rows = self.state.slots if self._one_size else batch_rung(len(prompt_slots), self.state.slots)
        tiles = rows  # splits follow the number of tiles, and rounding follows the splits
        if not self._one_size:
            tiles = tile_rung(sum(cdiv(len(group), per_tile) for group in members.values()), rows, per_tile)
        table = prompt_tiles(list(members.values()), per_tile, tiles)
        self._tiles[:tiles].copy_(to_device(table, self.state.device, torch.int32))
        self._size = rows, tiles

    def extra_stats(self) -> dict[str, float | int]:
        return {"capture_s": self.capture_s, "warm_s": self.warm_s, "graphs": len(self._graphs)}

    def advance(self, steps: int, longest_own: int) -> None:
        """`steps` decode steps of all live rows, queued on the device."""
        graph = self._graphs.get(self._size) or self._capture(self._size)
        for _ in range(steps):
            graph.replay()

    def _capture(self, size: tuple[int, int]) -> torch.cuda.CUDAGraph:
        # What Triton compiles follows these, and a capture is no place to compile in.
        state, cache = self.state, self.cache
        shapes = state.out_tokens.shape, state.stops.shape, cache.own.shape, cache.prompt.shape, cache.own.dtype
        shape = (*size, shapes, self.sampler.truncates)
        if shape not in self._keeper.warmed:
            began = time.perf_counter()
            self._stand_still(*size)
            self._keeper.warmed.add(shape)
            self.warm_s += time.perf_counter() - began
        began = time.perf_counter()
        self._make_room(size[0])
        graph = torch.cuda.CUDAGraph()
        side = self._keeper.stream
        side.wait_stream(torch.cuda.current_stream())
        # torch.cuda.graph() would collect garbage and empty the allocator's cache each time.
        with torch.cuda.stream(side), capturing(graph, self._pool):
            self._step(*size)
        torch.cuda.current_stream().wait_stream(side)
        self._graphs[size] = graph
        self.capture_s += time.perf_counter() - began
        return graph

    def _make_room(self, rows: int) -> None:
        """torch gives back what it holds unused when memory runs out, but not during a capture."""
        sorted_bytes = 40 * rows * self.decoder.config.vocab_size if self.sampler.truncates else 0
        if torch.cuda.mem_get_info(self.state.device)[0] < 2**30 + sorted_bytes:
            torch.cuda.empty_cache()

    def _stand_still(self, size: int, tiles: int) -> None:
        """A step that changes nothing, so that every kernel is compiled and loaded."""
        token, done = self.state.token.clone(), self.state.done.clone()
        self.state.done.fill_(True)
        self._step(size, tiles)
        self.state.token.copy_(token)
        self.state.done.copy_(done)
        torch.cuda.synchronize()

    def _step(self, size: int, tiles: int) -> None:
        state = self.state
        positions, places, own_lengths, prompt_slots, prompt_lengths = begin(
            self._rows, self._indices, self.decoder.counts, size
        )
        inputs = StepInputs(
            tokens=state.token[:size],
            positions=positions,
            slots=self._slots[:size],
            places=places,
            own_lengths=own_lengths,
            prompt_slots=prompt_slots,
            prompt_lengths=prompt_lengths,
            tiles=self._tiles[:tiles],
        )
        logits = self.decoder(inputs, self.cache.own, self.cache.prompt, state.out_routes)  # type: ignore[arg-type]
        seeds = state.seed[:size]
        if self.sampler.truncates:
            steps = state.own_len[:size] + 1
            state.record(state.rows[:size], *self.sampler(logits, seeds, steps))
        else:
            finish(self._rows, *race(logits, seeds, state.own_len, self._how, step_offset=1))


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """What the current stream gets goes into `graph`. A capture that is not ended would stop the allocator for good."""
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the capture's own complaint; what went wrong is on its way already
            graph.capture_end()
        raise
    graph.capture_end()


def sampling_switches(sampler: Sampler) -> torch.Tensor:
    """[1 / temperature, noise on or off], what the sampling kernel reads."""
    return torch.tensor([1.0, 0.0] if sampler.greedy else [1.0 / sampler.temperature, 1.0], dtype=torch.float32)


def batch_rung(rows: int, most: int) -> int:
    """The ladder of captured batch sizes: 1, 2, 4, 8, then steps of a quarter of the power of two below (10, 12, 14,
    16, 20, ...), so that padding costs at most a fifth; never above `most`."""
    if rows <= 8:
        rung = 1 << max(rows - 1, 0).bit_length()
    else:
        step = (1 << (rows - 1).bit_length()) // 8
        rung = -(-rows // step) * step
    return min(rung, most)


def tile_rung(tiles: int, rows: int, per_tile: int) -> int:
    """As many prompt tiles as full ones would be, as half-empty ones, or as there are rows: a tile without rows costs a
    program's start, and one of 230 KB keeps a multiprocessor to itself."""
    return next(most for most in (cdiv(rows, per_tile), cdiv(rows, 2), rows) if tiles <= most)
