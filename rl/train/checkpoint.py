"""An atomic store of checkpoints: a crash at any moment, `kill -9` and a full disk included, leaves the last good one.

A checkpoint is a folder `step-00000040`. It is written as `step-00000040.writing`; every file is fsynced, MANIFEST.json
gets size and sha256 of each, then the folder is renamed and its parent fsynced. Whoever resumes takes the newest whose
manifest holds. What is inside is the caller's business, but our own state is JSON and safetensors (`save_json`,
`save_tensors`): a pickle is a program.

    store = CheckpointStore(run_dir / "checkpoints", keep=2)
    with store.writing(step=40) as folder:
        save_json(folder / "state.json", {"step": 40})
    found = store.latest_valid()

With several ranks every one enters `writing` and writes its own files; `agree` is how they meet. A rank that fails
while it writes does not meet the others: what it writes may hold collectives of its own (DeepSpeed's save begins and
ends with a barrier), and to call another one beside those would leave all ranks waiting. It raises, and the launcher
ends the rest. Reading is for one rank, which tells the others: if each looked for itself, a torn file seen by one rank
only would mix two steps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REPLACED = ".writing", ".replaced"
# torch.save reports a full disk as "unexpected pos", safetensors as text
_DISK_FULL = re.compile(r"unexpected pos|no space left|disk quota|file too large|os error 28", re.IGNORECASE)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the last good one is untouched."""


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """step: steps done when it was written. path: its folder. skipped: why newer ones were not taken, one line each."""

    step: int
    path: Path
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """Checkpoints of one run in one folder.

    keep: how many of the newest stay, None for all. is_writer: this rank creates, publishes and deletes folders (rank
    0). agree: called by all ranks with "my part went well", returns whether everyone's did, after everyone has called
    it (an all-reduce); with one rank, the identity.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int | None = 2,
        is_writer: bool = True,
        agree: Callable[[bool], bool] = lambda mine: mine,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must stay (or None for all)")
        self.folder = Path(folder)
        self.keep = keep
        self._is_writer = is_writer
        self._agree = agree

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending; not verified."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name[1]) for name in names if name)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into, on every rank; published when the block ends well on all.

        A checkpoint of the same step is replaced. Raises CheckpointError when the disk is full or another rank failed
        to prepare or publish; other errors of the block pass through. In all these cases nothing is published. A rank
        whose block fails raises at once and alone: its process must end, so that the launcher ends the others. What
        was half written then stays, under its temporary name, until the next save or look (others may be writing).
        """
        temporary = self.path(step).with_name(self.path(step).name + _WRITING)
        with self._together(step, temporary):
            if self._is_writer:
                self.clean()
                temporary.mkdir(parents=True)
        with self._explaining_full_disk(step):
            yield temporary
        self._agree(True)  # while ranks still write, names come and go
        with self._together(step, temporary):
            sync_tree(temporary)
        with self._together(step, temporary):
            if self._is_writer:
                self._publish(step, temporary)

    def latest_valid(self) -> FoundCheckpoint | None:
        """The newest checkpoint whose every file matches its manifest, or None. Call on one rank."""
        if self._is_writer:
            self.clean()
        skipped: list[str] = []
        for step in reversed(self.steps()):
            problem = find_damage(self.path(step))
            if problem is None:
                return FoundCheckpoint(step, self.path(step), tuple(skipped))
            skipped.append(f"{self.path(step)}: {problem}")
        return None

    def discard_after(self, step: int) -> list[int]:
        """Delete checkpoints newer than `step`, from which a run was resumed: they are damaged or of another
        history."""
        self.clean()
        newer = [other for other in self.steps() if other > step]
        for other in newer:
            self._remove(self.path(other))
        return newer

    def clean(self) -> None:
        """Put right what a killed save left: half-written folders go; one moved aside returns if its successor never
        came."""
        if not self.folder.is_dir():
            return
        for entry in list(self.folder.iterdir()):
            if entry.name.endswith(_REPLACED) and not entry.with_suffix("").exists():
                os.rename(entry, entry.with_suffix(""))
            elif entry.suffix in (_WRITING, _REPLACED) and _NAME.fullmatch(entry.stem):
                shutil.rmtree(entry)

    def _publish(self, step: int, temporary: Path) -> None:
        save_json(temporary / MANIFEST, {"format": 1, "step": step, "files": _describe_files(temporary)})
        _sync(temporary)
        replace_folder(temporary, self.path(step))
        if self.keep is not None:
            for old in [other for other in self.steps() if other != step][: max(0, len(self.steps()) - self.keep)]:
                self._remove(self.path(old))

    def _remove(self, path: Path) -> None:
        """Rename first: a deletion that is interrupted must not leave a folder that looks like a damaged checkpoint."""
        doomed = path.with_name(path.name + _WRITING)
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    @contextmanager
    def _together(self, step: int, temporary: Path) -> Iterator[None]:
        """Run one phase, free of collectives, on all ranks: when it fails anywhere, every rank raises, and no rank
        waits for ever."""
        mine = False
        try:
            with self._explaining_full_disk(step):
                yield
            mine = True
        finally:
            everyone = self._agree(mine)
            if not everyone and self._is_writer:
                shutil.rmtree(temporary, ignore_errors=True)
        if not everyone:
            raise CheckpointError(f"the checkpoint of step {step} was given up: another rank failed to write its part")

    @contextmanager
    def _explaining_full_disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_disk_full(error):
                raise
            raise CheckpointError(self._explain_full_disk(step, error)) from error

    def _explain_full_disk(self, step: int, error: Exception) -> str:
        steps = self.steps()
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        last = f"the last one kept is {self.path(steps[-1])}" if steps else "there is none yet"
        return (
            f"no room for the checkpoint of step {step} in {self.folder} ({free / 2**20:.0f} MiB free): {error}. "
            f"Earlier checkpoints are untouched; {last}"
        )


def find_damage(path: Path) -> str | None:
    """What is wrong with a published checkpoint, or None: every file of its manifest must be there with its size and
    sha256."""
    try:
        files = load_json(path / MANIFEST)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable {MANIFEST} ({error})"
    for name, (size, _) in expected.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
    try:
        hashes = _hash_files([path / name for name in expected])
    except OSError as error:
        return f"unreadable ({error})"
    for (name, (_, wanted)), found in zip(expected.items(), hashes, strict=True):
        if found != wanted:
            return f"{name} has another sha256 than when it was written"
    return None


def replace_folder(new: Path, final: Path) -> None:
    """`new` takes the place of `final`, which may exist; at every moment one of the two is whole on the disk.

    The old folder is moved aside first, to `<final>.replaced`, where a crash between the two renames leaves it."""
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(new, final)
    _sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def save_json(path: Path, value: Any) -> None:
    """Write JSON atomically (temporary file, fsync, rename). Floats come back bit for bit; NaN and infinities are
    refused."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_json(path: Path) -> Any:
    """Read JSON; ValueError names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as safetensors, from any device, dtype and stride; shared memory is written twice."""
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors onto the CPU; ValueError names the file when it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    """fsync one file, or one folder (its names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    hashes = _hash_files(paths)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }


def _hash_files(paths: list[Path]) -> list[str]:
    """sha256 of each file; threads, because hashing leaves the interpreter lock."""
    with ThreadPoolExecutor(max_workers=min(8, max(1, len(paths)))) as pool:
        return list(pool.map(_hash_file, paths))


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_disk_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (isinstance(error, OSError) and error.errno in full) or bool(_DISK_FULL.search(str(error)))
