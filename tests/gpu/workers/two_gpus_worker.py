"""One of two ranks: the collectives of rl.distributed over NCCL, an arena on this rank's GPU, and a CUDA graph captured
while the other rank keeps an all-reduce waiting.

Run by tests/gpu/test_two_gpus.py under torchrun; prints what it measured and "rank R: sound" at its end.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from rl.distributed import end_program, gather_objects, max_over_ranks, sum_over_ranks, sum_tensor_over_ranks
from rl.rollout.arena import Arena
from rl.rollout.cuda import capturing


def collectives(rank: int, device: torch.device) -> None:
    assert sum_over_ranks({"a": 1.5, "b": float(rank)}, device) == {"a": 3.0, "b": 1.0}
    assert max_over_ranks([rank, 5 - rank], device) == [1, 5]
    assert sum_tensor_over_ranks(torch.ones(2, 3, dtype=torch.int64), device).tolist() == [[2] * 3] * 2
    assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]


def arena_of_this_gpu(rank: int, device: torch.device) -> None:
    arena = Arena(device)
    for _ in range(2):
        with arena:
            span = arena.zeros((3, 2**20), torch.bfloat16)
            assert span.device == device and float(span.sum()) == 0
            span.fill_(rank + 1)
            assert float(span.float().mean()) == rank + 1


def capture_beside_a_collective(rank: int, device: torch.device) -> float:
    """-> seconds that the capture took."""
    waited = torch.ones(2**20, device=device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    if rank == 1:
        time.sleep(2)
    work = dist.all_reduce(waited, async_op=True)
    began = time.perf_counter()
    with torch.cuda.stream(stream), capturing(graph):
        made = torch.zeros(8, device=device) + 1
    seconds = time.perf_counter() - began
    work.wait()
    graph.replay()
    torch.cuda.synchronize()
    assert float(waited[0]) == 2 and float(made[0]) == 1
    return seconds


def bandwidth(device: torch.device) -> float:
    """All-reduce of 1 GiB, bytes a second."""
    data = torch.ones(2**28, device=device)
    dist.all_reduce(data)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    return 5 * 2**30 / (time.perf_counter() - began)


def main() -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(minutes=2), device_id=device)
    collectives(rank, device)
    arena_of_this_gpu(rank, device)
    seconds = capture_beside_a_collective(rank, device)
    print(f"rank {rank}: captured in {seconds:.3f} s, all-reduce {bandwidth(device) / 1e9:.0f} GB/s", flush=True)
    print(f"rank {rank}: sound", flush=True)
    end_program()


if __name__ == "__main__":
    main()
