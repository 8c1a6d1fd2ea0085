"""A job's parts made to the end: on a client's cluster, or by Dask's own schedulers where there is none.

Only a part's record comes back for each part, and its future goes at once, so that this process takes the
same memory for a table of any size. It owns when the manifest is written and when a job stops. It refuses to
know what a part is made of.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask.base
import dask.threaded
from dask._expr import Expr
from dask.optimization import cull

from daskllm.jobs.job import Job
from daskllm.jobs.manifest import MANIFEST, Part
from daskllm.jobs.parts import Written, takers
from daskllm.jobs.retry import Mended, with_failed_rows

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Summary", "run"]

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 1.0
"""The manifest is written that often, or so seldom that it takes a twentieth of the time."""
_SHARE = 20
_LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Summary:
    """How a job went.

    Attributes:
        path: where its parts are.
        parts: all of them.
        written: those that this run made.
        rows: in the parts.
        errors: rows that failed, dropped ones included.
        prompt_tokens, out_tokens: read and generated for the rows of all parts.
        seconds: that this run took.
        new_tokens: generated for the rows that this run asked, of the parts that it made.

    Example:
        >>> done = Summary("out", 2, 2, 200, 1, 4000, 1400, seconds=2.0, new_tokens=1400)
        >>> f"{done.errors} of {done.rows} rows failed"
        '1 of 200 rows failed'
    """

    path: str
    parts: int
    written: int
    rows: int
    errors: int
    prompt_tokens: int
    out_tokens: int
    seconds: float
    new_tokens: int


def run(
    job: Job,
    client: Client | None = None,
    *,
    name: str | None = None,
    priority: int = 0,
    told: Callable[[Part], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Summary:
    """Make the parts of a job that are not there, and ask its failed rows again if it says so.

    Where all parts are there, no graph is made and no model is loaded.

    Args:
        job: from `daskllm.jobs.job.prepare`.
        client: whose cluster runs it; None: the scheduler that Dask's configuration names, else threads.
        name: of the `distributed.span` that its tasks are in on a cluster.
        priority: of its tasks on a cluster; more is sooner.
        told: called with each part that is made, from this thread or the part's.
        cancelled: asked a few times a second on a cluster, and after each part elsewhere.

    Raises:
        InterruptedError: it was cancelled.
        JobError: more rows failed than ``max_errors``.
        RowError: a row failed, with ``on_error="raise"``.
        OSError: a part cannot be written.
        Exception: whatever a task raised.

    After any of them what was finished stays, and the same job goes on from it.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> llm = daskllm.load(demo.model_path())
        >>> import tempfile, dask.dataframe as dd
        >>> from daskllm.jobs import prepare
        >>> out = dd.from_pandas(demo.table().head(4), npartitions=2).llm.chat(llm, "prompt", max_tokens=64)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     run(prepare(out, path, client=None)).parts
        2
    """
    begun = time.perf_counter()
    ledger = _Ledger(job, told, cancelled)
    left, failed = job.left, job.failed
    if left or failed or job.stale or not job.manifest.finished:
        job.recipe.directory.make()
        ledger.save()
        for name in job.stale:
            job.recipe.directory.remove(name)
        job.recipe.directory.tidy()
    if left:
        _make(job, Written(job.expr, job.recipe), left, client, name, priority, ledger)
    if failed:
        again = Mended(with_failed_rows(job.expr, job.recipe), job.recipe)
        _make(job, again, failed, client, name, priority, ledger)
    ledger.finish()
    return Summary(
        path=job.recipe.directory.where,
        parts=job.recipe.parts,
        written=len(ledger.made),
        **job.manifest.totals(),
        seconds=time.perf_counter() - begun,
        new_tokens=sum(p.out_tokens - ledger.kept.get(n, 0) for n, p in ledger.made.items()),
    )


class _Ledger:
    """Notes what is done, as parts are told of from any thread."""

    def __init__(
        self, job: Job, told: Callable[[Part], None] | None, cancelled: Callable[[], bool] | None
    ) -> None:
        self._job, self._told, self._cancelled = job, told, cancelled
        self.made: dict[int, Part] = {}
        self.kept = {n: job.manifest.done[n].out_tokens for n in job.failed}  # failed rows have none
        self._lock = threading.Lock()
        self._before = job.manifest.seconds
        self._begun = self._saved = time.monotonic()
        self._cost = 0.0
        self.check(at_end=not job.left)

    def check(self, *, at_end: bool = False) -> None:
        """Stop a job that went wrong or is not wanted any more."""
        if self._cancelled is not None and self._cancelled():
            raise InterruptedError("the job was cancelled; what was finished stays")
        # What is asked again is no error yet.
        failed = set(self._job.failed) - set(self.made)
        done = [part for number, part in self._job.manifest.done.items() if number not in failed]
        self._job.limit.check(done, self._job.recipe.on_error, at_end=at_end)

    def take(self, part: Part) -> None:
        """Note a part; telling of one again changes nothing."""
        with self._lock:
            if self.made.get(part.number) == part:
                return
            self.made[part.number] = self._job.manifest.done[part.number] = part
            if self._told is not None:
                self._told(part)
            if time.monotonic() - self._saved > max(_SAVE_SECONDS, _SHARE * self._cost):
                try:
                    self.save()
                except OSError as error:
                    logger.warning("%s cannot be written, the parts tell of themselves: %s", MANIFEST, error)
            self.check()

    def save(self) -> None:
        """Write the manifest."""
        begun = time.monotonic()
        self._job.manifest.seconds = self._before + begun - self._begun
        self._job.manifest.write(self._job.recipe.directory)
        self._saved = time.monotonic()
        self._cost = self._saved - begun

    def finish(self) -> None:
        """Write the manifest of a job all of whose parts are there."""
        if not self._job.manifest.finished or self.made:
            self._job.manifest.finished = True
            self.save()
        self.check(at_end=True)


def _make(
    job: Job,
    parts: Expr,
    numbers: Sequence[int],
    client: Client | None,
    name: str | None,
    priority: int,
    ledger: _Ledger,
) -> None:
    plan = parts.optimize(fuse=True)
    keys = [(plan._name, number) for number in numbers]
    graph, _ = cull(plan.__dask_graph__(), keys)
    with _taking(job.recipe.run, ledger):
        if client is not None:
            with nullcontext() if name is None else _span(name):
                futures = client.get(graph, keys, sync=False, priority=priority)
            _on_cluster(client, futures, ledger)
            return
        get = dask.base.get_scheduler() or dask.threaded.get
        for part in get(graph, keys):  # one in another process has told nobody yet
            ledger.take(part)


@contextmanager
def _taking(run: str, ledger: _Ledger) -> Iterator[None]:
    """Have parts that are made in this process tell of themselves; keep what is known at an early end."""
    takers[run] = ledger.take
    try:
        yield
    except BaseException:
        with suppress(OSError):
            ledger.save()
        raise
    finally:
        del takers[run]


def _span(name: str) -> Any:
    """Make a job's tasks a `distributed.span` of its name, so that Dask's books and ours tell it from others.

    Not by ``span`` itself, which would put it into the span that this thread seems to be in: where another
    task of the worker has seceded, threads begin with that one's.
    """
    return dask.annotate(span={"name": (name,), "ids": (str(uuid.uuid4()),)})


def _on_cluster(client: Client, parts: Sequence[Future], ledger: _Ledger) -> None:
    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    futures = {future.key: future for future in parts}
    try:
        for future in futures.values():
            future.add_done_callback(ended.put)
        while futures:
            ready = _several(ended)
            for part in client.gather(ready):
                ledger.take(part)
            for future in ready:
                futures.pop(future.key, None)
            ledger.check()
    except BaseException:
        if client.status == "running":
            client.cancel(list(futures.values()))
        raise


def _several(ended: queue.SimpleQueue[Future]) -> list[Future]:
    """The futures that have ended, after a while of waiting for one."""
    found: list[Future] = []
    with suppress(queue.Empty):
        found.append(ended.get(timeout=_LOOK_SECONDS))
        while True:
            found.append(ended.get_nowait())
    return found
