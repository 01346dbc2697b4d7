"""The arena's dealings with the driver, on a driver made for the test: what fails or is interrupted half-way leaves
nothing mapped."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rl.rollout.arena import Arena, _AccessDescription, _AllocationProperties, _Driver

_GRANULARITY = 2**21


class FakeCuda:
    """Handles are counted from 1. `fails`: a call -> the status it returns once, or what it raises after its work."""

    def __init__(self) -> None:
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.fails: dict[str, int | BaseException] = {}
        self._made = 0

    def _end(self, name: str) -> int:
        failure = self.fails.pop(name, 0)
        if isinstance(failure, BaseException):
            raise failure
        return failure

    def cuMemCreate(self, handle: object, size: ctypes.c_size_t, properties: object, flags: object) -> int:
        status = self.fails.get("cuMemCreate", 0)
        if not isinstance(status, int) or not status:
            self._made += 1
            handle._obj.value = self._made  # type: ignore[attr-defined]
            self.handles.add(self._made)
        return self._end("cuMemCreate")

    def cuMemMap(
        self, address: ctypes.c_uint64, size: object, offset: object, handle: ctypes.c_uint64, f: object
    ) -> int:
        status = self.fails.get("cuMemMap", 0)
        if not isinstance(status, int) or not status:
            assert address.value not in self.mapped
            self.mapped[address.value] = handle.value
        return self._end("cuMemMap")

    def cuMemSetAccess(self, *arguments: object) -> int:
        return self._end("cuMemSetAccess")

    def cuMemUnmap(self, address: ctypes.c_uint64, size: object) -> int:
        return 0 if self.mapped.pop(address.value, None) else 1

    def cuMemRelease(self, handle: ctypes.c_uint64) -> int:
        self.handles.discard(handle.value)
        return 0


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def arena(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Arena:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    driver = object.__new__(_Driver)
    driver._cuda, driver.granularity = cuda, _GRANULARITY  # type: ignore[assignment]
    driver._properties, driver._access = _AllocationProperties(), _AccessDescription()
    arena = object.__new__(Arena)
    arena.device, arena._driver, arena._base, arena._capacity = torch.device("cuda", 0), driver, 2**40, 2**36
    arena._pieces, arena._layout, arena._open = [], [], False
    arena._used = arena.bytes = 0
    return arena


def test_pieces_follow_each_other_and_are_given_back(arena: Arena, cuda: FakeCuda) -> None:
    for _ in range(2):
        with arena:
            arena._map(1)
            arena._map(2**26 + 1)
            assert sorted(cuda.mapped) == [2**40, 2**40 + 2**25] and arena.bytes == 2**25 + 2**26 + _GRANULARITY
        assert not cuda.mapped and not cuda.handles and arena.bytes == 0


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("failure", [1, KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_call_that_fails_leaves_nothing(
    arena: Arena, cuda: FakeCuda, call: str, failure: int | BaseException
) -> None:
    with pytest.raises(RuntimeError if failure == 1 else KeyboardInterrupt), arena:
        arena._map(1)
        cuda.fails[call] = failure
        arena._map(1)
    assert not cuda.mapped and not cuda.handles
    with arena:
        arena._map(1)
        assert len(cuda.mapped) == len(cuda.handles) == 1


def test_no_memory_is_told_with_its_setting(arena: Arena, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuMemCreate", lambda *arguments: 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"need 33554432 bytes.*rollout\.cache_bytes"), arena:
        arena._map(1)


def test_an_interrupted_exit_is_made_up_for(arena: Arena, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", interrupted)
        with pytest.raises(KeyboardInterrupt), arena:
            arena._map(1)
    assert cuda.mapped
    with arena:
        assert not cuda.mapped
        with pytest.raises(RuntimeError, match="in the middle of a rollout"), arena:
            pass
        arena._map(1)
        assert cuda.mapped
    assert not cuda.mapped
