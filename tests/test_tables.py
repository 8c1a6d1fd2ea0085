from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from daskllm.tables import read_tables


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n007,"two\nlines"\n2,\n3,NA\n')
    (tmp_path / "b.csv").write_text("text,id\n猫,4\n")
    frame, rows, _ = read_tables([str(tmp_path / "*.csv")], slots=2)
    read = frame.compute()
    assert rows == 4
    assert read["id"].tolist() == ["007", "2", "3", "4"]
    assert read["text"].fillna("null").tolist() == ["two\nlines", "null", "NA", "猫"]


def test_jsonl_numbers_stay_whole_and_dates_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"n": 9007199254740993, "date": "2024-01-01"}\n{"n": null, "date": "007"}\n'
    )
    frame, _, kinds = read_tables([str(tmp_path / "a.jsonl")], slots=2)
    assert kinds == {}
    read = frame.compute()
    assert [None if pd.isna(n) else str(n) for n in read["n"]] == ["9007199254740993", None]
    assert read["date"].tolist() == ["2024-01-01", "007"]


@pytest.mark.parametrize(
    ("rows", "slots", "partitions"), [(10, 4, 1), (100, 4, 3), (1000, 4, 16), (3000, 1, 12)]
)
def test_one_file_is_cut_for_the_tasks_in_flight(
    tmp_path: Path, rows: int, slots: int, partitions: int
) -> None:
    pd.DataFrame({"x": range(rows)}).to_parquet(tmp_path / "a.parquet")
    frame, found, _ = read_tables([str(tmp_path)], slots)
    assert (found, frame.npartitions) == (rows, partitions)
    assert frame.compute()["x"].tolist() == list(range(rows))


def test_lists_stay_lists_and_their_kind_is_that_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"m": [{"role": "user"}], "all": null, "mixed": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"m": [{"role": "user", "name": "A"}], "all": [1], "mixed": true}\n')
    (tmp_path / "c.jsonl").write_text('{"m": null, "all": [1.5], "mixed": null}\n')
    frame, _, kinds = read_tables([str(tmp_path / "*.jsonl")], slots=1)
    assert frame.compute()["m"].tolist() == [[{"role": "user"}], [{"role": "user", "name": "A"}], None]
    message = pa.struct({"role": pa.string(), "name": pa.string()})
    assert kinds["m"] == pa.list_(message)
    assert kinds["all"] == pa.list_(pa.float64())


def test_scalars_of_several_types_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": "one"}\n{"x": null}\n')
    frame, _, kinds = read_tables([str(tmp_path / "a.jsonl")], slots=1)
    assert frame.compute()["x"].fillna("null").tolist() == ["1", "one", "null"]
    assert kinds == {}


@pytest.mark.parametrize(
    ("files", "pattern", "message"),
    [
        ({}, "*.csv", "no input file matches"),
        ({"a.txt": "x"}, "a.txt", "one kind out of .parquet, .csv"),
        ({"a.csv": "x\n1\n", "b.jsonl": '{"x": 1}\n'}, "*", "not .csv, .jsonl"),
        ({"a.csv": "x\n"}, "a.csv", "the input has no rows"),
        ({"a.csv": "x\n1\n", "b.csv": "y\n1\n"}, "*.csv", "column 'x' is not in every input file"),
        ({"a.jsonl": '{"x": 1}\n{"x"'}, "a.jsonl", "a.jsonl, line 2 is not JSON"),
        ({"a.jsonl": "[1]"}, "a.jsonl", "line 1 must be a JSON object"),
        ({"a.jsonl": '{"x": 1}\n', "b.jsonl": '{"x": "one"}\n'}, "*.jsonl", "types differ from the first"),
        ({"a.jsonl": '{"x": "one"}\n', "b.jsonl": '{"x": [1]}\n'}, "*.jsonl", "b.jsonl: .* 'x' holds lists"),
        ({"a.jsonl": '{"x": [1]}\n{"x": "one"}\n'}, "*.jsonl", "a.jsonl: column 'x' mixes kinds"),
        ({"a.jsonl": '{"x": [1]}\n', "b.jsonl": '{"x": "one"}\n'}, "*.jsonl", "types differ between"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, files: dict[str, str], pattern: str, message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_tables([str(tmp_path / pattern)], slots=1)[0].compute()
