"""Rows and slots, by hand and by a simulation that checks every turn."""

from __future__ import annotations

import random

import pytest

from rl.rollout.cache import CacheShape, plan_cache
from rl.rollout.scheduler import Scheduler
from rl.rollout.state import RowSpec
from rl.types import Completion, Problem, RolloutRequest


def requests(*groups: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(Problem(str(i), "", (1,) * (i + 2)), tuple(range(10 * i, 10 * i + n)))
        for i, n in enumerate(groups)
    ]


def nine(request: int, k: int) -> int:
    return 9


def end(scheduler: Scheduler, slot: int) -> None:
    row = scheduler.rows[slot]
    row.group.completions[row.k] = Completion([1], None, "stop")  # type: ignore[arg-type]


def names(scheduler: Scheduler) -> list[tuple[int, int]]:
    return [(row.group.index, row.k) for row in scheduler.rows]


def test_holes_go_to_waiting_rows_first_and_then_to_the_last_row() -> None:
    scheduler = Scheduler(requests(2, 3, 1), slots=4, prompt_slots=2, limit_of=nine)
    turn = scheduler.turn_over([])
    assert names(scheduler) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [group.index for group in turn.new_prompts] == [0, 1] and turn.moves == []
    assert turn.new_rows[2] == RowSpec(slot=2, prompt_slot=1, prompt_len=3, seed=10, limit=9)

    end(scheduler, 0)  # a row of group 1 waits, and takes the hole
    turn = scheduler.turn_over([0])
    assert names(scheduler) == [(1, 2), (0, 1), (1, 0), (1, 1)] and turn.moves == []
    assert turn.new_prompts == [] and turn.new_rows[0].prompt_slot == 1

    end(scheduler, 1)  # group 0 is complete: its prompt slot goes to group 2
    turn = scheduler.turn_over([1])
    assert names(scheduler) == [(1, 2), (2, 0), (1, 0), (1, 1)]
    assert [group.index for group in turn.new_prompts] == [2] and turn.new_rows[0].prompt_slot == 0

    for slot in (0, 3):  # nothing waits: the last row moves into the hole
        end(scheduler, slot)
    turn = scheduler.turn_over([0, 3])
    assert turn.moves == [(2, 0)] and turn.new_rows == [] and turn.ended == 2
    assert names(scheduler) == [(1, 0), (2, 0)] and scheduler.busy
    for slot in (0, 1):
        end(scheduler, slot)
    scheduler.turn_over([0, 1])
    assert not scheduler.busy


def test_a_prompt_waits_for_a_prompt_slot() -> None:
    scheduler = Scheduler(requests(1, 1, 1), slots=3, prompt_slots=1, limit_of=nine)
    scheduler.turn_over([])
    assert names(scheduler) == [(0, 0)]
    end(scheduler, 0)
    scheduler.turn_over([0])
    assert names(scheduler) == [(1, 0)]


def test_prefill_waits_until_it_is_worth_while() -> None:
    scheduler = Scheduler(requests(*[1] * 8), slots=4, prompt_slots=8, limit_of=nine, admit_at_least=2)
    scheduler.turn_over([])
    end(scheduler, 1)
    turn = scheduler.turn_over([1])
    assert turn.new_rows == [] and turn.moves == [(3, 1)]
    end(scheduler, 0)
    assert len(scheduler.turn_over([0]).new_rows) == 2


def test_prompts_are_fetched_ahead_of_their_rows() -> None:
    scheduler = Scheduler(requests(2, 2, 2, 2, 2), slots=2, prompt_slots=4, limit_of=nine, ahead=2, admit_at_least=2)
    assert [group.index for group in scheduler.turn_over([]).new_prompts] == [0]  # nothing runs yet: at once
    assert [group.index for group in scheduler.prefetch()] == [1, 2]  # twice as many rows as are to be ready
    assert scheduler.prefetch() == []
    end(scheduler, 1)
    turn = scheduler.turn_over([1])  # its prompt is there: no waiting for a second free slot
    assert names(scheduler) == [(0, 0), (1, 0)] and turn.new_prompts == [] and turn.new_rows[0].prompt_slot == 1
    assert scheduler.prefetch() == []
    for slot in (0, 1):
        end(scheduler, slot)
    scheduler.turn_over([0, 1])
    assert names(scheduler) == [(1, 1), (2, 0)]
    assert [group.index for group in scheduler.prefetch()] == [3, 4]
    for slot in (0, 1):
        end(scheduler, slot)
    scheduler.turn_over([0, 1])
    assert names(scheduler) == [(2, 1), (3, 0)]


