"""The Dask expression of an answered table: what the optimiser may know so that the model runs on few rows.

Only the columns that a call adds need the model. So a length, an index, a selection of other columns and a
filter over other columns pass below the model; columns that nobody reads are not read; `head` and `tail`
answer the rows that they show. The rules work on `dask.dataframe.dask_expr`'s nodes and keep its promises: a
node's name is a hash of what it computes, partitions and divisions are the input's.

When all that is done, an answered table is lowered to what its tasks are: a cut of each partition, slices
that the model runs on, a merge with the partition. Slices are no block-wise node: Dask fuses the merge with
what comes after, and a slice with nothing.

It refuses to know how a call is made and what a task does.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import pandas as pd
from dask._task_spec import Task, TaskRef
from dask.dataframe.dask_expr._cumulative import CumulativeAggregations
from dask.dataframe.dask_expr._expr import (
    And,
    Blockwise,
    Elemwise,
    Expr,
    Filter,
    Index,
    Partitions,
    Projection,
    are_co_aligned,
    determine_column_projection,
    is_filter_pushdown_available,
)

from daskllm.runtime.call import Call
from daskllm.runtime.columns import labels_of, names
from daskllm.runtime.local import protect
from daskllm.runtime.slices import (
    PLACE,
    answer_slice,
    answer_table,
    cut_table,
    merge_table,
    number_rows,
    slice_key,
    slices_for,
)

__all__ = ["Answered", "Cut", "Merged", "Numbered", "Sliced", "Whole", "answered", "asked_of"]


def answered(frame: Expr, call: Call) -> Expr:
    """``frame`` with the columns of ``call``."""
    return Answered(asked_of(frame, call), call)


def asked_of(frame: Expr, call: Call) -> Expr:
    """What ``call`` is asked of: ``frame``, with its rows' places where draws start from them."""
    return Numbered(frame, None) if call.by_place else frame


class Numbered(CumulativeAggregations):  # type: ignore[misc]
    """A frame with its rows' places, for draws that start from them.

    A place is given before any filter, so that a row draws the same whether or not others are dropped. Being
    a running count, it is to the optimiser what a cumulative sum is: no filter passes below it, and it stays
    aligned with its input.

    Parameters:
        frame: the table.
        numbers: the partitions' own numbers where only some are left, else None.
    """

    _parameters = ["frame", "numbers"]  # noqa: RUF012  (as in every expression of Dask)
    _is_length_preserving = True

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return number_rows(self.frame._meta, 0)

    def _divisions(self) -> tuple[Any, ...]:
        # Not the parent class's `frame._divisions()`, which forgets that only some partitions may be left.
        divisions: tuple[Any, ...] = self.frame.divisions
        return divisions

    def _lower(self) -> None:
        return None

    def _task(self, name: Any, index: int) -> Task:
        number = index if self.numbers is None else self.numbers[index]
        return Task(name, number_rows, TaskRef((self.frame._name, index)), number)

    def _simplify_up(self, parent: Expr, dependents: Any) -> Expr | None:
        if isinstance(parent, Partitions):
            known = range(self.frame.npartitions) if self.numbers is None else self.numbers
            numbers = tuple(known[i] for i in parent.partitions)
            return Numbered(Partitions(self.frame, parent.partitions), numbers)
        if isinstance(parent, Index):
            return Index(self.frame)
        # No selection passes: Dask merges partitions of a read that lost columns, which would move places.
        return None


class Answered(Elemwise):  # type: ignore[misc]
    """A frame with the columns of a call.

    Parameters:
        frame: the table, with its places where the call draws by them.
        call: what is asked of each row.
    """

    _parameters = ["frame", "call"]  # noqa: RUF012  (as in every expression of Dask)

    @functools.cached_property
    def _name(self) -> str:
        # The first word is what a dashboard shows.
        return f"{self.call.kind}-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return merge_table(self.frame._meta, self.call)

    def __str__(self) -> str:
        return f"{self.call.kind}({self.frame})"

    def _lower(self) -> Expr:
        most = slices_for(self.frame.npartitions)
        if not most:
            return Whole(self.frame, self.call)
        cut = Cut(self.frame, self.call, most)
        return Merged(self.frame, Sliced(cut, self.call, most), self.call, most)

    @functools.cached_property
    def _added(self) -> list[Hashable]:
        return labels_of(names(self.call), self.frame._meta.columns)

    def _filter_passthrough_available(self, parent: Expr, dependents: Any) -> bool:
        return self._filtered(parent, dependents) is not None

    def _simplify_up(self, parent: Expr, dependents: Any) -> Expr | None:
        if isinstance(parent, Index):
            return Index(self.frame)
        if isinstance(parent, Filter) and parent.frame._name == self._name:
            return self._filtered(parent, dependents)
        if isinstance(parent, Projection):
            return self._projected(parent, dependents)
        return None

    def _projected(self, parent: Expr, dependents: Any) -> Expr | None:
        """A selection of columns: without the model, or over no more input than it needs."""
        if not set(parent.columns) & set(self._added):
            below = self.frame.frame if isinstance(self.frame, Numbered) else self.frame
            return type(parent)(below, *parent.operands[1:])
        places = labels_of([PLACE], self.frame._meta.columns) if self.call.by_place else ()
        wanted = _columns_needed(self, parent, dependents, (*self.call.labels, *places))
        if wanted is None:
            return None
        return type(parent)(Answered(self.frame[wanted], self.call), *parent.operands[1:])

    def _filtered(self, parent: Expr, dependents: Any) -> Expr | None:
        """A filter put below the model, or that part of it that does not read the answers."""
        below: list[Expr] = []
        above: list[Expr] = []
        for part in _conjunction(parent.predicate):
            (below if self._reads_input_only(part) else above).append(part)
        # A reduction would see fewer rows once a part of the filter went below it.
        if not below or not is_filter_pushdown_available(self, parent, dependents, allow_reduction=not above):
            return None
        predicate = functools.reduce(And, below).substitute(self, self.frame)
        if not are_co_aligned(self.frame, predicate):
            return None
        kept = Answered(Filter(self.frame, predicate), self.call)
        if not above:
            return kept
        return Filter(kept, functools.reduce(And, above).substitute(self, kept))

    def _reads_input_only(self, predicate: Expr) -> bool:
        added = set(self._added)
        for node, child in _edges(predicate):
            if child._name == self._name:
                selects = isinstance(node, Projection) and not added & set(node.columns)
                if not selects and not isinstance(node, Index):
                    return False
        return predicate._name != self._name


