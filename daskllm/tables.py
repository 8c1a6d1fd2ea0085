"""Files of rows in, one dask frame out, cut into partitions of a size that suits generation.

Owns the file kinds (Parquet, CSV, JSON lines) and the partitions' size. Cells keep what the file says:
nothing is guessed from a sample, so that 007 stays 007 and a late null changes no type, and lists stay lists.
It knows no model.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import is_object_dtype

__all__ = ["Tables", "input_files", "read_tables"]

ROWS_PER_PARTITION = 256
FEWEST_ROWS_PER_PARTITION = 32


def read_csv(path: str) -> pd.DataFrame:
    """A CSV file as text: it has no types of its own, so that 007 stays 007; an empty cell is null."""
    return pd.read_csv(path, dtype="string", keep_default_na=False, na_values=[""])


def read_jsonl(path: str) -> pd.DataFrame:
    """A file of JSON objects, one a line; strings stay strings, whole numbers stay whole beside nulls."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json_object(path, number, line))
    return pd.DataFrame(rows, dtype=object).apply(_typed)


def _typed(column: pd.Series) -> pd.Series:
    """A column of Python objects as the type that all of them have, if there is one that holds nulls too."""
    # convert_dtypes would take whole numbers beside nulls through float64, and round the large ones.
    whole = pd.api.types.infer_dtype(column, skipna=True) == "integer"
    typed = column.astype("Int64") if whole else column.convert_dtypes()
    if not is_object_dtype(typed) or typed.isna().all() or typed.map(_is_nested).any():
        return typed
    return typed.astype("string")


def _is_nested(cell: Any) -> bool:
    return isinstance(cell, (list, dict))


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, not {line.strip()[:40]}")
    return row


READERS: Mapping[str, Callable[[str], pd.DataFrame]] = {
    ".parquet": pd.read_parquet,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
}


def read_part(path: str, suffix: str, like: pd.DataFrame) -> pd.DataFrame:
    """One file, with the columns and types of the first."""
    part = READERS[suffix](path)
    if set(part.columns) != set(like.columns):
        differing = sorted(set(part.columns) ^ set(like.columns))
        raise ValueError(f"{path}: column {differing[0]!r} is not in every input file")
    for name, dtype in like.dtypes.items():
        if not is_object_dtype(dtype) and is_object_dtype(part[name]) and part[name].map(_is_nested).any():
            raise ValueError(f"{path}: types differ from the first input file's: {name!r} holds lists here")
    try:
        return part[list(like.columns)].astype(like.dtypes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: types differ from the first input file's: {error}") from error


def input_files(patterns: Sequence[str]) -> tuple[list[str], str]:
    """The files that the patterns match, sorted within a pattern, and their one suffix."""
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        inside = [sorted(glob.glob(f"{f}/*.parquet")) if os.path.isdir(f) else [f] for f in found]
        matched = [file for group in inside for file in group]
        if not matched:
            raise FileNotFoundError(f"no input file matches {pattern!r}")
        files += [os.path.abspath(file) for file in matched]  # workers have directories of their own
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    if len(suffixes) != 1 or suffixes[0] not in READERS:
        raise ValueError(
            f"input files must all be of one kind out of {', '.join(READERS)}, not {', '.join(suffixes)}"
        )
    return files, suffixes[0]


class Tables(NamedTuple):
    """The input.

    Attributes:
        frame: its rows.
        rows: how many.
        kinds: of the columns that pandas holds as Python objects (lists, structs, dates, ...), what they are;
            Dask guesses that such a column is text.
    """

    frame: dd.DataFrame
    rows: int
    kinds: dict[str, pa.DataType]


def kinds_in(path: str, suffix: str, like: pd.DataFrame) -> pa.Schema:
    """What the columns of objects hold in one file."""
    part = read_part(path, suffix, like)
    fields = []
    for name in filter(lambda name: is_object_dtype(like[name]), like.columns):
        try:
            fields.append(pa.field(name, pa.array(part[name], from_pandas=True).type))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: column {name!r} mixes kinds of values: {error}") from error
    return pa.schema(fields)


def _kinds(schemas: Sequence[pa.Schema], columns: Sequence[str]) -> dict[str, pa.DataType]:
    """What all files agree on for some columns; text where all are null."""
    chosen = [pa.schema([schema.field(name) for name in columns]) for schema in schemas]
    try:
        merged = pa.unify_schemas([s.remove_metadata() for s in chosen], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"types differ between the input files: {error}") from error
    return {field.name: pa.string() if pa.types.is_null(field.type) else field.type for field in merged}


def read_tables(
    patterns: Sequence[str], slots: int, partitions: int | None = None, rows: int | None = None
) -> Tables:
    """The input as one dask frame, cut so that `slots` tasks in flight stay busy.

    Args:
        partitions: how many it is cut into, where that is known.
        rows: how many it has, where that is known, so that nothing is read to count them.

    Raises:
        ValueError: files of several kinds or of different columns or types, or no rows.
        FileNotFoundError: a pattern that nothing matches.
    """
    files, suffix = input_files(patterns)
    # Dask would make text of every column of objects, of lists too.
    with dask.config.set({"dataframe.convert-string": False}):
        if suffix == ".parquet" and not _has_named_range(files[0]):
            frame = dd.read_parquet(files)
        else:
            like = READERS[suffix](files[0]).iloc[:0]
            frame = dd.from_map(read_part, files, suffix=suffix, like=like, meta=like)
        if rows is None:
            rows = len(frame)
    if rows == 0:
        raise ValueError(f"the input has no rows: {', '.join(patterns)}")
    objects = [name for name, dtype in frame.dtypes.items() if is_object_dtype(dtype)]
    kinds: dict[str, pa.DataType] = {}
    if objects and suffix == ".parquet":
        kinds = _kinds([pq.read_schema(file) for file in files], objects)
    elif objects and partitions is None:
        found = dask.compute(*(dask.delayed(kinds_in)(file, suffix, like) for file in files))
        kinds = _kinds(found, objects)
    wanted = max(math.ceil(rows / ROWS_PER_PARTITION), min(4 * slots, rows // FEWEST_ROWS_PER_PARTITION))
    wanted = wanted if partitions is None else partitions
    cut = frame.repartition(npartitions=wanted) if wanted > frame.npartitions else frame
    return Tables(cut, rows, kinds)


def _has_named_range(path: str) -> bool:
    """Whether a Parquet file has an index of numbers in order with a name, which Dask cannot read."""
    told = (pq.read_schema(path).pandas_metadata or {}).get("index_columns", ())
    return any(isinstance(index, dict) and index.get("name") is not None for index in told)
