"""A job's parts as Dask tasks: each partition is written where it was made, and only a record comes back.

It owns what a write task does and which rows count as failed. It refuses to know which parts are needed, and
who waits for them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask._task_spec import Task, TaskRef
from dask.dataframe.dask_expr._expr import Blockwise

from daskllm.jobs.directory import Directory, Entry
from daskllm.jobs.formats import Format, as_arrow, decode, encode, told_by
from daskllm.jobs.manifest import Part
from daskllm.types import RowError

__all__ = [
    "ByNumber",
    "Recipe",
    "Written",
    "failed_rows",
    "part_name",
    "read_part",
    "store_part",
    "takers",
    "write_part",
]

_SUFFIXES = {"parquet": ".parquet", "jsonl": ".jsonl", "csv": ".csv"}
_DIGITS = 5

takers: dict[str, Callable[[Part], None]] = {}
"""Who in this process hears of a run's parts as they are written, by the run's name. Dask's threads tell of
no task before the last."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the partitions of a run become parts.

    Attributes:
        run: a name that no other run has.
        job: the job's key.
        parts: how many there are.
        directory: where they go.
        form: how they are written.
        says: what each file says of the job that made it.
        errors: the columns that say why a row failed.
        read, generated: the columns that count tokens.
        on_error: "keep", "drop" or "raise".
    """

    run: str
    job: str
    parts: int
    directory: Directory
    form: Format
    says: dict[str, Any]
    errors: tuple[str, ...]
    read: tuple[str, ...]
    generated: tuple[str, ...]
    on_error: str = "keep"

    def __dask_tokenize__(self) -> str:
        return self.run

    def name(self, number: int) -> str:
        """The file of a part."""
        return part_name(number, self.job, self.parts, self.form.kind)


def part_name(number: int, job: str, parts: int, kind: str) -> str:
    """The file of a part, by its position and its job; in the order of names, 10 comes after 9.

    >>> part_name(10, "5f", 12, "parquet")
    'part.00010-5f.parquet'
    """
    digits = max(_DIGITS, len(str(parts - 1)))
    return f"part.{number:0{digits}}-{job}{_SUFFIXES[kind]}"


def _sidecar(name: str) -> str:
    """The file beside a part whose kind has no place for what it says of itself."""
    return f"_{name}.json"


def write_part(table: pd.DataFrame, number: int, recipe: Recipe) -> Part:
    """Write a partition as a part, and tell of it.

    Raises:
        RowError: a row failed, and that is to end the job; nothing was written.
        OSError: the part cannot be written; what was there stays.
    """
    arrow = as_arrow(table, recipe.form)
    failed = failed_rows(arrow, recipe)
    why = _first_reason(arrow, recipe, failed)
    if why is not None and recipe.on_error == "raise":
        raise RowError(f"row {int(failed.argmax())} of part {number} failed: {why}")
    if why is None or recipe.on_error == "keep":
        return store_part(arrow, number, recipe)
    return store_part(arrow.filter(pa.array(~failed)), number, recipe, int(failed.sum()), why)


def failed_rows(table: pa.Table, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Which rows failed, bool ``[rows]``."""
    failed = np.zeros(table.num_rows, dtype=bool)
    for column in recipe.errors:
        failed |= table.column(column).is_valid().to_numpy()
    return failed


def _first_reason(table: pa.Table, recipe: Recipe, failed: npt.NDArray[np.bool_]) -> str | None:
    if not failed.any():
        return None
    cells = (table.column(column)[int(failed.argmax())].as_py() for column in recipe.errors)
    return next(str(cell) for cell in cells if cell is not None)


def store_part(
    table: pa.Table,
    number: int,
    recipe: Recipe,
    dropped: int = 0,
    why: str | None = None,
    data: bytes | None = None,
) -> Part:
    """Write a table as a part over what is there of it, and tell of it.

    Args:
        dropped: rows that failed and are not in the table.
        why: what the first of them says.
        data: the file, where it is made already; of the table, errors and counts of tokens then suffice.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    failed = failed_rows(table, recipe)
    why = why or _first_reason(table, recipe, failed)
    counts = {
        "rows": table.num_rows,
        "errors": int(failed.sum()) + dropped,
        "prompt_tokens": _sum(table, recipe.read),
        "out_tokens": _sum(table, recipe.generated),
        "why": None if recipe.form.key else why,  # it may quote what is encrypted
    }
    name = recipe.name(number)
    says = {"job": recipe.job, "part": number, "parts": recipe.parts, **counts, "facts": recipe.says}
    written = encode(table, recipe.form, says) if data is None else data
    digest = _digest(written)
    try:
        if recipe.form.kind != "parquet":
            beside = says | {"digest": digest}
            recipe.directory.write(_sidecar(name), json.dumps(beside, ensure_ascii=False).encode())
        entry = recipe.directory.write(name, written, same=True)
    except OSError as error:
        raise _refused(error, name, recipe) from error
    part = Part(number, name, entry.size, entry.stamp, digest, **counts)
    take = takers.get(recipe.run)
    if take is not None:
        take(part)
    return part


def _sum(table: pa.Table, columns: tuple[str, ...]) -> int:
    return sum(pc.sum(table.column(column)).as_py() or 0 for column in columns)


def _refused(error: OSError, name: str, recipe: Recipe) -> OSError:
    why = "the disk or the quota is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    text = (
        f"{name} cannot be written to {recipe.directory.where}: {why or error}. What was finished stays, and "
        "the same call goes on from there"
    )
    return OSError(error.errno, text) if error.errno else OSError(text)


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_part(number: int, known: Part | None, entry: Entry, recipe: Recipe) -> Part | None:
    """The record of a part's file, None where it is not what was written.

    A file that has not been touched since it was recorded is not read.

    Args:
        known: what was recorded of it, if anything.
        entry: what the directory says of it.
    """
    name = recipe.name(number)
    if known is not None and known.name == name and (known.size, known.stamp) == (entry.size, entry.stamp):
        return known
    try:
        data = recipe.directory.read(name)
        if known is not None and known.name == name and known.digest == _digest(data):
            says: dict[str, Any] = asdict(known)
        elif recipe.form.kind == "parquet":
            says = told_by(decode(data, recipe.form)) | {"number": number}
        else:
            says = json.loads(recipe.directory.read(_sidecar(name))) | {"number": number}
            if says["digest"] != _digest(data):
                return None
        if says.get("job", recipe.job) != recipe.job or says.get("part", number) != number:
            return None
        counts = {n: says[n] for n in ("rows", "errors", "prompt_tokens", "out_tokens", "why")}
    except (OSError, ValueError, LookupError, pa.ArrowException):
        return None
    return Part(number, name, entry.size, entry.stamp, _digest(data), **counts)


class ByNumber(Blockwise):  # type: ignore[misc]
    """A node whose tasks know the number of their partition."""

    _parameters = ["frame", "recipe"]  # noqa: RUF012  (as in every expression of Dask)
    operation: Callable[..., Any]

    def _task(self, name: Any, index: int) -> Task:
        return Task(name, type(self).operation, TaskRef((self.frame._name, index)), index, self.recipe)


class Written(ByNumber):
    """A table's partitions written as parts; a partition's value is its `Part`.

    Parameters:
        frame: the table.
        recipe: how they are written, a `Recipe`.
    """

    operation = staticmethod(write_part)
    _verb = "write"

    @functools.cached_property
    def _name(self) -> str:
        return f"{self._verb}-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> None:
        return None

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.frame.npartitions + 1)
