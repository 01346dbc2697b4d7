"""Which rows run: waiting completions, the slots they take, and who moves when others end. Pure host logic, no tensors.

A group is admitted row by row in the order of the requests; its prompt holds a prompt slot from its prefill to its last
row's end. Prompts are prefilled when their rows start, or ahead of them (`prefetch`), so that a row which ends is
followed at once. Rows stay packed in slots 0 .. n-1: the hole that an ended row leaves is taken by a waiting
row, or else by the last row, so a step never computes more rows than are alive.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rl.rollout.sampling import to_int64
from rl.rollout.state import RowSpec
from rl.types import Completion, RolloutRequest


@dataclass(slots=True)
class Group:
    """One request on its way. prompt_slot is None before its prefill and after its last row ended."""

    index: int
    request: RolloutRequest
    completions: dict[int, Completion] = field(default_factory=dict)
    prompt_slot: int | None = None

    @property
    def size(self) -> int:
        return len(self.request.seeds)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.request.problem.prompt_ids


@dataclass(slots=True)
class Row:
    """Completion `k` of `group`, of at most `limit` tokens. For stop strings: how many tokens were seen, and the
    length at which the text ended."""

    group: Group
    k: int
    limit: int
    seen: int = 0
    cut: int | None = None


@dataclass(frozen=True, slots=True)
class Turnover:
    """What to do after a look. ended: how many rows left. moves: (from slot, to slot), disjoint. new_prompts: to be
    prefilled. new_rows: to be started."""

    ended: int
    moves: list[tuple[int, int]]
    new_prompts: list[Group]
    new_rows: list[RowSpec]

    @property
    def changed(self) -> bool:
        """Whether any slot holds another row than before, or fewer slots are in use."""
        return bool(self.ended or self.moves or self.new_rows)


class Scheduler:
    """`rows[r]` is the row in slot r. limit_of(request, k): most tokens of a completion. admit_at_least: free slots
    to wait for before prompts are prefilled while others run (a prefill of one prompt costs nearly as much as one of
    several). ahead: waiting rows whose prompts `prefetch` keeps prefilled, if prompt slots allow; other rows then start
    only where nothing else runs."""

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        *,
        slots: int,
        prompt_slots: int,
        limit_of: Callable[[int, int], int],
        admit_at_least: int = 1,
        ahead: int = 0,
    ) -> None:
        self.groups = [Group(index, request) for index, request in enumerate(requests)]
        self.rows: list[Row] = []
        self._slots, self._admit_at_least, self._ahead = slots, admit_at_least, ahead
        self._waiting = [Row(group, k, limit_of(group.index, k)) for group in self.groups for k in range(group.size)]
        self._next = 0
        self._free_prompt_slots = list(range(prompt_slots))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - self._next

    @property
    def busy(self) -> bool:
        return bool(self.rows) or self.num_waiting > 0

    def turn_over(self, ended: Sequence[int]) -> Turnover:
        """Take the rows in slots `ended` out (their results are already in their groups) and fill up."""
        kept: list[Row | None] = list(self.rows)
        for slot in ended:
            group = self.rows[slot].group
            kept[slot] = None
            if len(group.completions) == group.size and group.prompt_slot is not None:
                heapq.heappush(self._free_prompt_slots, group.prompt_slot)
                group.prompt_slot = None
        new_prompts, new_rows = self._admit(kept)
        moves = []
        holes = [slot for slot, kept_row in enumerate(kept) if kept_row is None]
        for hole in holes:
            while kept and kept[-1] is None:
                kept.pop()
            if hole >= len(kept):
                break
            moves.append((len(kept) - 1, hole))
            kept[hole] = kept.pop()
        self.rows = [row for row in kept if row is not None]
        return Turnover(len(ended), moves, new_prompts, new_rows)

    def prefetch(self) -> list[Group]:
        """Groups to prefill now, beside the rows that run: none while enough are ready, else twice as many as that."""
        new_prompts: list[Group] = []
        ready = self._num_ready()
        if ready >= self._ahead:
            return new_prompts
        for row in self._waiting[self._next + ready :]:
            if row.group.prompt_slot is None:
                if ready >= 2 * self._ahead or not self._free_prompt_slots:
                    break
                row.group.prompt_slot = heapq.heappop(self._free_prompt_slots)
                new_prompts.append(row.group)
            ready += 1
        return new_prompts

    def _num_ready(self) -> int:
        """How many of the next waiting rows have their prompt prefilled."""
        waiting = enumerate(self._waiting[self._next :])
        return next((i for i, row in waiting if row.group.prompt_slot is None), self.num_waiting)

    def _admit(self, kept: list[Row | None]) -> tuple[list[Group], list[RowSpec]]:
        """Waiting rows into the holes of `kept` and behind its end, as far as slots and prompt slots go."""
        holes = [slot for slot, row in enumerate(kept) if row is None]
        alive = len(kept) - len(holes)
        free = self._slots - alive
        only_ready = self._ahead > 0 and (alive > 0 or self._num_ready() > 0)
        if alive and not only_ready and free < min(self._admit_at_least, self.num_waiting):
            return [], []
        new_prompts: list[Group] = []
        new_rows: list[RowSpec] = []
        while self.num_waiting and len(new_rows) < free:
            row = self._waiting[self._next]
            group = row.group
            if group.prompt_slot is None:
                if only_ready or not self._free_prompt_slots:
                    break
                group.prompt_slot = heapq.heappop(self._free_prompt_slots)
                new_prompts.append(group)
            self._next += 1
            if len(new_rows) < len(holes):
                slot = holes[len(new_rows)]
                kept[slot] = row
            else:
                slot = len(kept)
                kept.append(row)
            seed = to_int64(group.request.seeds[row.k])
            new_rows.append(RowSpec(slot, group.prompt_slot, len(group.prompt_ids), seed, row.limit))
        return new_prompts, new_rows
