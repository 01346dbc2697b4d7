"""The checkpoint store under kill -9 at every file operation, damage, a full disk, failing ranks, and replacement."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from rl.train import checkpoint
from rl.train.checkpoint import (
    MANIFEST,
    CheckpointError,
    CheckpointStore,
    find_damage,
    load_json,
    load_tensors,
    replace_folder,
    save_json,
    save_tensors,
)


def write(store: CheckpointStore, step: int, *, size: int = 1000) -> None:
    with store.writing(step) as folder:
        save_json(folder / "state.json", {"step": step})
        (folder / "optimizer").mkdir()
        (folder / "optimizer" / "shard.bin").write_bytes(bytes([step % 256]) * size)


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.steps() == [] and store.latest_valid() is None
    for step in (10, 20, 30):
        write(store, step)
    assert store.steps() == [20, 30]
    found = store.latest_valid()
    assert found is not None and (found.step, found.skipped) == (30, ())
    assert load_json(found.path / "state.json") == {"step": 30}
    manifest = load_json(found.path / MANIFEST)
    assert manifest["step"] == 30 and sorted(manifest["files"]) == ["optimizer/shard.bin", "state.json"]
    assert manifest["files"]["optimizer/shard.bin"]["bytes"] == 1000
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=None)
    for step in range(1, 5):
        write(store, step)
    assert store.steps() == [1, 2, 3, 4]


def flip_byte(path: Path) -> None:
    shard = path / "optimizer" / "shard.bin"
    data = bytearray(shard.read_bytes())
    data[500] ^= 1
    shard.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "optimizer" / "shard.bin", 999)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another sha256": (flip_byte, "optimizer/shard.bin has another sha256"),
    "truncated": (truncate, "has 999 bytes, expected 1000"),
    "missing file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), f"no {MANIFEST}"),
    "torn manifest": (lambda path: os.truncate(path / MANIFEST, 40), f"unreadable {MANIFEST}"),
    "odd manifest": (lambda path: (path / MANIFEST).write_text("[1]"), f"unreadable {MANIFEST}"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoints_are_skipped_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        write(store, step)
    damage(store.path(3))
    found = store.latest_valid()
    assert found is not None and found.step == 2
    assert len(found.skipped) == 1 and reason in found.skipped[0] and "step-00000003" in found.skipped[0]
    write(store, 3)  # the run goes on from 2 and comes past 3 again
    again = store.latest_valid()
    assert again is not None and (again.step, again.skipped) == (3, ())


def test_discard_after(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=None)
    for step in (1, 2, 3, 4):
        write(store, step)
    assert store.discard_after(2) == [3, 4]
    assert store.steps() == [1, 2]


def test_an_error_in_the_block_publishes_nothing_and_passes_through(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    with pytest.raises(KeyError, match="bug"), store.writing(2) as folder:
        (folder / "half").write_text("x")
        raise KeyError("bug")
    assert store.steps() == [1]
    store.latest_valid()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


OPERATIONS = ["open", "fsync", "rename", "replace", "rmdir", "unlink", "mkdir"]


def save_until_killed(store: CheckpointStore, step: int, survive: int) -> bool:
    """In a forked process: save, but die by SIGKILL just before file operation number `survive`. True if it died."""
    pid = os.fork()
    if pid == 0:
        left = survive

        def lethal(operation: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return operation(*args, **kwargs)

            return wrapped

        for name in OPERATIONS:
            setattr(os, name, lethal(getattr(os, name)))
        code = 1
        try:
            write(store, step)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    died = os.WIFSIGNALED(status)
    assert died or os.WEXITSTATUS(status) == 0
    return died


@pytest.mark.parametrize("replacing", [False, True])
def test_kill_before_every_file_operation_leaves_a_good_checkpoint(tmp_path: Path, replacing: bool) -> None:
    survive, outcomes = 0, []
    died = True
    while died:
        folder = tmp_path / str(survive)
        store = CheckpointStore(folder, keep=1)
        write(store, 1)
        step = 1 if replacing else 2
        died = save_until_killed(store, step, survive)
        found = store.latest_valid()
        assert found is not None and found.skipped == ()
        assert load_json(found.path / "state.json") == {"step": found.step}
        assert found.step in (1, step)
        outcomes.append(found.step)
        write(store, 3)  # and the run can go on
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003"]
        survive += 1
    assert survive > 15  # it was killed at many points
    assert outcomes == sorted(outcomes) and outcomes[-1] == step


KILLED_RUN = """
import sys
from pathlib import Path
from rl.train.checkpoint import CheckpointStore, save_json
store = CheckpointStore(Path(sys.argv[1]), keep=2)
step = 0
while True:
    step += 1
    with store.writing(step) as folder:
        save_json(folder / "state.json", {"step": step})
        for name in "abcdefgh":
            (folder / name).write_bytes(bytes([step % 256]) * 300_000)
    print(step, flush=True)
