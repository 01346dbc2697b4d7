"""GPU addresses that outlive the memory behind them, so that CUDA graphs outlive a rollout.

A captured graph holds the addresses of all that it reads. A rollout's cache and state are given back after it, for the
update to use; were they allocated anew, the next rollout would have to capture its graphs again (10 to 40 ms each,
which for 24 sizes of a skewed batch was a tenth of the rollout). So they come from a reserved range of addresses
(CUDA's virtual memory management, as in cuMemAddressReserve): memory is mapped into it while the arena is open, and
the same requests in the same order get the same addresses each time.

    with arena:                                    # on a GPU; `torch.zeros` elsewhere
        cache = arena.zeros((slots, length), torch.bfloat16)
        ...
        key = arena.layout                         # equal layouts: equal addresses
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

_ALIGNMENT = 1024  # bytes, of each tensor
_PIECE = 2**25  # bytes, the least that is mapped at once
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


# (shape, dtype) -> a tensor of zeros: how a rollout's classes ask for memory.
Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def torch_zeros(device: torch.device) -> Zeros:
    """Ordinary memory."""
    return lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device)


class Arena:
    """Tensors from one range of addresses, valid until the arena is closed. RuntimeError from the constructor where the
    driver cannot do it; torch.OutOfMemoryError from `zeros`. `bytes`: mapped now."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._driver = _Driver(self.device)
        self._capacity = _round_up(torch.cuda.get_device_properties(self.device).total_memory, self._driver.granularity)
        self._base = self._driver.reserve(self._capacity)
        self._pieces: list[tuple[int, int, int]] = []  # address, bytes, handle
        self._used = self.bytes = 0
        self._layout: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._open = False
        handle = self._driver.map(self._base, self._driver.granularity)  # where mapping is refused: here, once
        if handle is not None:
            self._driver.unmap(self._base, self._driver.granularity, handle)

    @property
    def layout(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes taken since it was opened, which fix every address."""
        return tuple(self._layout)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._layout.append((tuple(shape), dtype))
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        start = self._used
        self._used = _round_up(start + size, _ALIGNMENT)
        if self._used > self.bytes:
            self._map(self._used - self.bytes)
        span = torch.as_tensor(_Span(self._base + start, size), device=self.device)
        assert span.data_ptr() == self._base + start, f"torch takes the memory of {self.device} for another device's"
        return span.view(dtype).view(shape).zero_()

    def __enter__(self) -> Arena:
        if self._open:
            raise RuntimeError("this engine is in the middle of a rollout; another one needs an engine of its own")
        self._release()  # what an interrupted exit has left
        self._open, self._used, self._layout = True, 0, []
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._release()

    def _release(self) -> None:
        if self._pieces:
            with contextlib.suppress(RuntimeError):  # of a broken device, whose own error is on its way already
                torch.cuda.synchronize(self.device)
        while self._pieces:
            self._driver.unmap(*self._pieces.pop())
        self.bytes = 0

    def _map(self, least: int) -> None:
        size = _round_up(max(least, _PIECE), self._driver.granularity)
        if self.bytes + size > self._capacity:
            raise torch.OutOfMemoryError(f"a rollout asks for more than the {self._capacity} bytes of {self.device}")
        address = self._base + self.bytes
        handle = self._driver.map(address, size)
        if handle is None:  # torch may hold what is missing for its next tensors
            torch.cuda.empty_cache()
            handle = self._driver.map(address, size)
        if handle is None:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise torch.OutOfMemoryError(
                f"a rollout's cache and state need {self.bytes + size} bytes, of which {self.bytes} are taken and "
                f"{free} are free on {self.device}; rollout.cache_bytes limits them"
            )
        self._pieces.append((address, size, handle))
        self.bytes += size


class _Span:
    """Bytes of a GPU, as torch takes them without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]  # fmt: skip


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of one device, not shared between processes."""

    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    ]  # fmt: skip


class _AccessDescription(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Driver:
    """The six calls of the CUDA driver. Constants are those of cuda.h."""

    _DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
    _PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
    _READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def __init__(self, device: torch.device) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"the CUDA driver's library cannot be loaded: {error}") from error
        torch.cuda.init()
        location = _Location(self._DEVICE, device.index)
        self._properties = _AllocationProperties(type=self._PINNED, location=location)
        self._access = _AccessDescription(location, self._READ_WRITE)
        granularity = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 1)
        self.granularity = granularity.value

    def reserve(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), _size(size), _size(0), _address(0), _address(0))
        return address.value

    def map(self, address: int, size: int) -> int | None:
        """-> handle of the memory now behind `address`; None: the device has not so much."""
        handle = ctypes.c_uint64()
        try:
            made = self._cuda.cuMemCreate(
                ctypes.byref(handle), _size(size), ctypes.byref(self._properties), _address(0)
            )
            if made == _OUT_OF_MEMORY:
                return None
            self._check("cuMemCreate", made)
            self._call("cuMemMap", _address(address), _size(size), _size(0), handle, _address(0))
            self._call("cuMemSetAccess", _address(address), _size(size), ctypes.byref(self._access), _size(1))
        except BaseException:  # an interrupt, too, arrives between these calls
            if handle.value:
                self._cuda.cuMemUnmap(_address(address), _size(size))  # an error where nothing was mapped
                self._cuda.cuMemRelease(handle)
            raise
        return handle.value

    def unmap(self, address: int, size: int, handle: int) -> None:
        self._call("cuMemUnmap", _address(address), _size(size))
        self._call("cuMemRelease", _address(handle))

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._cuda, name)
        except AttributeError as error:
            raise RuntimeError(f"the CUDA driver has no {name}") from error
        self._check(name, function(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{name} of the CUDA driver failed with error {status}")


def _size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def _address(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
