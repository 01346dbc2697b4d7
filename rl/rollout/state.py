"""What a rollout knows about each of its rows, in device tensors of fixed size that decode steps read and write in
place.

Row r of the batch is slot r of every tensor. A finished row stays until the host looks: its length stands still and
what it writes lands in a spare position behind its end. Outputs are kept per slot too and read out when the row has
ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl.rollout.arena import Zeros
from rl.rollout.cache import LENGTH_MULTIPLE, LatentCache
from rl.rollout.ops import AttentionPlan
from rl.rollout.transfer import Mark, to_device, to_host


@dataclass(frozen=True, slots=True)
class RowSpec:
    """A row to start: its slot, its prompt's slot and length in tokens, its 64-bit seed (signed), and the most tokens
    it may sample."""

    slot: int
    prompt_slot: int
    prompt_len: int
    seed: int
    limit: int


@dataclass(slots=True)
class FinishedRow:
    """What one row produced, on the host. routes: (T - 1, Lm, K) or None."""

    tokens: list[int]
    logprobs: torch.Tensor
    routes: torch.Tensor | None


class RowState:
    """slots: capacity. limit: most tokens any row may sample. routes_shape: (Lm, K) or None for a policy without
    experts. zeros: where the memory comes from."""

    def __init__(
        self,
        slots: int,
        *,
        limit: int,
        stop_token_ids: tuple[int, ...],
        routes_shape: tuple[int, int] | None,
        routes_dtype: torch.dtype,
        zeros: Zeros,
    ) -> None:
        def integers() -> torch.Tensor:
            return zeros((slots,), torch.int64)

        self.slots, self.limit = slots, limit
        self.rows = torch.arange(slots, out=integers())
        self.device = self.rows.device
        self.token = integers()  # last sampled, not yet fed
        self.own_len = integers()  # tokens fed so far: the row has sampled one more
        self.prompt_slot, self.prompt_len, self.seed, self.row_limit = (integers() for _ in range(4))
        self.done = zeros((slots,), torch.bool).fill_(True)
        self.stops = zeros((len(stop_token_ids),), torch.int64)
        self.stops.copy_(to_device(stop_token_ids, self.device, torch.int64))
        # One position more than a row can fill, for what finished rows write.
        self.out_tokens = zeros((slots, limit + 1), torch.int64)
        self.out_logprobs = zeros((slots, limit + 1), torch.float32)
        self.out_routes: torch.Tensor | None = None
        if routes_shape is not None:
            self.out_routes = zeros((slots, limit, *routes_shape), routes_dtype)

    @staticmethod
    def row_bytes(limit: int, routes_shape: tuple[int, int] | None, routes_dtype: torch.dtype) -> int:
        routes = 0 if routes_shape is None else routes_shape[0] * routes_shape[1] * routes_dtype.itemsize
        return (limit + 1) * 12 + limit * routes + 49

    def start(self, specs: list[RowSpec]) -> torch.Tensor:
        """Reset the slots of new rows -> their slots (n,). Their first token is then given by `record`."""
        table = [(s.slot, s.prompt_slot, s.prompt_len, s.seed, s.limit) for s in specs]
        slots, *columns = to_device(table, self.device, torch.int64).t().contiguous()
        for tensor, column in zip((self.prompt_slot, self.prompt_len, self.seed, self.row_limit), columns, strict=True):
            tensor[slots] = column
        # Filled, not assigned by index: that would copy the number from the host, and wait for all that is queued.
        self.own_len.index_fill_(0, slots, -1)  # `record` counts it up to 0: one token sampled, none fed
        self.done.index_fill_(0, slots, False)
        return slots

    def record(self, rows: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Take each row's next token (n,): outputs, lengths, and whether the row has now ended."""
        done, own_len = self.done.index_select(0, rows), self.own_len.index_select(0, rows)
        place = rows * (self.limit + 1) + own_len + 1
        self.out_tokens.view(-1).index_copy_(0, place, tokens)
        self.out_logprobs.view(-1).index_copy_(0, place, logprobs)
        own_len = own_len + ~done
        ended = own_len + 1 >= self.row_limit.index_select(0, rows)
        if self.stops.numel() == 1:
            ended = ended | (tokens == self.stops)
        elif self.stops.numel():
            ended = ended | (tokens[:, None] == self.stops).any(-1)
        self.token.index_copy_(0, rows, tokens)
        self.own_len.index_copy_(0, rows, own_len)
        self.done.index_copy_(0, rows, done | ended)

    def move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy rows `source` over rows `target` (disjoint); length: sampled tokens at most."""
        for tensor in (
            self.token,
            self.own_len,
            self.prompt_slot,
            self.prompt_len,
            self.seed,
            self.row_limit,
            self.done,
        ):
            tensor[target] = tensor[source]
        for output in (self.out_tokens, self.out_logprobs, self.out_routes):
            if output is not None:
                output[target, :length] = output[source, :length]

    def read(self, slots: list[int], lengths: list[int]) -> list[FinishedRow]:
        """Outputs of ended rows, one transfer per tensor; waits for what is queued on the current stream."""
        index = to_device(slots, self.device, torch.int64)
        longest = max(lengths, default=0)
        tokens = to_host(self.out_tokens[index, :longest])
        logprobs = to_host(self.out_logprobs[index, :longest])
        routes = None if self.out_routes is None else to_host(self.out_routes[index, : max(longest - 1, 0)])
        Mark(self.device).wait()
        return [
            FinishedRow(
                tokens=tokens[i, :length].tolist(),
                logprobs=logprobs[i, :length].clone(),
                routes=None if routes is None else routes[i, : max(length - 1, 0)].clone(),
            )
            for i, length in enumerate(lengths)
        ]


class Look:
    """What the first `rows` slots look like at this place of the device's queue, to be read later."""

    def __init__(self, state: RowState, rows: int) -> None:
        self._picture = to_host(torch.stack((state.done[:rows], state.own_len[:rows])))
        self._mark = Mark(state.device)

    def read(self) -> tuple[list[int], list[int]]:
        """-> whether each row has ended (0 or 1), and how many tokens of it were fed (it has sampled one more)."""
        self._mark.wait()
        done, fed = self._picture.tolist()
        return done, fed