class Cut(Blockwise):  # type: ignore[misc]
    """The slices of each partition of a frame.

    Parameters:
        frame: the table, with its places where the call draws by them.
        call: what is asked of each row.
        most: slices of a partition.
    """

    _parameters = ["frame", "call", "most"]  # noqa: RUF012  (as in every expression of Dask)
    operation = staticmethod(cut_table)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.call.kind}-cut-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return self.frame._meta

    def _task(self, name: Any, index: int) -> Task:
        frame = TaskRef((self.frame._name, index))
        return Task(name, cut_table, frame, self.call, self._name, index, self.most)


class Sliced(Expr):  # type: ignore[misc]
    """The answers to the slices of each partition: ``most`` tasks, whose keys are `slice_key`'s.

    They depend on their cut, so that Dask gives them to workers early and moves them when one is idle.

    Parameters:
        frame: a `Cut`.
        call: what is asked of each row.
        most: slices of a partition.
    """

    _parameters = ["frame", "call", "most"]  # noqa: RUF012  (as in every expression of Dask)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.call.kind}-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return self.frame._meta

    def _divisions(self) -> tuple[Any, ...]:
        divisions: tuple[Any, ...] = self.frame.divisions
        return divisions

    def _layer(self) -> dict[Any, Task]:
        protect()  # the graph of a run is made just before it begins
        layer = {}
        for part in range(self.npartitions):
            cut = TaskRef((self.frame._name, part))
            for number in range(self.most):
                key = slice_key(self._name, part, number)
                layer[key] = Task(key, answer_slice, cut, number, self.call, self.frame._name, part)
        return layer

    def _simplify_up(self, parent: Expr, dependents: Any) -> Expr | None:
        if isinstance(parent, Partitions):
            return Sliced(Partitions(self.frame, parent.partitions), self.call, self.most)
        return None


class Merged(Blockwise):  # type: ignore[misc]
    """A frame with the answers to its slices as columns.

    Parameters:
        frame: the table that was cut.
        slices: their answers, a `Sliced`.
        call: what was asked of each row.
        most: slices of a partition.
    """

    _parameters = ["frame", "slices", "call", "most"]  # noqa: RUF012  (as in every expression of Dask)
    operation = staticmethod(merge_table)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.call.kind}-merge-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return merge_table(self.frame._meta, self.call)

    def _task(self, name: Any, index: int) -> Task:
        answers = (TaskRef(slice_key(self.slices._name, index, number)) for number in range(self.most))
        return Task(name, merge_table, TaskRef((self.frame._name, index)), self.call, *answers)


class Whole(Blockwise):  # type: ignore[misc]
    """A frame with the answers to its rows as columns, one task for each partition.

    Parameters:
        frame: the table, with its places where the call draws by them.
        call: what is asked of each row.
    """

    _parameters = ["frame", "call"]  # noqa: RUF012  (as in every expression of Dask)
    operation = staticmethod(answer_table)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.call.kind}-whole-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return merge_table(self.frame._meta, self.call)

    def _task(self, name: Any, index: int) -> Task:
        protect()  # as for slices
        return Task(name, answer_table, TaskRef((self.frame._name, index)), self.call, self._name, index)


def _conjunction(predicate: Expr) -> list[Expr]:
    if isinstance(predicate, And) and all(isinstance(side, Expr) for side in predicate.operands):
        return [*_conjunction(predicate.left), *_conjunction(predicate.right)]
    return [predicate]


def _edges(root: Expr) -> Iterator[tuple[Expr, Expr]]:
    for node in root.walk():
        for child in node.dependencies():
            yield node, child


def _columns_needed(
    node: Expr, parent: Expr, dependents: Any, also: tuple[Hashable, ...]
) -> list[Hashable] | None:
    """The input's columns that ``node``'s readers or the node itself need; None where that is all of them."""
    columns = node.frame.columns
    union = determine_column_projection(node, parent, dependents, additional_columns=list(also))
    needed = set(union) if isinstance(union, list) else {union}
    wanted = [column for column in columns if column in needed]
    # A selection by label cannot tell columns of the same name apart.
    if len(wanted) == len(columns) or len(set(columns)) < len(columns):
        return None
    return wanted
