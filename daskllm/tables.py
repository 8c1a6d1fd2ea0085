"""Files of rows in, one dask frame out, cut into partitions of a size that suits generation.

Owns the file kinds (Parquet, CSV, JSON lines) and the partitions' size. Cells keep what the file says:
nothing is guessed from a sample, so that 007 stays 007 and a late null changes no type. It knows no model.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd

__all__ = ["read_tables"]

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
    return column.astype("Int64") if whole else column.convert_dtypes()


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, not {line.strip()[:40]}")
    return row


READERS: Mapping[str, Callable[[str], pd.DataFrame]] = {
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
    known = [".parquet", *READERS]
    if len(suffixes) != 1 or suffixes[0] not in known:
        raise ValueError(
            f"input files must all be of one kind out of {', '.join(known)}, not {', '.join(suffixes)}"
        )
    return files, suffixes[0]


def read_tables(patterns: Sequence[str], slots: int) -> tuple[dd.DataFrame, int]:
    """The input as one dask frame, cut so that `slots` tasks in flight stay busy; and its number of rows."""
    files, suffix = input_files(patterns)
    if suffix == ".parquet":
        frame = dd.read_parquet(files)
    else:
        like = READERS[suffix](files[0]).iloc[:0]
        frame = dd.from_map(read_part, files, suffix=suffix, like=like, meta=like)
    rows = len(frame)
    if rows == 0:
        raise ValueError(f"the input has no rows: {', '.join(patterns)}")
    wanted = max(math.ceil(rows / ROWS_PER_PARTITION), min(4 * slots, rows // FEWEST_ROWS_PER_PARTITION))
    return (frame.repartition(npartitions=wanted) if wanted > frame.npartitions else frame), rows
