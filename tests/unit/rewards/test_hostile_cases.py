"""Every hostile case of the shared data, programs included, from every place that a trainer may call from: no cheat is
paid, no honest control refused, nothing raised or written, each done within its own limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.hostile_cases import FILE, faults, hostile_cases

Rows = list[dict[str, Any]]

pytestmark = [
    pytest.mark.skipif(not FILE.exists(), reason="the hostile cases are not here"),
    pytest.mark.xdist_group("sandbox"),  # its programs bomb, too
]


def _all_faults(rows: Rows) -> list[str]:
    return [fault for row in rows for fault in faults(row)]


def _main_thread(rows: Rows) -> list[str]:
    assert threading.current_thread() is threading.main_thread()
    return _all_faults(rows)


def _another_thread(rows: Rows) -> list[str]:
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(_all_faults(rows)))
    thread.start()
    thread.join()
    (result,) = found  # none if the thread died of an exception
    return result


def _executor(rows: Rows) -> list[str]:
    with ThreadPoolExecutor(4) as executor:
        return [fault for found in executor.map(faults, rows) for fault in found]


def _running_loop(rows: Rows) -> list[str]:
    async def score() -> list[str]:
        asyncio.get_running_loop()
        return _all_faults(rows)

    return asyncio.run(score())


@pytest.mark.parametrize("place", [_main_thread, _another_thread, _executor, _running_loop])
def test_no_place_lets_a_hostile_case_through(place: Callable[[Rows], list[str]]) -> None:
    rows = hostile_cases()
    assert len(rows) > 100
    assert place(rows) == []
