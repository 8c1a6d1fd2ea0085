"""Files of rows in, one dask frame out, cut into partitions of a size that suits generation.

Owns the file kinds (Parquet, CSV and JSON lines, the latter two also as ``.gz``) and the partitions' size.
Cells keep what the file says: nothing is guessed from a sample, so that 007 stays 007 and a late null changes
no type, and lists stay lists. It knows no model.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import is_object_dtype

__all__ = ["Tables", "input_files", "read_tables"]

ROWS_PER_PARTITION = 256
FEWEST_ROWS_PER_PARTITION = 32
PARTITION_BYTES = 64 << 20
"""Of a large Parquet file, row groups are read together up to so many bytes, decoded."""
_FOOTERS_AT_ONCE = 16
"""Threads that read the files' footers, which may be far away."""

_UNREADABLE = (OSError, ValueError, TypeError, LookupError, EOFError, zlib.error, pa.ArrowException)


def read_csv(path: str) -> pd.DataFrame:
    """A CSV file as text: it has no types of its own, so that 007 stays 007; an empty cell is null."""
    with _opened(path) as lines:
        _check_names(next(csv.reader(lines), []))  # pandas would rename the second of two
    table = pd.read_csv(path, dtype="string", keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("its rows have more cells than its header has names")
    return table


def read_jsonl(path: str) -> pd.DataFrame:
    """A file of JSON objects, one a line; strings stay strings, whole numbers stay whole beside nulls."""
    rows = []
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json_object(path, number, line))
    return pd.DataFrame(rows, dtype=object).apply(_typed)


def _opened(path: str) -> TextIO:
    # A mark of the byte order, which some editors write, is no part of the first name.
    if path.lower().endswith(".gz"):
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return open(path, encoding="utf-8-sig", newline="")


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"it has the column {twice!r} more than once: rename one of them")


def _typed(column: pd.Series) -> pd.Series:
    """A column of Python objects as the type that all of them have, if there is one that holds nulls too."""
    # convert_dtypes would take whole numbers beside nulls through float64, and round the large ones.
    whole = pd.api.types.infer_dtype(column, skipna=True) == "integer"
    try:
        typed = column.astype("Int64") if whole else column.convert_dtypes()
    except OverflowError:  # more digits than 64 bits have
        return column.map(str, na_action="ignore").astype("string")
    if not is_object_dtype(typed) or typed.isna().all() or typed.map(_is_nested).any():
        return typed
    return typed.astype("string")


def _is_nested(cell: Any) -> bool:
    return isinstance(cell, (list, dict))


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, not {line.strip()[:40]}")
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{path}, line {number} has half of a surrogate pair in it, which is no character: mend it, "
                "or take the line out"
            ) from None
    return row


_READERS: Mapping[str, Callable[[str], pd.DataFrame]] = {
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".ndjson": read_jsonl,
}


