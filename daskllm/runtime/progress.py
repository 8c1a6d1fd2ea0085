"""Who hears how far the rows are: events of a cluster's workers, or of this process, at a few a second.

On a worker, increments go out as Dask events of the topic `TOPIC`; elsewhere, to those who `follow` in this
process. Child processes of Dask's ``processes`` scheduler have no way back and stay silent. A task that
runs again after a failure reports its rows again, those that were kept as remembered.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.runtime.worker import WorkerTask

__all__ = ["TOPIC", "Counts", "Increment", "Reporter", "follow"]

TOPIC = "daskllm"
INTERVAL = 0.25
"""Seconds between two events of one task."""

Callback = Callable[["Increment"], None]


class Counts(Protocol):
    """What a session reports: increments since it last did."""

    @property
    def rows(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def errors(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Increment:
    """What was finished since the same task's last event.

    Attributes:
        rows: rows answered, failed ones included.
        prompt_tokens, output_tokens: tokens read and generated.
        errors: rows that failed.
        worker: the Dask worker's address; "" in this process.
        remembered: those of the rows whose answer was there without the model.
    """

    rows: int
    prompt_tokens: int
    output_tokens: int
    errors: int
    worker: str = ""
    remembered: int = 0


_COUNTED = ("rows", "prompt_tokens", "output_tokens", "errors", "remembered")


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
    """Passes one task's increments on, at most every `INTERVAL` seconds; `flush` sends the rest."""

    def __init__(self, task: WorkerTask | None) -> None:
        self._task = task
        self._pending: Counter[str] = Counter()
        self._sent = 0.0

    def __call__(self, counts: Counts) -> None:
        self.add(
            rows=counts.rows,
            prompt_tokens=counts.prompt_tokens,
            output_tokens=counts.output_tokens,
            errors=counts.errors,
        )

    def add(self, **counts: int) -> None:
        """Add to fields of the next `Increment`."""
        self._pending.update(counts)
        if self._task is not None:
            self._task.finished(counts.get("rows", 0))
        if time.monotonic() - self._sent >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Send what has not been sent."""
        if not any(self._pending.values()):
            return
        self._sent = time.monotonic()
        worker = "" if self._task is None else self._task.worker.address
        counts = {name: self._pending[name] for name in _COUNTED}
        increment = Increment(worker=worker, **counts)
        self._pending.clear()
        if self._task is None:
            _here.send(increment)
        else:
            self._task.worker.log_event(TOPIC, asdict(increment))


@contextmanager
def follow(client: Client | None, callback: Callback) -> Iterator[None]:
    """Call ``callback`` with every `Increment` while the context is open.

    Args:
        client: whose cluster to follow, besides this process; None for this process alone.
        callback: called from other threads, one call at a time per source; it should be quick.
    """
    _here.add(callback)
    try:
        with _following(client, callback):
            yield
    finally:
        _here.remove(callback)


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
