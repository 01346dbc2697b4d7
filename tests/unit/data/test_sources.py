"""Rows are read as they stand, and a bad one is refused by file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.config import DataSource
from rl.data.sources import read_rows


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row.columns for row in read_rows(DataSource(source=str(path), **settings), key="data.train")]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(source: DataSource) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(source, key="data.train")
    return str(caught.value)


def test_jsonl_keeps_types_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "99"}\n\n{"q": 99}\n{"q": "é", "n": [1]}')
    assert read(path) == [{"q": "99"}, {"q": 99}, {"q": "é", "n": [1]}]
    rows = read_rows(DataSource(source=str(path)), key="data.train")
    assert [row.place for row in rows] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert [row.index for row in rows] == [0, 1, 2]


def test_csv_keeps_text_and_counts_lines_over_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffq,a\r\n"two\nlines, 1",099\r\nx,1e-6\r\n')
    assert read(path) == [{"q": "two\nlines, 1", "a": "099"}, {"q": "x", "a": "1e-6"}]
    assert read_rows(DataSource(source=str(path)), key="k")[1].place.endswith("line 4")


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000  # as the tests of a program are; Python's own limit is 131,072
    assert read(write(tmp_path / "a.csv", f"q,a\n{long},1\n")) == [{"q": long, "a": "1"}]


def test_json_and_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"q": "1"}, {"q": 2}]')
    assert read(path) == [{"q": "1"}, {"q": 2}]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"q": ["1", "2"], "n": [[1], [2, 3]]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"q": "1", "n": [1]}, {"q": "2", "n": [2, 3]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torn.jsonl", '{"q": "a"}\n{"q": "b', "torn.jsonl, line 2: is not a whole line of JSON"),
        ("latin.jsonl", b'{"q": "a"}\n{"q": "\xe9"}\n', "latin.jsonl, line 2: is not a whole line of JSON"),
        ("list.jsonl", "[1]\n", "list.jsonl, line 1: is a list; expected an object"),
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("lines.json", '{"q": 1}\n{"q": 2}', "is not JSON: Extra data: line 2 column 1 (char 9) (one object a line?"),
        ("dict.json", '{"data": []}', "holds a dict; expected a list"),
        ("row.json", '[{"q": 1}, "x"]', "row.json, row 2: is a str"),
        ("ragged.csv", "a,b\n1,2\n3\n", "ragged.csv, line 3: has 1 fields, the header names 2"),
        ("twice.csv", "a,a\n1,2\n", "line 1: a column is named twice"),
        ("header.csv", "a,b\n", "holds no rows"),
        ("quote.csv", 'a\n"x', "is not CSV in UTF-8"),
        ("torn.parquet", b"PAR1\x00\x01", "torn.parquet: is not a whole Parquet file"),
    ],
)
def test_broken_files_are_refused_with_their_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    assert message in refusal(DataSource(source=str(write(tmp_path / name, content))))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(DataSource(source=str(tmp_path / "no.jsonl")))
    assert "data.train.source" in message and "there is no such file" in message


def test_columns_are_renamed_and_others_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "1+1?", "answer": "so #### 2", "level": 3}\n')
    columns = {"prompt": "question", "solution": "answer", "gold": "answer"}
    assert read(path, columns=columns, extract={"gold": r"#### (\d+)"}) == [
        {"prompt": "1+1?", "solution": "so #### 2", "gold": "2", "level": 3}
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"prompt": "question"}},
            "line 2: column 'question' is missing (data.train.columns.prompt); this row",
        ),
        ({"columns": {"b": "a"}}, "data.train.columns: 'b' is read from 'a', but"),
        ({"extract": {"a": r"#### (.+)"}}, "line 1: column 'a': data.train.extract.a = '#### (.+)' is not found in it"),
        ({"extract": {"b": r"(.+)"}}, "line 1: column 'b' is of type int; data.train.extract.b needs text"),
        ({"extract": {"c": r"(.+)"}}, "line 1: column 'c' is missing; data.train.extract.c needs text"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "x", "a": "1", "b": 2}\n{"a": "1", "b": 2}\n')
    assert message in refusal(DataSource(source=str(path), **settings))


def test_limit_stops_before_later_rows_are_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": 1}\n{"q": 2}\n{"q": broken\n')
    assert read(path, limit=2) == [{"q": 1}, {"q": 2}]


GENERATOR = """
import dataclasses

