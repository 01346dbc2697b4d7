"""Between host and device without waiting: what lets the host prepare the next rows while a GPU decodes.

A copy from or to pageable memory makes the host wait for everything queued before it; pinned memory does not. On a CPU
nothing is queued and all of this is plain copying.

    lengths = to_host(state.own_len)    # filled in when the device gets there
    mark = Mark(device)                 # this place in its queue
    ...                                 # more work is queued
    mark.wait()                         # now `lengths` may be read, while that work goes on
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def to_device(values: torch.Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Host numbers (a list, nested lists, a CPU tensor) as a tensor on `device`."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host (the tensor itself if it is there): complete when the device has come to this place."""
    return tensor.to("cpu", non_blocking=True)  # pinned where the tensor is on a GPU


class Mark:
    """A place in the device's queue."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until everything queued before the mark is done."""
        if self._event is not None:
            self._event.synchronize()

    def hold(self) -> None:
        """What is queued on the current stream from now on waits for the mark; the host does not."""
        if self._event is not None:
            self._event.wait()

    def seconds_since(self, earlier: Mark) -> float:
        """The device's time between the marks; both must have been reached."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


def aside(device: torch.device, purpose: str) -> AbstractContextManager[Any]:
    """Work queued in this context runs beside what is queued elsewhere, and does not wait for it, in the order of its
    `purpose`. It may only read what a mark vouches for."""
    return torch.cuda.stream(_side_stream(device, purpose)) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One for the life of the process: the allocator keeps free blocks by stream."""
    return torch.cuda.Stream(device)
