"""A run's own record: JSON lines on disk, one object a line with its `step` and `stage`, safe against crash and resume.

Every append is fsynced before it returns, so what a run has reported survives `kill -9` (a tracker's offline files do
not: of four runs killed, one kept anything). A torn last line is cut off when the file is opened again. Numbers that
JSON does not know are the strings "nan", "inf" and "-inf"; `float()` reads them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, cast

_BLOCK_BYTES = 2**16


class _HasItem(Protocol):
    def item(self) -> Any: ...


class JsonLines:
    """One file, open for appending. Objects have at least `step` (int) and `stage` (str)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, _whole_bytes(path))
        self._file = open(path, "ab")  # noqa: SIM115 (held for the length of the run)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; on return they are on disk."""
        lines = [json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) for row in rows]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int, *, stage: str) -> int:
        """Remove the rows of `stage` of later steps, as a run that goes on from `step` must; returns how many."""
        return self.remove(lambda row: row.get("stage") == stage and row["step"] > step)

    def remove(self, unwanted: Callable[[dict[str, Any]], bool]) -> int:
        """Remove the rows that `unwanted` picks; returns how many. One line is held at a time: a long run has tens of
        gigabytes of completions."""
        with open(self.path, "rb") as lines:
            removed = sum(unwanted(json.loads(line)) for line in lines)
        if removed:
            self._file.close()
            with open(self.path, "rb") as lines:
                _replace(self.path, (line for line in lines if not unwanted(json.loads(line))))
            self._file = open(self.path, "ab")  # noqa: SIM115
        return removed

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a record, [] if there is no file; also while the run goes on. ValueError names a damaged
    line."""
    if not path.exists():
        return []
    rows = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break  # its writer is at it, or was killed
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
    return rows


def to_json(value: Any) -> Any:
    """The same value in JSON's types: tensors and numpy numbers as numbers, tuples as lists, NaN and infinities as
    strings."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return to_json(cast(_HasItem, value).item())
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if hasattr(value, "__float__"):
        return to_json(float(cast(SupportsFloat, value)))
    return str(value)


def _whole_bytes(path: Path) -> int:
    """Size of the file without a last line that has no end: its writer was killed."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
