"""How much memory a cache may take on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from rl.rollout import cache
from rl.rollout.cache import free_memory

GIB = 2**30


def limits(folder: Path, names: tuple[str, str], limit: int | str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("available", "room", "processes", "expected"),
    [
        (100 * GIB, [], 1, 4 * GIB),  # the cap
        (100 * GIB, [], 40, int(60 * GIB) // 40),
        (5 * GIB, [], 2, int(3 * GIB) // 2),
        (100 * GIB, [7 * GIB, GIB], 1, int(0.6 * GIB)),
    ],
)
def test_share_and_cap(
    monkeypatch: pytest.MonkeyPatch, available: int, room: list[int], processes: int, expected: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(cache, "_cgroup_room", lambda: room)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert free_memory(torch.device("cpu")) == pytest.approx(expected, abs=processes)


def test_room_under_version_2(tmp_path: Path) -> None:
    """The group's own limit, a parent's, and none at the top; file cache is not counted as use."""
    names = ("memory.max", "memory.current")
    limits(tmp_path / "a" / "b", names, 1000, 700, "anon 300\ninactive_file 250\nactive_file 50\nshmem 9")
    limits(tmp_path / "a", names, 800, 750, "inactive_file 0\nactive_file 10")
    limits(tmp_path, names, "max", 10**6, "inactive_file 0\nactive_file 0")
    (tmp_path / "self").write_text("0::/a/b\n")
    assert list(cache._cgroup_room(tmp_path / "self", tmp_path)) == [600, 60]


def test_room_under_version_1_of_a_group_with_the_hosts_name(tmp_path: Path) -> None:
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 200"
    limits(tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), 5000, 4000, stat)
    (tmp_path / "self").write_text("5:devices:/docker/1f\n4:cpu,memory:/docker/1f\n0::/docker/1f\n")
    assert list(cache._cgroup_room(tmp_path / "self", tmp_path)) == [1300]


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert list(cache._cgroup_room(tmp_path / "missing", tmp_path)) == []
    assert all(room > 0 for room in cache._cgroup_room())  # whatever this machine has