class PlanBuilder:
    """Builds the `AttentionPlan` of a step from the host's picture of the rows (which prompt slot each row reads)."""

    def __init__(self, state: RowState, cache: LatentCache) -> None:
        self.state, self.cache = state, cache
        self._groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool] | None = None
        self._prompt_mask: torch.Tensor | None = None
        self._rows, self._longest_prompt = 0, 0
        self._positions = torch.arange(cache.shape.own_tokens, device=state.device)

    def regroup(self, prompt_slots: list[int], prompt_lens: list[int]) -> None:
        """Call when rows came, went or moved: row r reads prompt slot prompt_slots[r] of prompt_lens[r] tokens."""
        members: dict[int, list[int]] = {}
        length_of = dict(zip(prompt_slots, prompt_lens, strict=True))
        for row, slot in enumerate(prompt_slots):
            members.setdefault(slot, []).append(row)
        largest = max(len(rows) for rows in members.values())
        order = sorted(members)
        padded = [members[slot] + members[slot][:1] * (largest - len(members[slot])) for slot in order]
        cell = [0] * len(prompt_slots)
        for group, slot in enumerate(order):
            for place, row in enumerate(members[slot]):
                cell[row] = group * largest + place
        regular = order == list(range(len(order))) and cell == list(range(len(order) * largest))
        device = self.state.device
        lengths = torch.tensor([length_of[slot] for slot in order], device=device)
        self._rows = len(prompt_slots)
        self._groups = (
            torch.tensor(order, device=device),
            torch.tensor(padded, device=device),
            torch.tensor(cell, device=device),
            regular,
        )
        self._longest_prompt = _round_up(max(prompt_lens), self.cache.shape.prompt_tokens)
        beyond = torch.arange(self._longest_prompt, device=device) >= lengths[:, None]
        self._prompt_mask = _additive(beyond, self.cache.own.dtype)[:, None]

    def plan(self, longest_own: int, *, masks: bool = True) -> AttentionPlan:
        """For the step that feeds the tokens sampled last; longest_own: own tokens of the longest row, that one
        included; masks: whether to build `own_mask`."""
        assert self._groups is not None
        state, rows = self.state, self._rows
        group_slot, group_rows, cell, regular = self._groups
        longest = _round_up(longest_own, self.cache.shape.own_tokens)
        own_len = state.own_len[:rows] + 1
        own_mask = None
        if masks:
            own_mask = _additive(self._positions[:longest] >= own_len[:, None], self.cache.own.dtype)[:, None]
        return AttentionPlan(
            slot=state.rows[:rows],
            own_len=own_len,
            prompt_slot=state.prompt_slot[:rows],
            prompt_len=state.prompt_len[:rows],
            group_slot=group_slot,
            group_rows=group_rows,
            cell=cell,
            longest_own=longest,
            longest_prompt=self._longest_prompt,
            regular=regular,
            own_mask=own_mask,
            prompt_mask=self._prompt_mask,
        )


def _round_up(length: int, most: int) -> int:
    return min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, most)


def _additive(masked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, float("-inf"))