def _kind(path: str) -> str:
    """A file's suffix, with the one before ``.gz``."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say which file it is that cannot be read (ValueError)."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        said = str(error)
        raise ValueError(said if path in said else f"{path} cannot be read: {said}") from error


def read_part(path: str, suffix: str, like: pd.DataFrame) -> pd.DataFrame:
    """A file of lines, with the columns and types of the first."""
    with _naming(path):
        part = _READERS[suffix](path)
    if set(part.columns) != set(like.columns):
        raise ValueError(_not_in_all(path, set(part.columns) ^ set(like.columns)))
    for name, dtype in like.dtypes.items():
        if not is_object_dtype(dtype) and is_object_dtype(part[name]) and part[name].map(_is_nested).any():
            raise ValueError(f"{path}: types differ from the first input file's: {name!r} holds lists here")
    try:
        return part[list(like.columns)].astype(like.dtypes)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: types differ from the first input file's: {error}") from error


def read_groups(path: str, groups: Sequence[int], schema: bytes) -> pd.DataFrame:
    """Row groups of a Parquet file, in the types of all files.

    Args:
        schema: what all files have, serialised.
    """
    whole = pa.ipc.read_schema(pa.py_buffer(schema))
    with _naming(path), pq.ParquetFile(path) as file:
        table = file.read_row_groups(list(groups)).select(whole.names)
        for place, field in enumerate(whole):
            if not pa.types.is_nested(field.type):
                table = table.set_column(place, field, table.column(place).cast(field.type))
        # Of its own index, a file tells in its metadata.
        return _as_pandas(table.replace_schema_metadata(file.schema_arrow.metadata))


def _as_pandas(table: pa.Table) -> pd.DataFrame:
    """An Arrow table; an index of several levels becomes columns, as Dask has none."""
    frame = table.to_pandas()
    if not len(table):  # which has not the numbers that its metadata tells of, and so loses their name
        frame.index = frame.index.set_names(_named_range(table.schema) or frame.index.names)
    return frame.reset_index() if frame.index.nlevels > 1 else frame


def _not_in_all(path: str, columns: set[Any]) -> str:
    return f"{path}: column {min(map(str, columns))!r} is not in every input file"


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
    if odd := [file for file in files if not os.path.isfile(file)]:
        raise ValueError(f"{odd[0]} is no file, or a link to nothing")
    suffixes = sorted(set(map(_kind, files)))
    known = [".parquet", *_READERS]
    if len(suffixes) != 1 or suffixes[0] not in known:
        raise ValueError(
            f"input files must all be of one kind out of {', '.join(known)}, not {', '.join(suffixes)}"
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


def _footers(files: Sequence[str]) -> tuple[list[pq.FileMetaData], pa.Schema]:
    """What each Parquet file says of itself, and all columns in types that hold each file's.

    Raises:
        ValueError: one cannot be read, or has other columns or types than those before; with its name.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        footers = list(pool.map(_footer, files))
    whole = footers[0].schema.to_arrow_schema()
    for file, footer in zip(files[1:], footers[1:], strict=True):
        schema = footer.schema.to_arrow_schema()
        if differing := set(schema.names) ^ set(whole.names):
            raise ValueError(_not_in_all(file, differing))
        try:
            whole = pa.unify_schemas([whole, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{file}: types differ between the input files: {error}") from error
    return footers, pa.schema(map(_plain, whole), whole.metadata)


def _footer(file: str) -> pq.FileMetaData:
    with _naming(file):
        footer = pq.read_metadata(file)
        _check_names(footer.schema.to_arrow_schema().names)
        return footer


def _plain(field: pa.Field) -> pa.Field:
    """A column as its values: of categories, which may differ between files; of nulls, that may be text."""
    if pa.types.is_dictionary(field.type):
        return field.with_type(field.type.value_type)
    return field.with_type(pa.string()) if pa.types.is_null(field.type) else field


def _parquet(files: Sequence[str], footers: Sequence[pq.FileMetaData], whole: pa.Schema) -> dd.DataFrame:
    """The rows of Parquet files; a large one is several partitions."""
    # The numbers of an index of numbers in order are the file's, not a row group's.
    groups_of = _all_groups if _named_range(whole) else _together
    pieces = [(file, groups) for file, one in zip(files, footers, strict=True) for groups in groups_of(one)]
    paths, groups = zip(*pieces, strict=True)
    return dd.from_map(
        read_groups,
        paths,
        groups,
        schema=whole.serialize().to_pybytes(),
        meta=_as_pandas(whole.empty_table()),
    )


def _named_range(schema: pa.Schema) -> list[str]:
    """The name of a Parquet file's index, if it is one of numbers in order that has a name."""
    told = (schema.pandas_metadata or {}).get("index_columns", ())
    return [one["name"] for one in told if isinstance(one, dict) and one.get("name") is not None]


def _all_groups(footer: pq.FileMetaData) -> list[tuple[int, ...]]:
    return [tuple(range(footer.num_row_groups))]


def _together(footer: pq.FileMetaData) -> list[tuple[int, ...]]:
    """A file's row groups, those together that are read at once."""
    sizes = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    found: list[tuple[int, ...]] = [()]
    size = 0
    for number, more in enumerate(sizes):
        if found[-1] and size + more > PARTITION_BYTES:
            found.append(())
            size = 0
        found[-1] += (number,)
        size += more
    return found


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
        if suffix == ".parquet":
            footers, whole = _footers(files)
            frame = _parquet(files, footers, whole)
            rows = sum(footer.num_rows for footer in footers)
        else:
            with _naming(files[0]):
                like = _READERS[suffix](files[0]).iloc[:0]
            frame = dd.from_map(read_part, files, suffix=suffix, like=like, meta=like)
        if rows is None:
            rows = len(frame)
    if rows == 0:
        raise ValueError(f"the input has no rows: {', '.join(patterns)}")
    objects = [name for name, dtype in frame.dtypes.items() if is_object_dtype(dtype)]
    kinds: dict[str, pa.DataType] = {}
    if objects and suffix == ".parquet":
        kinds = _kinds([whole], [name for name in objects if name in whole.names])
    elif objects and partitions is None:
        found = dask.compute(*(dask.delayed(kinds_in)(file, suffix, like) for file in files))
        kinds = _kinds(found, objects)
    wanted = max(math.ceil(rows / ROWS_PER_PARTITION), min(4 * slots, rows // FEWEST_ROWS_PER_PARTITION))
    wanted = wanted if partitions is None else partitions
    cut = frame.repartition(npartitions=wanted) if wanted > frame.npartitions else frame
    return Tables(cut, rows, kinds)