"""


def test_kill_9_from_outside(tmp_path: Path) -> None:
    """A process that does nothing but save is killed in the middle of it; whatever it reported as saved is there."""
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = 0
    timer = threading.Timer(60, process.kill)
    timer.start()
    for line in process.stdout:
        reported = int(line)
        if reported == 5:
            process.kill()
    process.wait()
    timer.cancel()
    found = CheckpointStore(tmp_path).latest_valid()
    assert found is not None and found.skipped == () and found.step in (reported, reported + 1)
    assert (found.path / "h").read_bytes() == bytes([found.step % 256]) * 300_000


def test_full_disk_is_named_and_leaves_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    refused = pytest.raises(CheckpointError, match=r"no room for the checkpoint of step 2 .*step-00000001")
    with refused, store.writing(2) as folder:
        (folder / "a").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    found = store.latest_valid()
    assert found is not None and found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("writer", ["torch", "safetensors", "json"])
def test_every_writer_that_meets_a_full_disk_is_recognised(tmp_path: Path, writer: str) -> None:
    """A real refusal by the kernel, through a limit on file size in a forked process."""
    store = CheckpointStore(tmp_path)
    write(store, 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            with store.writing(2) as folder:
                if writer == "torch":
                    torch.save(torch.zeros(100_000), folder / "x.pt")
                elif writer == "safetensors":
                    save_tensors(folder / "x.safetensors", {"x": torch.zeros(100_000)})
                else:
                    save_json(folder / "x.json", "x" * 400_000)
        except CheckpointError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.steps() == [1]


def run_ranks(folder: Path, bodies: list[Callable[[Path], object]]) -> list[BaseException | None]:
    """One thread a rank; `agree` is an all-reduce through a barrier, which breaks when a rank fails while it writes, as
    the launcher ends the others then."""
    world = len(bodies)
    barrier, votes = threading.Barrier(world, timeout=20), [True] * world
    errors: list[BaseException | None] = [None] * world

    def rank(r: int) -> None:
        def agree(mine: bool) -> bool:
            votes[r] = mine
            barrier.wait()
            result = all(votes)
            barrier.wait()
            return result

        def body(path: Path) -> None:
            try:
                bodies[r](path)
            except ZeroDivisionError:
                barrier.abort()
                raise

        store = CheckpointStore(folder, is_writer=r == 0, agree=agree)
        try:
            with store.writing(7) as path:
                body(path)
        except (CheckpointError, OSError, ZeroDivisionError, threading.BrokenBarrierError) as error:
            errors[r] = error

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_ranks_write_their_own_files_into_one_checkpoint(tmp_path: Path) -> None:
    bodies: list[Callable[[Path], object]] = [
        lambda path, r=r: (path / f"rank{r}").write_text(str(r)) for r in range(3)
    ]
    assert run_ranks(tmp_path, bodies) == [None] * 3
    found = CheckpointStore(tmp_path).latest_valid()
    assert found is not None and sorted(load_json(found.path / MANIFEST)["files"]) == ["rank0", "rank1", "rank2"]


def test_ranks_wait_for_the_slowest_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a rank still writes, names come and go, and whoever walks the folder trips over them."""
    ended = threading.Event()
    seen: list[bool] = []
    monkeypatch.setattr(checkpoint, "sync_tree", lambda folder: seen.append(ended.is_set()))
    assert run_ranks(tmp_path, [lambda path: None, lambda path: time.sleep(0.2) or ended.set()]) == [None, None]
    assert seen == [True, True]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_while_writing_raises_alone_and_nothing_is_published(tmp_path: Path, failing: int) -> None:
    """What is written may hold collectives (DeepSpeed's barriers): the failing rank must not call another one."""
    bodies: list[Callable[[Path], object]] = [lambda path: (path / "fine").write_text("x")] * 2
    bodies[failing] = lambda path: 1 // 0
    errors = run_ranks(tmp_path, bodies)
    assert isinstance(errors[failing], ZeroDivisionError)
    assert isinstance(errors[1 - failing], threading.BrokenBarrierError)
    assert CheckpointStore(tmp_path).latest_valid() is None
    assert list(tmp_path.iterdir()) == []  # what the ended ranks left is cleared away by whoever looks next


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_while_the_ranks_meet_stops_all(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between writing and publishing no collective is under way, so the others are told."""
    asked = threading.local()

    def failing_sync(path: Path) -> None:
        if asked.rank == failing:
            raise PermissionError("no")

    monkeypatch.setattr(checkpoint, "sync_tree", failing_sync)
    bodies: list[Callable[[Path], object]] = [lambda path, r=r: setattr(asked, "rank", r) for r in range(2)]
    errors = run_ranks(tmp_path, bodies)
    assert isinstance(errors[failing], PermissionError)
    assert isinstance(errors[1 - failing], CheckpointError) and "another rank" in str(errors[1 - failing])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_is_replaced_whole_wherever_it_is_interrupted(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """renames: how many succeed before the crash; two are needed."""
    final, new, aside = (tmp_path / name for name in ("policy", "policy.writing", "policy.replaced"))

    def write_new(content: str) -> None:
        new.mkdir(exist_ok=True)
        (new / "weights").write_text(content)

    write_new("old")
    replace_folder(new, final)
    write_new("new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crashing_after(renames, os.rename))
        with pytest.raises(KeyboardInterrupt) if renames < 2 else nullcontext():
            replace_folder(new, final)
    kept = final if final.exists() else aside
    assert (kept / "weights").read_text() == ("old" if renames < 2 else "new")
    write_new("newer")  # and the next save goes through, whatever was left
    replace_folder(new, final)
    assert (final / "weights").read_text() == "newer" and [path.name for path in tmp_path.iterdir()] == ["policy"]


def crashing_after(calls: int, function: Callable[..., None]) -> Callable[..., None]:
    left = iter(range(calls))

    def crashing(*arguments: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        function(*arguments)

    return crashing


def test_json_and_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    value = {"float": 0.1 + 0.2, "tiny": 5e-324, "text": "δ\n", "list": [1, None, True]}
    save_json(tmp_path / "a.json", value)
    assert load_json(tmp_path / "a.json") == value
    base = torch.randn(4, 6)
    tensors = {
        "strided": base.t(),
        "shared": base,
        "bfloat16": base.bfloat16(),
        "rng": torch.get_rng_state(),
        "scalar": torch.tensor(3),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_damaged_state_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        load_json(tmp_path / "a.json")
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"t\.safetensors is not a valid safetensors"):
        load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="JSON compliant"):
        save_json(tmp_path / "b.json", float("nan"))
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


def test_find_damage_of_a_good_one_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    assert find_damage(store.path(1)) is None
    shutil.rmtree(store.path(1))
    assert find_damage(store.path(1)) == f"no {MANIFEST}"
