"""Seeds that mean what they name, and reductions over two real processes."""

from __future__ import annotations

import hashlib
import socket
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from rl import distributed
from rl.distributed import derive_seed, gather_objects, rank, sum_over_ranks, world_size


def test_derive_seed_is_stable_and_spelt_out() -> None:
    parts = [b"i7", b"srollout", b"i3"]
    digest = hashlib.blake2b(b"".join(len(part).to_bytes(8, "little") + part for part in parts), digest_size=8).digest()
    assert derive_seed(7, "rollout", 3) == int.from_bytes(digest, "little") >> 1
    assert derive_seed(7, "rollout", 3) == 75140533507151384


def test_derive_seed_tells_names_apart() -> None:
    calls = [(0,), (1,), (0, "a"), (0, "ab", "c"), (0, "a", "bc"), (0, 1), (0, "1"), (0, "i1"), (0, 1, 0), (0, "a", "")]
    seeds = [derive_seed(*call) for call in calls]
    assert len(set(seeds)) == len(calls) and all(0 <= seed < 2**63 for seed in seeds)
    for wrong in (True, 1.5, None):
        with pytest.raises(TypeError, match="integers and strings"):
            derive_seed(0, wrong)  # type: ignore[arg-type]


def test_alone_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), distributed.local_world_size()) == (0, 1, 1)
    assert distributed.is_main_process()
    assert sum_over_ranks({"a": 1.5}) == {"a": 1.5} and gather_objects("x") == ["x"]
    distributed.barrier()
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3 and not distributed.is_main_process()


TWO_PROCESSES = """
import atexit, sys, threading, time
import torch.distributed as dist
from rl.distributed import end_program, gather_objects, rank, sum_over_ranks, world_size
me = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=me, world_size=2)
sums = {"b": 2.0 ** 40 + me, "a": 0.25} if me else {"a": 0.5, "b": 2.0 ** 40}
print(rank(), world_size(), sum_over_ranks(sums), gather_objects({"me": me}))
atexit.register(print, "at exit")
threading.Thread(target=time.sleep, args=(60,)).start()  # would keep an interpreter from ending
end_program()
print("never")
"""


def test_two_processes_add_up() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [Popen([*command, str(me), port], stdout=PIPE, stderr=PIPE, text=True, cwd=root) for me in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    for me, (out, err) in enumerate(outputs):
        expected = f"{me} 2 {{'a': 0.75, 'b': {2.0**41 + 1}}} [{{'me': 0}}, {{'me': 1}}]\nat exit"
        assert out.strip() == expected, err
    assert [process.returncode for process in processes] == [0, 0]
