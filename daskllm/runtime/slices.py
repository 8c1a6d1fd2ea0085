"""Partitions cut into slices when their rows are known: what a cut, a slice and a merge of a table do.

A graph is built before a row is read, so it holds for each partition one cut, a fixed number of slices and
one merge. The cut deals the rows out so that the slices take about the same time; slices that it has no rows
for return at once. A slice holds its rows' cells alone and is small enough that there is something to steal
at a job's end; the merge, where the partition is, puts the answers back in order.

It owns how rows are dealt. It refuses to know how a graph is built and how rows are answered.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from daskllm.runtime.call import Call, Place
from daskllm.runtime.columns import attach, cells, columns_of, labels_of
from daskllm.runtime.costs import Costs, costs_of, prompt_estimates
from daskllm.runtime.progress import Reporter
from daskllm.runtime.tasks import answer_rows
from daskllm.runtime.worker import current_task, current_worker

__all__ = [
    "ENOUGH_ROWS",
    "ENOUGH_TOKENS",
    "PLACE",
    "SLICES",
    "answer_slice",
    "answer_table",
    "costs_of",
    "cut_table",
    "deal",
    "equal_rows",
    "is_slice",
    "merge_table",
    "number_rows",
    "places_of",
    "rows_of",
    "slice_key",
    "slices_for",
]

SLICES = 8
"""Slices of a partition, at most, a power of two: each costs Dask about 1 ms, empty or not."""
FEW_PARTITIONS = 64
"""Partitions above which half as many slices of each leave no long end either."""
MOST_SLICES = 4096
"""Slice tasks of a table, where it has fewer partitions: many small ones need less cutting than few large."""
MOST_MERGED = 16384
"""Partitions above which there is one task for each and nothing to steal: a job of 100,000 partitions has no
more than 100,000 tasks of ours."""
ENOUGH_ROWS = 32
"""Of fewer rows, so many slices would be in flight on a worker that little is left to steal."""
ENOUGH_TOKENS = 1024
"""Tokens worth a slice of their own, however few the rows: what a job's end waits for where rows are long, a
second or a few on one core."""

PLACE = "__daskllm_place__"
"""The column that carries each row's place past a filter: partition << 32 | row, int64."""
_ROW_BITS = 32
_KINDS = ("generate", "chat", "score", "embed")
_WORDS = ("two", "four", "eight")


def deal(costs: Costs, hands: int) -> list[list[int]]:
    """Deal rows so that all hands cost about the same: row numbers for each hand, ascending.

    The costliest rows are in the first hands, which begin first: long rows that begin last would run on alone
    at the end (Graham 1969, longest processing time). On one worker that is a tenth of a skewed job's time.

    >>> deal(np.array([9.0, 1, 8, 2]), 2)
    [[0], [1, 2, 3]]
    """
    order = np.argsort(-costs, kind="stable").tolist()
    left = float(costs.sum())
    dealt: list[list[int]] = []
    at = 0
    for more in range(hands, 0, -1):
        load, begin = 0.0, at
        while at < len(order) - (more - 1):
            cost = float(costs[order[at]])
            if at > begin and load + cost / 2 > left / more:
                break
            load += cost
            at += 1
        left -= load
        dealt.append(sorted(order[begin : len(order) if more == 1 else at]))
    return dealt


