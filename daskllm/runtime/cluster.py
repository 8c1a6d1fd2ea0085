"""Where rows that are no Dask collection run: in this process, or in batches over a client's workers.

It owns the choice, the size of the batches and who goes first. It refuses to know what a batch asks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config
import numpy as np
import numpy.typing as npt

from daskllm.runtime.call import Call, Place
from daskllm.runtime.slices import ENOUGH_ROWS, ENOUGH_TOKENS, costs_of, deal, equal_rows, rows_of
from daskllm.runtime.worker import current_worker
from daskllm.types import URGENT

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["batches", "client_for", "over_rows"]

Answers = TypeVar("Answers")
Costs = npt.NDArray[np.float64]

_CLUSTER_SCHEDULERS = (None, "distributed", "dask.distributed")
_MOST_ROWS = 256
"""Rows of a batch, on average: above, the tail gets long."""
_FEW_ROWS = 64
"""Rows of a call that goes ahead of others: what one engine runs together."""


def client_for(given: Client | None) -> Client | None:
    """The client whose workers should answer: the given one, else the current one of this thread, else None.

    Inside a task there is none, since its rows run where the task does. A scheduler chosen in Dask's
    configuration ("threads", "processes", …) goes before the current client, as it does for `compute`.
    """
    if current_worker() is not None:
        return None
    if given is not None:
        return given
    # Who has not imported distributed has no client, and need not pay for the import.
    distributed = sys.modules.get("distributed")
    if distributed is None or dask.config.get("scheduler", None) not in _CLUSTER_SCHEDULERS:
        return None
    try:
        current: Client = distributed.Client.current(allow_global=True)
    except ValueError:
        return None
    return None if current.asynchronous else current


def batches(costs: Costs, workers: int) -> list[list[int]]:
    """Deal rows so that every worker has some batches to take one after the other and no long last one.

    Args:
        costs: what each row takes, float64 ``[rows]``.
        workers: at least one.

    Returns:
        The row numbers of each batch; batches cost about the same.

    >>> [len(batch) for batch in batches(np.ones(100), 2)]
    [33, 34, 33]
    """
    rows = len(costs)
    full = max(rows // ENOUGH_ROWS, int(costs.sum() // ENOUGH_TOKENS), min(workers, rows))
    return deal(costs, min(rows, max(math.ceil(rows / _MOST_ROWS), min(full, 4 * workers))))


def over_rows(
    client: Client | None,
    answer: Callable[[Sequence[Any], Any, Sequence[Place]], Sequence[Answers]],
    rows: Sequence[Any],
    call: Call,
) -> list[Answers]:
    """The answers to ``rows``, in order.

    Few rows are `URGENT`: somebody is likely to wait for them, beside jobs that may last for hours.

    Args:
        client: whose workers answer; None answers here.
        answer: a function of (some rows, ``call``, their places), found by its name.

    An exception or an interrupt cancels what is still running.
    """
    if len(rows) <= _FEW_ROWS:
        call = replace(call, priority=URGENT)
    places = [(0, row) for row in range(len(rows))]
    if client is None or not len(rows):
        return list(answer(rows, call, places))
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    groups = equal_rows(rows, call)
    costs = costs_of([rows[group[0]] for group in groups], call)
    dealt = [rows_of(batch, groups) for batch in batches(costs, max(1, workers))]
    futures = client.map(
        answer,
        [[rows[row] for row in batch] for batch in dealt],
        [call] * len(dealt),
        [[places[row] for row in batch] for batch in dealt],
        key=f"{call.kind}",
        pure=False,
        priority=call.priority,
    )
    try:
        parts = client.gather(futures)
    except BaseException:
        client.cancel(futures)
        raise
    answers = {
        row: one
        for batch, part in zip(dealt, parts, strict=True)
        for row, one in zip(batch, part, strict=True)
    }
    return [answers[row] for row in range(len(rows))]
