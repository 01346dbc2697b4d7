"""From a recipe's `DataSource` to plain rows, each with the place where a person finds it.

JSON, JSONL and CSV are read here and not through `datasets`, which guesses one type per column (measured with 5.2: one
row with a number turns the "99" of all others into 99, a field missing in a row becomes None, an empty file is a bare
StopIteration). Hub data sets and Parquet have types of their own and go through `datasets`.

Every complaint is a ValueError that names the file or source, the row (JSONL and CSV: the line, from 1) and the column.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rl.config import DataSource
from rl.distributed import derive_seed

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """One row: `index` counts from 0 in the source, `place` is for people ("train.jsonl, line 7")."""

    index: int
    place: str
    columns: Row


def read_rows(source: DataSource, *, key: str, seed: int = 0) -> list[LocatedRow]:
    """All rows of a source (the first `limit`), columns renamed and cut out as the recipe says, required ones present.

    key: the section's path in the recipe, for messages ("data.train"). seed: for a Python function that takes one.
    """
    read: dict[str, Callable[[DataSource, str], Iterator[LocatedRow]]] = {
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "hub": _read_hub,
        "function": lambda source, key: _read_function(source, key, seed),
    }
    rows: list[LocatedRow] = []
    for row in read[source.kind](source, key):
        rows.append(LocatedRow(row.index, row.place, _map_columns(row, source, key)))
        if source.limit is not None and len(rows) == source.limit:
            break
    if not rows:
        raise ValueError(f"{key}.source = {source.source!r}: holds no rows")
    return rows


def _map_columns(row: LocatedRow, source: DataSource, key: str) -> Row:
    """Rename by `columns` and cut out by `extract`."""
    columns = dict(row.columns)
    mapped: Row = {}
    for new, old in source.columns.items():
        if old not in row.columns:
            present = ", ".join(map(repr, row.columns)) or "none"
            raise ValueError(f"{row.place}: column {old!r} is missing ({key}.columns.{new}); this row has: {present}")
        mapped[new] = row.columns[old]
    for old in set(source.columns.values()):
        columns.pop(old, None)
    clash = sorted(set(columns) & set(mapped))
    if clash:
        raise ValueError(
            f"{key}.columns: {clash[0]!r} is read from {source.columns[clash[0]]!r}, but {row.place} has a column "
            f"{clash[0]!r} of its own; give that one another name too, for example raw_{clash[0]}: {clash[0]}"
        )
    columns.update(mapped)
    for column, pattern in source.extract.items():
        value = columns.get(column)
        if not isinstance(value, str):
            raise ValueError(f"{row.place}: column {column!r} is {_kind(value)}; {key}.extract.{column} needs text")
        found = re.search(pattern, value)
        if found is None or found.group(1) is None:
            raise ValueError(f"{row.place}: column {column!r}: {key}.extract.{column} = {pattern!r} is not found in it")
        columns[column] = found.group(1)
    return columns


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _local_file(source: DataSource, key: str) -> Path:
    path = Path(source.source)
    if not path.is_file():
        raise ValueError(f"{key}.source = {source.source!r}: there is no such file (from {Path.cwd()})")
    if path.stat().st_size == 0:
        raise ValueError(f"{key}.source = {source.source!r}: the file is empty")
    return path


def _read_jsonl(source: DataSource, key: str) -> Iterator[LocatedRow]:
    path = _local_file(source, key)
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield LocatedRow(index, f"{path}, line {number}", _json_object(line, f"{path}, line {number}"))
            index += 1


def _json_object(text: bytes, place: str) -> Row:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: is not a whole line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is a {type(row).__name__}; expected an object ({{...}}) a line")
    return row


def _read_json(source: DataSource, key: str) -> Iterator[LocatedRow]:
    path = _local_file(source, key)
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON: {error} (one object a line? then name it .jsonl)") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a list of objects")
    for index, row in enumerate(content):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {index + 1}: is a {type(row).__name__}; expected an object")
        yield LocatedRow(index, f"{path}, row {index + 1}", row)


def _read_csv(source: DataSource, key: str) -> Iterator[LocatedRow]:
    path = _local_file(source, key)
    csv.field_size_limit(2**31 - 1)  # else 128 KiB, and the tests of a program may be longer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        index = 0
        try:
            for fields in reader:
                place = f"{path}, line {reader.line_num}"
                if not fields:
                    continue
                if not header:
                    header = fields
                    if len(set(header)) < len(header):
                        raise ValueError(f"{place}: a column is named twice in {header}")
                    continue
                if len(fields) != len(header):
                    raise ValueError(f"{place}: has {len(fields)} fields, the header names {len(header)}")
                yield LocatedRow(index, place, dict(zip(header, fields, strict=True)))
                index += 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: is not CSV in UTF-8: {error}") from error


def _read_parquet(source: DataSource, key: str) -> Iterator[LocatedRow]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets; both take a second to import, so only who reads such data pays
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    path = _local_file(source, key)
    try:
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    except (pyarrow.ArrowException, DatasetGenerationError) as error:
        raise ValueError(f"{path}: is not a whole Parquet file: {error}") from error
    for index, row in enumerate(rows):
        yield LocatedRow(index, f"{path}, row {index + 1}", dict(row))


def _read_hub(source: DataSource, key: str) -> Iterator[LocatedRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    split = source.split or "train"
    try:
        rows = load_dataset(source.source, source.config, split=split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{key}.source = {source.source!r}: is no reachable data set of the hub ({error}); allowed also: a path "
            f"that ends in .jsonl, .json, .csv or .parquet, or package.module:function"
        ) from error
    except (ValueError, DatasetGenerationError, StopIteration) as error:  # StopIteration: an empty file (datasets 5.2)
        reason = str(error.__cause__ or error) or "one of its files is empty"
        raise ValueError(f"{key}: {source.source!r}, config {source.config!r}, split {split!r}: {reason}") from error
    for index, row in enumerate(rows):
        yield LocatedRow(index, f"{source.source} ({split}), row {index + 1}", dict(row))


def _read_function(source: DataSource, key: str, seed: int) -> Iterator[LocatedRow]:
    function = _find_function(source.source, key)
    params = dict(source.params)
    try:
        signature = inspect.signature(function)
        if "seed" in signature.parameters and "seed" not in params:
            params["seed"] = derive_seed(seed, "data")
        signature.bind(**params)
    except TypeError as error:
        raise ValueError(f"{key}.params = {source.params!r}: {source.source} takes {signature}: {error}") from error
    rows = function(**params)
    if not isinstance(rows, Iterable):
        raise ValueError(
            f"{key}.source = {source.source!r}: gave a {type(rows).__name__}; the function must yield dicts"
        )
    for index, row in enumerate(rows):
        place = f"{source.source}, row {index + 1}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: is a {type(row).__name__}; the function must yield dicts")
        yield LocatedRow(index, place, row)


def _find_function(name: str, key: str) -> Callable[..., Any]:
    """`package.module:function` or `file.py:function`."""
    module_name, _, function_name = name.rpartition(":")
    module = _import_file(module_name, name, key) if module_name.endswith(".py") else _import(module_name, name, key)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{key}.source = {name!r}: {module_name} has no function {function_name!r}")
    return function


def _import(module_name: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"{key}.source = {name!r}: there is no module {error.name!r}") from error


def _import_file(file: str, name: str, key: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{key}.source = {name!r}: there is no file {file!r} (from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"recipe_data_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look modules up there
    spec.loader.exec_module(module)
    return module