def equal_rows(rows: Sequence[Sequence[Any]], call: Call) -> list[list[int]]:
    """The numbers of rows that get the same answer, which is computed once where they are together.

    Args:
        rows: for each row the cells of ``call.labels``.
    """
    if call.by_place:
        return [[row] for row in range(len(rows))]
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        # Lists of messages or ids have no hash; they are as good as different.
        key = tuple(row) if all(isinstance(cell, str) for cell in row) else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def rows_of(hand: Sequence[int], groups: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the rows in some groups, ascending."""
    return sorted(row for group in hand for row in groups[group])


def number_rows(table: pd.DataFrame, number: int) -> pd.DataFrame:
    """``table`` with the column `PLACE`, for the partition of that number."""
    start = number << _ROW_BITS
    return attach(table, {PLACE: range(start, start + len(table))})


def slices_for(partitions: int) -> int:
    """Into how many slices each of so many partitions is cut at most; 0: not at all, all is one task.

    >>> [slices_for(partitions) for partitions in (1, 512, 1000, 4096, 16384, 100_000)]
    [8, 4, 4, 1, 1, 0]
    """
    if partitions > MOST_MERGED:
        return 0
    most = SLICES if partitions <= FEW_PARTITIONS else SLICES // 2
    return max(1, min(most, 1 << max(1, MOST_SLICES // max(1, partitions)).bit_length() - 1))


def answer_table(table: pd.DataFrame, call: Call, job: str = "", part: int = 0) -> pd.DataFrame:
    """``table`` with the answers to its rows, in one go.

    Args:
        job, part: as for `cut_table`.
    """
    answers = [answer_slice([rows], 0, call, job, part) for rows in cut_table(table, call, job, part, most=1)]
    return merge_table(table, call, *answers)


def cut_table(
    table: pd.DataFrame, call: Call, job: str = "", part: int = 0, most: int = SLICES
) -> list[pd.DataFrame]:
    """The rows of a partition in up to ``most`` slices of about the same cost: 1, 2, 4, … of them.

    A slice has the columns that the call needs, and the rows' numbers in the partition as its index. Where
    there is no Dask worker nobody can take a slice over, and all rows stay in one.

    Args:
        job: whose rows they are, for those who follow.
        part: the partition's number, for them too.
        most: a power of two.
    """
    if not len(table):
        return []
    (place,) = labels_of([PLACE], table.columns)
    needed = table[[*call.labels, place] if place in table.columns else [*call.labels]]
    needed = needed.set_axis(pd.RangeIndex(len(table)), axis=0)
    rows = cells(needed, call.labels)
    told = int(prompt_estimates(rows, call).sum())
    params = call.params
    fixed = params.ignore_eos and not params.stop
    asks = (params.max_tokens, params.n, fixed) if call.generates else None
    report = Reporter(current_task(), job, part, asks)
    report.add(cut_rows=len(rows), cut_tokens=told)
    report.send()
    if current_worker() is None or most == 1:
        return [needed]
    groups = equal_rows(rows, call)
    costs = costs_of([rows[group[0]] for group in groups], call)
    worth = max(len(costs) // ENOUGH_ROWS, int(costs.sum() // ENOUGH_TOKENS), 1)
    hands = deal(costs, 1 << min(worth, len(costs), most).bit_length() - 1)
    return [needed.take(rows_of(hand, groups)) for hand in hands]


def slice_key(name: str, part: int, number: int) -> tuple[str, int, int]:
    """The key of a partition's slice, by the common name of all.

    Dask learns how long tasks take by the words of their names, and steals none that seem to take no time. So
    slices that a cut may leave empty have names of their own: by the least cut that fills them.

    >>> [slice_key("generate-0f", 3, number)[0] for number in range(5)]
    ['generate-0f', 'generate-two-0f', 'generate-four-0f', 'generate-four-0f', 'generate-eight-0f']
    """
    return _slice_names(name)[number.bit_length()], part, number


def is_slice(key: Any) -> bool:
    """Whether a key is one that `slice_key` makes.

    >>> is_slice(slice_key("chat-0f", 3, 5)), is_slice(("chat-cut-0f", 3)), is_slice(("sum-0f", 0, 1))
    (True, False, False)
    """
    if not (isinstance(key, tuple) and len(key) == 3 and isinstance(key[0], str)):
        return False
    kind, _, word = key[0].rpartition("-")[0].partition("-")
    return kind in _KINDS and word in ("", *_WORDS)


@functools.lru_cache(maxsize=64)  # the same strings each time, which a pickled graph holds once
def _slice_names(name: str) -> tuple[str, ...]:
    kind, _, token = name.rpartition("-")
    return (name, *(f"{kind}-{word}-{token}" for word in _WORDS))


def answer_slice(
    slices: Sequence[pd.DataFrame], number: int, call: Call, job: str = "", part: int = 0
) -> pd.DataFrame | None:
    """The answers to one slice of a partition, as the call's columns; None where the cut made fewer.

    The index is the slice's.

    Args:
        job, part: as for `cut_table`.
    """
    if number >= len(slices):
        return None
    rows = slices[number]
    answers = answer_rows(cells(rows, call.labels), call, places_of(rows), job, part)
    return pd.DataFrame(columns_of(answers, call), index=rows.index)


def merge_table(table: pd.DataFrame, call: Call, *answers: pd.DataFrame | None) -> pd.DataFrame:
    """``table`` with the call's columns added, from the answers to its slices; without the column `PLACE`."""
    (place,) = labels_of([PLACE], table.columns)
    rest = table.drop(columns=[place]) if place in table.columns else table
    return attach(rest, _in_order([one for one in answers if one is not None]) or columns_of((), call))


def _in_order(answers: Sequence[pd.DataFrame]) -> dict[str, Any]:
    if not answers:
        return {}
    whole = pd.concat(answers) if len(answers) > 1 else answers[0]
    whole = whole.sort_index()
    return {str(name): column.array for name, column in whole.items()}


def places_of(rows: pd.DataFrame) -> list[Place]:
    """Where the draws of a slice's rows start."""
    (label,) = labels_of([PLACE], rows.columns)
    if label not in rows.columns:
        return [(0, row) for row in rows.index.tolist()]
    mask = (1 << _ROW_BITS) - 1
    return [(place >> _ROW_BITS, place & mask) for place in rows[label].tolist()]
