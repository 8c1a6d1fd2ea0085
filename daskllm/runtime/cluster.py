"""Where rows that are no Dask collection run: in this process, or in batches over a client's workers.

It owns the choice and the size of the batches. It refuses to know what a batch asks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config

from daskllm.runtime.call import Place
from daskllm.runtime.worker import current_worker

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["batches", "client_for", "over_rows"]

Answers = TypeVar("Answers")

_CLUSTER_SCHEDULERS = (None, "distributed", "dask.distributed")
_SMALLEST, _LARGEST = 32, 256
"""Rows of a batch: below, two of them in flight do not fill an engine's batch; above, the tail gets long."""


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


def batches(rows: int, workers: int) -> list[slice]:
    """Cut rows so that every worker has two full batches in flight and no long last one.

    >>> [piece.stop - piece.start for piece in batches(100, 2)]
    [32, 32, 32, 4]
    """
    size = math.ceil(rows / (4 * workers))
    size = min(_LARGEST, max(size, min(_SMALLEST, math.ceil(rows / workers))))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(1, size))]


def over_rows(
    client: Client | None,
    answer: Callable[[Sequence[Any], Any, Sequence[Place]], Sequence[Answers]],
    rows: Sequence[Any],
    call: Any,
) -> list[Answers]:
    """The answers to ``rows``, in order.

    Args:
        client: whose workers answer; None answers here.
        answer: a function of (some rows, ``call``, their places), found by its name.

    An exception or an interrupt cancels what is still running.
    """
    places = [(0, row) for row in range(len(rows))]
    if client is None or not len(rows):
        return list(answer(rows, call, places))
    pieces = batches(len(rows), max(1, len(client.scheduler_info(n_workers=-1)["workers"])))
    futures = client.map(
        answer,
        [rows[piece] for piece in pieces],
        [call] * len(pieces),
        [places[piece] for piece in pieces],
        key=f"{call.kind}",
        pure=False,
    )
    try:
        return [one for batch in client.gather(futures) for one in batch]
    except BaseException:
        client.cancel(futures)
        raise
