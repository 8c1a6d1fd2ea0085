"""Who hears how far the rows are: events of a cluster's workers, or of this process, at a few a second.

On a worker, increments go out as Dask events of the topic `TOPIC`; elsewhere, to those who `follow` in this
process. Child processes of Dask's ``processes`` scheduler have no way back and stay silent. A task that
runs again after a failure reports its rows again, those that were kept as remembered.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.metrics import Progress
    from daskllm.runtime.worker import WorkerTask

__all__ = ["TOPIC", "Increment", "Reporter", "follow"]

TOPIC = "daskllm"
INTERVAL = 0.25
"""Seconds between two events of one task."""

Callback = Callable[["Increment"], None]


@dataclass(frozen=True, slots=True)
class Increment:
    """What was finished since the same task's last event, and what the task has under way.

    Attributes:
        rows: rows answered, failed ones included.
        prompt_tokens, output_tokens: tokens read and generated for them.
        errors: rows that failed.
        remembered: those of the rows whose answer was there without the model.
        cut_rows, cut_tokens: rows of a partition that was cut, and about how many tokens their prompts have.
        begun_rows, begun_tokens, begun_estimate: rows that the task has begun with, how many tokens their
            prompts have, and how many they were estimated to have.
        worker: the Dask worker's address; "" in this process.
        job: of which table, by the name of its cut; "" for rows that are no Dask frame's.
        task: which task this is from.
        ended: (tokens, count): so many samples ended with so many tokens.
        under_way: of each of the task's samples in the batch how many prompt tokens were read, how many
            tokens generated. It takes the place of what the task said of it before.
        costs: seconds of each prompt token and of each output token, and of a row's next token at the least.
    """

    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0
    remembered: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    begun_rows: int = 0
    begun_tokens: int = 0
    begun_estimate: int = 0
    worker: str = ""
    job: str = ""
    task: str = ""
    ended: tuple[tuple[int, int], ...] = ()
    under_way: tuple[tuple[int, int], ...] = ()
    costs: tuple[float, float, float] | None = None


class _Subscribers:
    """Callbacks of one source of events; several may follow it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sending = threading.RLock()  # a callback may answer rows itself
        self._callbacks: tuple[Callback, ...] = ()

    def add(self, callback: Callback) -> bool:
        """Add one; whether it is the first."""
        with self._lock:
            self._callbacks = (*self._callbacks, callback)
            return len(self._callbacks) == 1

    def remove(self, callback: Callback) -> bool:
        """Remove one; whether none is left."""
        with self._lock:
            rest = list(self._callbacks)
            rest.remove(callback)
            self._callbacks = tuple(rest)
            return not rest

    def send(self, increment: Increment) -> None:
        with self._sending:
            for callback in self._callbacks:
                callback(increment)


_here = _Subscribers()
_clients: dict[str, _Subscribers] = {}


class Reporter:
    """Passes one task's increments on, at most every `INTERVAL` seconds; `flush` sends the rest.

    Args:
        task: the Dask task, None outside a worker.
        job: as `Increment` has it.
    """

    def __init__(self, task: WorkerTask | None, job: str = "") -> None:
        self._task = task
        self._from: dict[str, Any] = {"worker": "", "job": job, "task": f"{os.getpid()}-{id(self)}"}
        if task is not None:
            self._from |= {"worker": task.worker.address, "task": str(task.key)}
        self._pending: Counter[str] = Counter()
        self._ended: Counter[int] = Counter()
        self._under_way: tuple[tuple[int, int], ...] = ()
        self._costs: tuple[float, float, float] | None = None
        self._sent = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Take a session's report."""
        self._ended.update(progress.ended)
        self._under_way = progress.under_way
        if progress.costs is not None:
            costs = progress.costs
            self._costs = (costs.prefill_token, costs.output_token, costs.step + costs.decode_token)
        self.add(
            rows=progress.rows,
            prompt_tokens=progress.prompt_tokens,
            output_tokens=progress.output_tokens,
            errors=progress.errors,
        )

    def add(self, **counts: int) -> None:
        """Add to fields of the next `Increment`."""
        self._pending.update(counts)
        if self._task is not None:
            self._task.finished(counts.get("rows", 0))
        if time.monotonic() - self._sent >= INTERVAL:
            self.send()

    def flush(self) -> None:
        """Send what has not been sent; nothing is under way any more."""
        self._under_way = ()
        self.send()

    def send(self) -> None:
        """Send what has not been sent now."""
        if not any(self._pending.values()) and not self._under_way:
            return
        self._sent = time.monotonic()
        increment = Increment(
            **(self._from | self._pending),
            ended=tuple(self._ended.items()),
            under_way=self._under_way,
            costs=self._costs,
        )
        self._pending.clear()
        self._ended.clear()
        if self._task is None:
            _here.send(increment)
        else:
            whole = asdict(increment)
            self._task.worker.log_event(TOPIC, {name: value for name, value in whole.items() if value})


@contextmanager
def follow(client: Client | None, callback: Callback, jobs: Collection[str] | None = None) -> Iterator[None]:
    """Call ``callback`` with every `Increment` while the context is open.

    Args:
        client: whose cluster to follow, besides this process; None for this process alone.
        callback: called from other threads, one call at a time per source; it should be quick.
        jobs: of these alone; what they hold may change meanwhile.
    """

    def of_these(increment: Increment) -> None:
        if increment.job in jobs:  # type: ignore[operator]
            callback(increment)

    heard = callback if jobs is None else of_these
    _here.add(heard)
    try:
        with _following(client, heard):
            yield
    finally:
        _here.remove(heard)


@contextmanager
def _following(client: Client | None, callback: Callback) -> Iterator[None]:
    if client is None:
        yield
        return
    # A client keeps one handler per topic, so ours hands every event on to all who follow.
    subscribers = _clients.setdefault(client.id, _Subscribers())
    if subscribers.add(callback):
        client.subscribe_topic(TOPIC, _handler(subscribers))
    try:
        yield
    finally:
        if subscribers.remove(callback):
            _clients.pop(client.id, None)
            if client.status == "running":
                client.unsubscribe_topic(TOPIC)


def _handler(subscribers: _Subscribers) -> Callable[[tuple[float, dict[str, Any]]], None]:
    def handle(event: tuple[float, dict[str, Any]]) -> None:
        subscribers.send(Increment(**event[1]))

    return handle
