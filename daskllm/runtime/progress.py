"""Who hears how far the rows are: events of a cluster's workers, or of this process, at a few a second.

On a worker, increments go out as Dask events of the topic `TOPIC`; elsewhere, to those who `follow` in this
process. Child processes of Dask's ``processes`` scheduler have no way back and stay silent. A task that
runs again after a failure reports its rows again, those that were kept as remembered.

Who scripts hears the same: ``client.subscribe_topic("daskllm", handler)`` calls ``handler`` with (seconds of
the epoch, a dict) for each event; the dict has the fields of an `Increment` that are not empty.

    def handler(event):
        when, told = event
        print(told.get("span") or told.get("job", ""), told.get("rows", 0), "rows", told["worker"])

What tasks did is also in Dask's own books: tokens and rows are fine performance metrics, so that each span
(``with distributed.span("nightly"): ...``) has its own in ``Span.cumulative_worker_metrics``, under
``("execute", task, "prompt" or "output", "tokens")`` and ``("execute", task, "answered", "failed" or
"remembered", "rows")``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.metrics import Progress
    from daskllm.runtime.worker import WorkerTask

__all__ = ["TOPIC", "Increment", "Reporter", "follow", "told_by"]

TOPIC = "daskllm"
INTERVAL = 0.25
"""Seconds between two events of one task."""
_JOBS = 32
"""Of so many jobs, the latest, a worker knows what its own tasks did."""

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
        kinds: (`daskllm.metrics.error_kind`, rows) of the rows that failed.
        span: the task's `distributed.span`, its tags joined by "/"; "" without one.
        priority: the task's, as a user gives it.
        asks: what a cut's call asks for: at most how many tokens, how many samples, whether exactly as many.
        reused_tokens: of the prompt tokens, those whose keys and values were found instead of computed.
        part: the number of the partition that the rows are of.
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
    kinds: tuple[tuple[str, int], ...] = ()
    span: str = ""
    priority: int = 0
    asks: tuple[int, int, bool] | None = None
    reused_tokens: int = 0
    part: int = 0

    @property
    def label(self) -> str:
        """Whose rows these are, in few words: the span's or the table's; "lists" where there is neither.

        >>> Increment(job="chat-cut-0123456789abcdef").label, Increment(span="nightly").label
        ('chat 01234567', 'nightly')
        """
        kind, _, token = self.job.rpartition("-")
        return self.span or (f"{kind.partition('-')[0]} {token[:8]}" if kind else "lists")


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
# Of each worker in this process what its tasks did, by the labels of their jobs.
_told: defaultdict[str, dict[str, Counter[str]]] = defaultdict(dict)
_telling = threading.Lock()


def told_by(worker_id: str) -> dict[str, Counter[str]]:
    """What the tasks of a worker in this process did, by `Increment.label`: sums of ``rows``, ``errors``,
    ``remembered``, ``prompt_tokens``, ``output_tokens``, and ``error:KIND``."""
    with _telling:
        return {label: Counter(counts) for label, counts in _told[worker_id].items()}


def _tell(worker_id: str, increment: Increment) -> None:
    with _telling:
        jobs = _told[worker_id]
        counts = jobs.setdefault(increment.label, Counter())
        for name in ("rows", "errors", "remembered", "prompt_tokens", "output_tokens"):
            counts[name] += getattr(increment, name)
        for kind, rows in increment.kinds:
            counts[f"error:{kind}"] += rows
        while len(jobs) > _JOBS:
            del jobs[next(iter(jobs))]


class Reporter:
    """Passes one task's increments on, at most every `INTERVAL` seconds; `flush` sends the rest.

    Args:
        task: the Dask task, None outside a worker.
        job, asks, part: as `Increment` has them.
    """

    def __init__(
        self,
        task: WorkerTask | None,
        job: str = "",
        part: int = 0,
        asks: tuple[int, int, bool] | None = None,
    ) -> None:
        self._task = task
        self._from: dict[str, Any] = {
            "worker": "",
            "job": job,
            "part": part,
            "task": f"{os.getpid()}-{id(self)}",
            "asks": asks,
        }
        if task is not None:
            self._from |= {"worker": task.worker.address, "task": str(task.key)}
            self._from |= {"span": task.span, "priority": task.urgency}
        self._pending: Counter[str] = Counter()
        self._ended: Counter[int] = Counter()
        self._kinds: Counter[str] = Counter()
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
            reused_tokens=progress.reused_tokens,
            kinds=dict(progress.kinds),
        )

    def add(self, kinds: Mapping[str, int] | None = None, **counts: int) -> None:
        """Add to fields of the next `Increment`."""
        self._kinds.update(kinds or {})
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
            kinds=tuple(self._kinds.items()),
        )
        for counter in (self._pending, self._ended, self._kinds):
            counter.clear()
        if self._task is None:
            _here.send(increment)
        else:
            _tell(self._task.worker.id, increment)
            _attach(increment)
            whole = asdict(increment)
            self._task.worker.log_event(TOPIC, {name: value for name, value in whole.items() if value})


def _attach(increment: Increment) -> None:
    """Add to the fine performance metrics of the task that runs in this thread, and so to its span's."""
    from distributed.metrics import context_meter

    for label, count, unit in (
        ("prompt", increment.prompt_tokens, "tokens"),
        ("output", increment.output_tokens, "tokens"),
        ("answered", increment.rows - increment.errors, "rows"),
        ("failed", increment.errors, "rows"),
        ("remembered", increment.remembered, "rows"),
    ):
        if count:
            context_meter.digest_metric(label, count, unit)


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