@dataclasses.dataclass
class Thing:
    number: int

def rows(size, seed=0, start: int = 0):
    for i in range(start, start + size):
        yield {"prompt": str(Thing(i).number), "seed": seed}

def strings():
    return ["a"]

def forgot_to_yield():
    pass

def needs_missing_module():
    import not_installed_anywhere
"""


@pytest.fixture
def generator(tmp_path: Path) -> str:
    return str(write(tmp_path / "my_rows.py", GENERATOR))


def test_python_functions_yield_rows(generator: str) -> None:
    source = DataSource(source=f"{generator}:rows", params={"size": 2, "start": 5, "seed": 1})
    assert [row.columns for row in read_rows(source, key="data.train")] == [
        {"prompt": "5", "seed": 1},
        {"prompt": "6", "seed": 1},
    ]


def test_a_function_that_takes_a_seed_gets_one_of_the_run(generator: str) -> None:
    source = DataSource(source=f"{generator}:rows", params={"size": 1})
    first, again, other = (read_rows(source, key="data.train", seed=seed)[0].columns["seed"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("rows", {"siz": 1}, "takes (size, seed=0, start: int = 0)"),
        ("rows", {}, "missing a required argument: 'size'"),
        ("rows", {"size": 0}, "holds no rows"),
        ("strings", {}, "row 1: is a str; the function must yield dicts"),
        ("nothing", {}, "has no function 'nothing'"),
        ("forgot_to_yield", {}, "gave a NoneType; the function must yield dicts"),
    ],
)
def test_python_functions_that_do_not_fit(generator: str, name: str, params: dict[str, Any], message: str) -> None:
    assert message in refusal(DataSource(source=f"{generator}:{name}", params=params))


def test_modules_that_are_not_there(tmp_path: Path) -> None:
    assert "there is no module 'no_such_package'" in refusal(DataSource(source="no_such_package.rows:f"))
    assert "there is no module 'rl.data.nothing'" in refusal(DataSource(source="rl.data.nothing:f"))
    assert "there is no file" in refusal(DataSource(source="no_such_file.py:f"))


@pytest.fixture
def local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads like a hub data set, without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", '{"q": "99"}\n{"q": "1"}\n')
    return tmp_path / "rows"


def test_data_sets_go_through_datasets(local_data_set: Path) -> None:
    rows = read_rows(DataSource(source=str(local_data_set), columns={"prompt": "q"}), key="data.train")
    assert [row.columns for row in rows] == [{"prompt": "99"}, {"prompt": "1"}]
    assert rows[1].place == f"{local_data_set} (train), row 2"


def test_data_sets_that_cannot_be_had(local_data_set: Path) -> None:
    assert 'Unknown split "tset"' in refusal(DataSource(source=str(local_data_set), split="tset"))
    assert "config 'zz'" in refusal(DataSource(source=str(local_data_set), config="zz"))
    assert "is no reachable data set of the hub" in refusal(DataSource(source=str(local_data_set / "none")))
    assert "is no reachable data set of the hub" in refusal(DataSource(source="no-such-name/nothing-here"))
    write(local_data_set / "train.jsonl", '{"q": "99"}\n{"q": "1')
    assert f"data.train: '{local_data_set}'" in refusal(DataSource(source=str(local_data_set)))
    write(local_data_set / "train.jsonl", "")
    assert f"data.train: '{local_data_set}'" in refusal(DataSource(source=str(local_data_set)))


def test_gsm8k_sample_gives_the_final_number() -> None:
    path = Path(__file__).parents[2] / "data" / "gsm8k_sample.jsonl"
    source = DataSource(
        source=str(path), columns={"prompt": "question", "answer": "answer"}, extract={"answer": r"####\s*(.+)"}
    )
    rows = read_rows(source, key="data.train")
    assert len(rows) == 64
    assert rows[0].columns["answer"] == "72" and rows[0].columns["prompt"].startswith("Natalia sold clips")
    raw = [json.loads(line)["answer"].rsplit("#### ", 1)[1] for line in path.read_text().splitlines()]
    assert [row.columns["answer"] for row in rows] == raw