def test_while_rows_run_others_wait_for_their_prompt() -> None:
    scheduler = Scheduler(requests(1, 1, 1), slots=2, prompt_slots=3, limit_of=nine, ahead=1)
    scheduler.turn_over([])
    end(scheduler, 0)
    assert scheduler.turn_over([0]).moves == [(1, 0)]  # not prefetched yet, and the other row need not stop for it
    assert [group.index for group in scheduler.prefetch()] == [2]
    assert scheduler.turn_over([]).new_rows[0].slot == 1


@pytest.mark.parametrize("seed", range(40))
def test_every_row_runs_once_and_slots_are_never_shared(seed: int) -> None:
    rng = random.Random(seed)
    groups = [rng.randint(1, 6) for _ in range(rng.randint(1, 12))]
    slots, prompt_slots = rng.randint(1, 9), rng.randint(1, 5)
    scheduler = Scheduler(
        requests(*groups), slots=slots, prompt_slots=prompt_slots, limit_of=nine, admit_at_least=rng.randint(1, 3),
        ahead=rng.choice([0, 1, 5]),
    )  # fmt: skip
    fetched: list[int] = []
    table: dict[int, tuple[int, int]] = {}  # what the device would hold in each slot
    seen: list[tuple[int, int]] = []
    ended: list[int] = []
    while True:
        before = dict(table)
        turn = scheduler.turn_over(ended)
        assert not {s for s, _ in turn.moves} & {t for _, t in turn.moves}
        for source, target in turn.moves:
            assert source > target
            table[target] = before[source]
        fetched += [group.index for group in turn.new_prompts]
        for spec in turn.new_rows:
            assert scheduler.rows[spec.slot].group.index in fetched
            table[spec.slot] = (row := scheduler.rows[spec.slot]).group.index, row.k
            seen.append(table[spec.slot])
        if not scheduler.rows:
            break
        table = {slot: table[slot] for slot in range(len(scheduler.rows))}
        assert list(table.values()) == names(scheduler) and len(table) <= slots
        held = {row.group.index: row.group.prompt_slot for row in scheduler.rows}
        assert None not in held.values() and len(set(held.values())) == len(held) <= prompt_slots
        fetched += [group.index for group in scheduler.prefetch()]
        ended = sorted(rng.sample(range(len(table)), rng.randint(0, len(table))))
        for slot in ended:
            end(scheduler, slot)
    assert sorted(seen) == [(g, k) for g, n in enumerate(groups) for k in range(n)]
    assert fetched == list(range(len(groups)))


def test_the_cache_plan_fills_the_budget() -> None:
    def plan(budget: int, rows: int = 64, row_multiple: int = 1) -> CacheShape:
        return plan_cache(
            requests=8, group=8, rows=rows, own_tokens=10, prompt_tokens=49, token_bytes=4, row_bytes=20,
            prompt_bytes=44, budget=budget, row_multiple=row_multiple,
        )  # fmt: skip

    # A row takes 10 * 4 + 20 = 60, a prompt 64 * 4 + 44 = 300 (49 rounds up to 64).
    assert plan(10**9) == CacheShape(64, 8, 10, 64)
    assert plan(64 * 60 + 8 * 300) == CacheShape(64, 8, 10, 64)
    assert plan(64 * 60 + 8 * 300 - 1).slots < 64
    assert plan(16 * 60 + 4 * 300) == CacheShape(16, 4, 10, 64)  # 2 groups of 8, half as many again, one more
    assert plan(360) == CacheShape(1, 1, 10, 64)
    assert plan(2 * (16 * 60 + 8 * 300), rows=16) == CacheShape(16, 8, 10, 64)  # half stays free: all 8 may linger
    assert plan(2 * (16 * 60 + 8 * 300) - 2, rows=16) == CacheShape(16, 4, 10, 64)
    with pytest.raises(ValueError, match=r"rollout\.cache_bytes = 359: must be at least 360"):
        plan(359)
    assert plan(10**9, rows=5, row_multiple=4).slots == 8
    assert plan(4 * 60 + 300, rows=5, row_multiple=4) == CacheShape(4, 1, 10, 64)
    with pytest.raises(ValueError, match="4 row"):
        plan(4 * 60 + 299, row_multiple=4)
