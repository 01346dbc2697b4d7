"""Who am I among the processes, how do numbers meet, and where does randomness come from.

A leaf: torch and the standard library only. The launcher (`accelerate launch`, `torchrun`) announces ranks in
environment variables; without a launcher there is one process of rank 0. Every random draw of the project is seeded by
`derive_seed` of what is being drawn, never by carried generator state, so a resumed run draws what the uninterrupted
one would have.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist


def derive_seed(seed: int, *names: str | int) -> int:
    """The seed of one named purpose: a number in [0, 2**63) that depends on `seed` and on every name, in order.

    Stable between processes, machines and Python versions (BLAKE2b, not `hash`). Strings and integers are told apart,
    and borders between names count: `derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")`, `(0, 1) != (0, "1")`.

        derive_seed(seed, "rollout", step, problem.id, k)
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in (seed, *names):
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise TypeError(f"derive_seed takes integers and strings, got {name!r}")
        part = f"{'i' if isinstance(name, int) else 's'}{name}".encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1


def rank() -> int:
    """This process's number among all of the run, 0 without a launcher."""
    return dist.get_rank() if _initialised() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together, 1 without a launcher."""
    return dist.get_world_size() if _initialised() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes of the run share this machine, 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here; nothing to do with one process."""
    if _initialised() and dist.get_world_size() > 1:
        dist.barrier()


def end_program() -> None:
    """The last call of a program that ends well: with other processes, meet them once more and end without tearing the
    interpreter down. Returns where there is no process group.

    gloo's threads may still hold tensors while the interpreter goes away, which aborts the process ("terminate called
    without an active exception": 3 of 40 exits of two bare ranks; destroying the group first is not enough under
    DeepSpeed, which keeps references to it). The launcher would then report a run as failed that had written
    everything. Not for a program that ends with an error: the others may be waiting elsewhere.
    """
    if not _initialised():
        return
    barrier()
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def sum_over_ranks(sums: dict[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """The total of each entry over all processes, in float64, the same on every rank.

    Every rank passes the same keys (in any order). `device`: where the process group works (cpu for gloo, cuda for
    nccl). Without a process group the input comes back as it is.
    """
    if not _initialised() or dist.get_world_size() == 1:
        return dict(sums)
    names = sorted(sums)
    totals = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return dict(zip(names, totals.tolist(), strict=True))


def sum_tensor_over_ranks(values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """The elementwise total over all processes, on the CPU and the same on every rank."""
    if not _initialised() or dist.get_world_size() == 1:
        return values.cpu()
    total = values.to(device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.cpu()


def max_over_ranks(values: list[int], device: torch.device | str = "cpu") -> list[int]:
    """The largest of each entry over all processes, the same on every rank."""
    if not _initialised() or dist.get_world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def gather_objects(item: Any) -> list[Any]:
    """`item` of every process in the order of the ranks, on every rank. Items are pickled: only for the run's own
    data."""
    if not _initialised() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def share_cpu_threads() -> int:
    """Divide this machine's cores among its processes and return the threads each gets.

    torch takes all cores in every process, which slows two processes on one machine down. OMP_NUM_THREADS wins if set
    by the user; `accelerate launch` sets it to 1 itself when several processes share a machine and it is unset.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    threads = max(1, cores // local_world_size())
    torch.set_num_threads(threads)
    return threads


def die_with_launcher() -> None:
    """End this process with the launcher that started it (Linux, under torch's elastic launcher; done by the kernel).

    Workers live in sessions of their own, so killing the launcher (`kill -9`, a lost job) would leave them training and
    writing into a folder that a resumed run is already using.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(parent_death_signal, signal.SIGKILL)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
