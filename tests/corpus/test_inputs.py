"""Files of rows, good, odd and broken, through the command: what is answered, and what is refused before any
row is."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.conftest import Command, refused

Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Input:
    """Files that are made, and what comes of them.

    Attributes:
        make: writes files whose names begin with "in" into a directory.
        words: of the refusal; empty where the rows are answered.
        rows, errors: of an answered table.
    """

    name: str
    make: Make
    words: tuple[str, ...] = ()
    rows: int = 0
    errors: int = 0


def text(name: str, content: str | bytes) -> Make:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / name).write_bytes(data)


def both(*makes: Make) -> Make:
    return lambda path: [make(path) for make in makes]


def parquet(name: str, table: pd.DataFrame | pa.Table) -> Make:
    arrow = table if isinstance(table, pa.Table) else pa.Table.from_pandas(table)
    return lambda path: pq.write_table(arrow, path / name)


def column(values: Any, **options: Any) -> pd.DataFrame:
    return pd.DataFrame({"text": values}, **options)


ROWS = column(["a", "b", "c"])
JSONL = "".join(json.dumps({"text": letter, "id": i}) + "\n" for i, letter in enumerate("abc"))
PACKED = gzip.compress(("text\n" + "".join(f"row {i}\n" for i in range(5000))).encode())


def whole_bytes(table: pd.DataFrame) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(table), sink)
    return sink.getvalue().to_pybytes()


def with_rubbish(path: Path) -> None:
    """A Parquet file whose footer is whole and whose rows are not."""
    noise = column(["".join(chr(97 + i * j % 26) for j in range(50)) for i in range(200)])
    data = bytearray(whole_bytes(noise))
    data[100:400] = bytes(300)
    (path / "in.parquet").write_bytes(data)


def two_of_a_name(path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path / "in.parquet"
    )


def deep(path: Path) -> None:
    """A row, and one that is nested more deeply than Python reads."""
    (path / "in.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")


WIDE = pd.concat([ROWS, pd.DataFrame(0, index=range(3), columns=[f"c{i}" for i in range(2000)])], axis=1)
INDEXED = column(["a", "b", "c"], index=pd.Index(["x", "y", "z"], name="key"))
NUMBERED = column(["a", "b", "c"], index=pd.RangeIndex(5, 8, name="number"))
INTEGERS = column(["a", "b", "c"], index=pd.Index([3, 1, 2], name="number"))
LEVELS = column(["a", "b"], index=pd.MultiIndex.from_tuples([(1, "x"), (2, "y")], names=["n", "k"]))

INPUTS = [
    # --- text files
    Input("CSV", text("in.csv", "text\na\nb\n"), rows=2),
    Input("CSV of no bytes", text("in.csv", ""), ("in.csv cannot be read", "No columns")),
    Input("CSV of a header", text("in.csv", "text\n"), ("has no rows",)),
    Input("CSV with a mark of the byte order", text("in.csv", b"\xef\xbb\xbftext\na\n"), rows=1),
    Input("CSV that is no UTF-8", text("in.csv", b"text\n\xff\xfe\n"), ("in.csv cannot be read", "utf-8")),
    Input("CSV in UTF-16", text("in.csv", "text\na\n".encode("utf-16")), ("in.csv cannot be read",)),
    Input(
        "CSV with a longer row", text("in.csv", "text,id\na,1\nb,2,3\n"), ("in.csv cannot be read", "line 3")
    ),
    Input("CSV of longer rows", text("in.csv", "text,id\na,1,9\nb,2,9\n"), ("more cells than its header",)),
    Input("CSV with a shorter row", text("in.csv", "id,text\n1,a\n2\n"), rows=2, errors=1),
    Input("CSV with an open quote", text("in.csv", 'text\n"a\nb\n'), ("in.csv cannot be read", "EOF")),
    Input("CSV with empty cells", text("in.csv", "id,text\n1,\n2,b\n"), rows=2, errors=1),
    Input("CSV with two columns of a name", text("in.csv", "text,text\na,b\n"), ("'text' more than once",)),
    Input("CSV with NUL", text("in.csv", b"text\na\x00b\nc\n"), rows=2),
    Input("CSV in gzip", text("in.csv.gz", PACKED), rows=5000),
    Input(
        "gzip that ends in the middle", text("in.csv.gz", PACKED[: len(PACKED) // 2]), ("in.csv.gz cannot",)
    ),
    Input("gzip that is none", text("in.jsonl.gz", JSONL), ("in.jsonl.gz cannot be read", "gzip")),
    Input(
        "gzip with a byte changed",
        text("in.csv.gz", PACKED[:99] + b"!!" + PACKED[101:]),
        ("in.csv.gz cannot",),
    ),
    Input("JSON lines in gzip", text("in.jsonl.gz", gzip.compress(JSONL.encode())), rows=3),
    Input("JSON lines of no bytes", text("in.jsonl", ""), ("has no rows",)),
    Input("JSON lines with empty lines", text("in.jsonl", "\n" + JSONL + "\n\n"), rows=3),
    Input("JSON lines with a mark", text("in.jsonl", b"\xef\xbb\xbf" + JSONL.encode()), rows=3),
    Input("JSON lines cut off", text("in.jsonl", JSONL[:-5]), ("in.jsonl, line 3 is not JSON",)),
    Input("a JSON list", text("in.jsonl", '[{"text": "a"}]'), ("line 1 must be a JSON object",)),
    Input("JSON with a comment", text("in.jsonl", '# rows\n{"text": "a"}\n'), ("line 1 is not JSON",)),
    Input(
        "JSON lines that are no UTF-8", text("in.jsonl", b'{"text": "\xff"}\n'), ("in.jsonl cannot", "utf-8")
    ),
    Input(
        "JSON with half a pair", text("in.jsonl", JSONL + '{"text": "\\ud800"}\n'), ("line 4 has half of a",)
    ),
    Input("JSON with a whole pair", text("in.jsonl", '{"text": "\\ud83d\\ude00"}\n'), rows=1),
    Input("JSON with NaN", text("in.jsonl", '{"text": NaN}\n{"text": 1.5}\n'), rows=2, errors=1),
    Input("JSON with a key missing", text("in.jsonl", '{"text": "a"}\n{"id": 1}\n'), rows=2, errors=1),
    Input("JSON with no used key", text("in.jsonl", '{"id": 1}\n'), ("no column 'text'",)),
    Input("JSON of nulls", text("in.jsonl", '{"text": null}\n' * 3), rows=3, errors=3),
    Input("JSON of 90 digits", text("in.jsonl", '{"text": ' + "7" * 90 + "}\n"), rows=1),
    Input("JSON nested 100,000 deep", deep, ("in.jsonl, line 2 is not JSON",)),
    Input(
        "JSON, and text where lists were",
        both(text("in1.jsonl", '{"text": [1, 2]}\n'), text("in2.jsonl", '{"text": "a"}\n')),
        ("types differ",),
    ),
    Input(
        "other columns in the second",
        both(text("in1.jsonl", '{"text": "a"}\n'), text("in2.jsonl", '{"txt": "a"}\n')),
        ("in2.jsonl", "'text'"),
    ),
    Input(
        "numbers, and text in the second",
        both(text("in1.jsonl", '{"text": 1}\n'), text("in2.jsonl", '{"text": "a"}\n')),
        ("in2.jsonl: types differ",),
    ),
    Input(
        "the columns in another order",
        both(text("in1.csv", "id,text\n1,a\n"), text("in2.csv", "text,id\nb,2\n")),
        rows=2,
    ),
    # --- Parquet
    Input("Parquet", parquet("in.parquet", ROWS), rows=3),
    Input("Parquet of no bytes", text("in.parquet", ""), ("in.parquet cannot be read",)),
    Input("Parquet that is none", text("in.parquet", "text\na\n"), ("in.parquet cannot be read",)),
    Input("Parquet cut off", text("in.parquet", whole_bytes(ROWS)[:-30]), ("in.parquet cannot be read",)),
    Input("Parquet with rubbish in it", with_rubbish, ("in.parquet",)),
    Input("Parquet without rows", parquet("in.parquet", ROWS.iloc[:0]), ("has no rows",)),
    Input(
        "Parquet without rows among others",
        both(parquet("in1.parquet", ROWS), parquet("in2.parquet", ROWS.iloc[:0])),
        rows=3,
    ),
    Input(
        "one good file and one that is none",
        both(parquet("in1.parquet", ROWS), text("in2.parquet", "PAR1")),
        ("in2.parquet cannot be read",),
    ),
    Input("Parquet with two columns of a name", two_of_a_name, ("'text' more than once",)),
    Input(
        "Parquet with a column more",
        both(parquet("in1.parquet", ROWS), parquet("in2.parquet", ROWS.assign(more=1))),
        ("in2.parquet", "'more'"),
    ),
    Input(
        "Parquet with a column less",
        both(parquet("in1.parquet", ROWS.assign(more=1)), parquet("in2.parquet", ROWS)),
        ("in2.parquet", "'more'"),
    ),
    Input(
        "text, and numbers in the second",
        both(parquet("in1.parquet", ROWS), parquet("in2.parquet", column([1, 2]))),
        ("in2.parquet: types differ",),
    ),
    Input(
        "int32, and int64 in the second",
        both(
            parquet("in1.parquet", column(np.array([1], "int32"))),
            parquet("in2.parquet", column(np.array([1 << 40], "int64"))),
        ),
        rows=2,
    ),
    Input(
        "whole numbers, and fractions in the second",
        both(parquet("in1.parquet", column([1, 2])), parquet("in2.parquet", column([0.5]))),
        rows=3,
    ),
    Input(
        "nulls, and text in the second",
        both(parquet("in1.parquet", column([None, None])), parquet("in2.parquet", ROWS)),
        rows=5,
        errors=2,
    ),
    Input(
        "text, and nulls in the second",
        both(parquet("in1.parquet", ROWS), parquet("in2.parquet", column([None, None]))),
        rows=5,
        errors=2,
    ),
    Input("nothing but nulls", parquet("in.parquet", column([None, None])), rows=2, errors=2),
    Input("an index of text", parquet("in.parquet", INDEXED), rows=3),
    Input("a numbering with a name", parquet("in.parquet", NUMBERED), rows=3),
    Input("an index of numbers with a name", parquet("in.parquet", INTEGERS), rows=3),
    Input("an index of levels", parquet("in.parquet", LEVELS), rows=2),
    Input(
        "an index in one file alone",
        both(parquet("in1.parquet", INDEXED), parquet("in2.parquet", ROWS)),
        ("in2.parquet", "'key'"),
    ),
    Input("categories", parquet("in.parquet", column(pd.Categorical(["a", None, "b"]))), rows=3, errors=1),
    Input(
        "categories that differ",
        both(
            parquet("in1.parquet", column(pd.Categorical(["a", "b"]))),
            parquet("in2.parquet", column(pd.Categorical(["c"]))),
        ),
        rows=3,
    ),
    Input("bytes", parquet("in.parquet", column([b"a", b"\xff"])), rows=2, errors=2),
    Input(
        "dates", parquet("in.parquet", column(pd.date_range("2024", periods=2, tz="UTC"))), rows=2, errors=2
    ),
    Input(
        "decimals",
        parquet("in.parquet", pa.table({"text": pa.array(["1.5"]).cast(pa.decimal128(9, 2))})),
        rows=1,
    ),
    Input("token ids", parquet("in.parquet", column([[1, 2], [3], None])), rows=3, errors=1),
    Input("lists of lists", parquet("in.parquet", column([[[1], [2]]])), rows=1, errors=1),
    Input("structs", parquet("in.parquet", column([{"a": 1}, None])), rows=2, errors=2),
    Input(
        "large text", parquet("in.parquet", pa.table({"text": pa.array(["a"], pa.large_string())})), rows=1
    ),
    Input("2,000 columns", parquet("in.parquet", WIDE), rows=3),
    # --- places
    Input("no file", lambda path: None, ("no input file matches 'in*'",)),
    Input("a kind that is not known", text("in.xlsx", "x"), ("must all be of one kind", ".xlsx")),
    Input("two kinds", both(text("in.csv", "text\na\n"), text("in.jsonl", JSONL)), (".csv, .jsonl",)),
    Input("a directory of none", lambda path: (path / "in").mkdir(), ("no input file matches",)),
    Input(
        "a directory of Parquet",
        lambda path: ((path / "in").mkdir(), parquet("in/a.parquet", ROWS)(path)),
        rows=3,
    ),
    Input("a link to nothing", lambda path: os.symlink("gone.parquet", path / "in.parquet"), ("in.parquet",)),
    Input("a pipe", lambda path: os.mkfifo(path / "in.csv"), ("in.csv", "is no file")),
]


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.name)
def test_input_files(generate: Command, tmp_path: Path, given: Input) -> None:
    given.make(tmp_path)
    done = generate()
    if given.words:
        refused(done, *given.words)
        assert list((tmp_path / "out").glob("part.*")) == []
        return
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["rows"], told["errors"]) == (given.rows, given.errors)
    table = pd.read_parquet(tmp_path / "out")
    assert len(table) == given.rows
    assert int(table["generated_error"].notna().sum()) == given.errors


def test_an_index_comes_back(generate: Command, tmp_path: Path) -> None:
    for number, table in enumerate((INDEXED, NUMBERED, INTEGERS, LEVELS)):
        table.to_parquet(tmp_path / f"in{number}.parquet")
        done = generate(inputs=f"in{number}.parquet", output=f"out{number}")
        assert done.exit_code == 0, (done.output, done.exception)
        found = pd.concat(
            pd.read_parquet(part) for part in sorted((tmp_path / f"out{number}").glob("part.*"))
        )
        flat = found.reset_index() if found.index.name else found
        names = list(table.index.names)
        assert flat[names].to_numpy().tolist() == table.reset_index()[names].to_numpy().tolist()


def test_a_file_that_goes_in_the_middle_of_a_job(generate: Command, tmp_path: Path) -> None:
    for number in range(4):
        column([f"row {number}"]).to_parquet(tmp_path / f"in{number}.parquet")
    shutil.copytree(tmp_path, tmp_path / "kept")
    whole = generate(output="whole")
    assert whole.exit_code == 0
    assert generate().exit_code == 0
    part = sorted((tmp_path / "out").glob("part.*"))[2]
    part.unlink()
    (tmp_path / "in2.parquet").unlink()
    refused(generate(), "in2.parquet: is not there now")
    shutil.copy2(tmp_path / "kept" / "in2.parquet", tmp_path / "in2.parquet")
    (tmp_path / "in2.parquet").write_bytes(b"\0" * (tmp_path / "in2.parquet").stat().st_size)
    stat = (tmp_path / "kept" / "in2.parquet").stat()
    os.utime(tmp_path / "in2.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(generate(), "in2.parquet")  # it is there, and none
    assert len(list((tmp_path / "out").glob("part.*"))) == 3
    shutil.copy2(tmp_path / "kept" / "in2.parquet", tmp_path / "in2.parquet")
    assert generate().exit_code == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out"), pd.read_parquet(tmp_path / "whole"))
