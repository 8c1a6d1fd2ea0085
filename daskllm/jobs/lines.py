"""The rows of a part of JSON lines or CSV as the bytes that they are, so that some change and no other.

It owns where a row begins and ends in such a file. It refuses to know which rows are to change.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["Lines"]


class Lines:
    r"""A part's rows.

    Args:
        data: the file.
        kind: "jsonl" or "csv".

    Example:
        >>> part = Lines(b'"id","text"\n1,"two\nlines"\n2,"b"\n', "csv")
        >>> len(part), part.column("text")
        (2, ['two\nlines', 'b'])
        >>> part.replaced([0], Lines(b'"id","text"\n1,"one"\n', "csv"))
        b'"id","text"\n1,"one"\n2,"b"\n'
    """

    def __init__(self, data: bytes, kind: str) -> None:
        self._kind = kind
        records = _records(data) if kind == "csv" else data.splitlines(keepends=True)
        self._head, self._rows = (records[:1], records[1:]) if kind == "csv" else ([], records)

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        """A column's cells, in CSV as text; null where there is none."""
        if self._kind != "csv":
            return [json.loads(row).get(name) for row in self._rows]
        place = _cells(self._head[0]).index(name)
        return [_cells(row)[place] or None for row in self._rows]

    def table(self, names: Sequence[str]) -> pa.Table:
        """Some columns, those of numbers as such."""
        columns = {name: self.column(name) for name in names}
        return pa.table({name: pa.array(_numbers(cells)) for name, cells in columns.items()})

    def replaced(self, places: Sequence[int] | np.ndarray, new: Lines) -> bytes:
        """The file with other rows in some places."""
        rows = list(self._rows)
        for place, row in zip(places, new._rows, strict=True):
            rows[place] = row
        return b"".join([*self._head, *rows])


def _numbers(cells: Sequence[Any]) -> Sequence[Any]:
    """The cells as whole numbers, where all are."""
    whole = all(c is None or isinstance(c, int) or (isinstance(c, str) and c.isdecimal()) for c in cells)
    return [None if c is None else int(c) for c in cells] if whole else cells


def _records(data: bytes) -> list[bytes]:
    """The lines of CSV, those together that one quoted cell is spread over."""
    found: list[bytes] = []
    open_quote = False
    for line in data.splitlines(keepends=True):
        if open_quote:
            found[-1] += line
        else:
            found.append(line)
        open_quote ^= line.count(b'"') % 2 == 1
    return found


def _cells(record: bytes) -> list[str]:
    return next(csv.reader([record.decode()]))
