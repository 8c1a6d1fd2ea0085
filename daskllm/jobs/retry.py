"""The failed rows of finished parts, asked again: their places picked out of the table, their answers put
back.

It owns that all other rows stay as they are, bit for bit. It refuses to know which parts have failed rows.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pyarrow as pa
from dask._expr import Expr
from dask.dataframe.dask_expr._expr import Elemwise

from daskllm.jobs.formats import as_arrow, decode, encode
from daskllm.jobs.lines import Lines
from daskllm.jobs.manifest import Manifest, Part
from daskllm.jobs.parts import ByNumber, Recipe, Written, failed_rows, store_part
from daskllm.runtime.call import Call

__all__ = ["Mended", "Picked", "check_retry", "mend_part", "pick_rows", "with_failed_rows"]


def check_retry(expr: Expr, recipe: Recipe, there: Manifest | None) -> None:
    """Refuse a job whose failed rows cannot be asked alone.

    Raises:
        ValueError: says why.
    """
    if there is None:
        raise ValueError(f"retry_errors: {recipe.directory.where} holds no job yet")
    if recipe.on_error == "drop":
        raise ValueError('retry_errors: with on_error="drop" the failed rows are gone; use overwrite=True')
    if not recipe.errors:
        raise ValueError("retry_errors: the columns that say which rows failed are not in the table any more")
    _asked(expr)


def with_failed_rows(expr: Expr, recipe: Recipe) -> Expr:
    """The table over the failed rows of its finished parts alone."""
    simple = expr.simplify()
    asked = _asked(expr)
    return simple.substitute(asked.frame, Picked(asked.frame, recipe))


def _asked(expr: Expr) -> Expr:
    """The node below which a table's rows are its parts' rows, one for one: that of its first call.

    Raises:
        ValueError: there is none.
    """
    simple = expr.simplify()
    first = [n for n in _with_call(simple) if not any(_with_call(one) for one in n.dependencies())]
    names = {node._name for node in first}
    if len(names) != 1 or not _is_over(simple, first[0]):
        raise ValueError(
            "retry_errors needs every row of the parts to be one row of the table that was asked, and later "
            "steps that go row by row: use overwrite=True, which finds the answers that are kept"
        )
    return first[0]


def _with_call(expr: Expr) -> list[Expr]:
    return [node for node in expr.walk() if any(isinstance(one, Call) for one in node.operands)]


def _is_over(node: Expr, asked: Expr) -> bool:
    """Whether a node goes row by row over that one and nothing else."""
    if node._name == asked._name:
        return True
    below = node.dependencies()
    return isinstance(node, Elemwise) and bool(below) and all(_is_over(one, asked) for one in below)


def pick_rows(table: pd.DataFrame, number: int, recipe: Recipe) -> pd.DataFrame:
    """The rows of a partition that failed in its part.

    Raises:
        ValueError: the part has not as many rows.
    """
    part = _told(number, recipe)
    if part.num_rows != len(table):
        raise ValueError(
            f"{recipe.name(number)} has {part.num_rows} rows, its partition {len(table)}: use overwrite=True"
        )
    return table.iloc[np.flatnonzero(failed_rows(part, recipe))]


def mend_part(table: pd.DataFrame, number: int, recipe: Recipe) -> Part:
    """Write a part again with these rows in the places of those that failed."""
    rows = np.flatnonzero(failed_rows(_told(number, recipe), recipe))
    new = as_arrow(table, recipe.form)
    data, form = recipe.directory.read(recipe.name(number)), recipe.form
    if form.kind != "parquet":
        again = Lines(data, form.kind).replaced(rows, Lines(bytes(encode(new, form, {})), form.kind))
        counted = (*recipe.errors, *recipe.read, *recipe.generated)
        return store_part(Lines(again, form.kind).table(counted), number, recipe, data=again)
    part = decode(data, form)
    new = new.cast(part.schema)
    places = np.arange(part.num_rows)
    places[rows] = part.num_rows + np.arange(len(rows))
    return store_part(pa.concat_tables([part, new]).take(pa.array(places)), number, recipe)


def _told(number: int, recipe: Recipe) -> pa.Table:
    """Of a part's rows what says whether they failed, at least."""
    data = recipe.directory.read(recipe.name(number))
    if recipe.form.kind == "parquet":
        return decode(data, recipe.form)
    return Lines(data, recipe.form.kind).table(recipe.errors)


class Picked(ByNumber):
    """The rows of a frame that failed in its parts.

    Parameters:
        frame: the table that was asked.
        recipe: of the parts, a `daskllm.jobs.parts.Recipe`.
    """

    operation = staticmethod(pick_rows)

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return self.frame._meta


class Mended(Written):
    """Parts written again with the frame's rows; a partition's value is its `Part`.

    Parameters:
        frame: the failed rows with their new answers.
        recipe: of the parts, a `daskllm.jobs.parts.Recipe`.
    """

    operation = staticmethod(mend_part)
    _verb = "mend"
