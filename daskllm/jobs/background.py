"""Jobs that run while their submitter does something else, found again by their names.

On a cluster, a job is one task that coordinates the others (it leaves the thread pool at once) and a
published dataset that holds its future. So the scheduler keeps it when the client goes, any client finds it,
and where the coordinator's worker dies Dask starts it on another, which goes on from the parts that are
there. Futures set loose (`fire_and_forget`) would go on too, but nobody would write the manifest, count
errors or stop at a limit. Where there is no client, a job is a thread of this process.

It owns names, states and cancelling. It refuses to know how parts are made.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

import dask.dataframe as dd
from dask.utils import key_split

from daskllm.jobs.eta import Eta, State
from daskllm.jobs.identity import calls_in
from daskllm.jobs.job import prepare
from daskllm.jobs.run import Summary, run
from daskllm.jobs.watch import watching
from daskllm.runtime.local import give_up
from daskllm.runtime.worker import current_task
from daskllm.types import URGENT

if TYPE_CHECKING:
    from distributed import Client, Future, Scheduler

__all__ = ["BackgroundJob", "Status", "find", "names", "queue", "submit"]

Status = Literal["queued", "running", "finished", "failed", "cancelled"]

_PREFIX = "daskllm-job-"
_TELL_SECONDS = 0.5
_ROWS = ("generate", "chat", "score", "embed")


class BackgroundJob(Protocol):
    """A job that was submitted.

    Attributes:
        name, path, priority: as it was submitted.

    Example: see ``out.llm.submit``, whose result is one.
        >>> submit.__annotations__["return"]  # with status(), progress(), cancel() and result()
        'BackgroundJob'
    """

    name: str
    path: str
    priority: int

    def status(self) -> Status:
        """Where it stands."""
        ...

    def progress(self) -> State:
        """How far it is; shows itself as a bar in a notebook."""
        ...

    def cancel(self) -> None:
        """Stop it: its rows stop decoding at once. What was finished stays; the same job goes on from it."""
        ...

    def result(self, timeout: float | None = None) -> Summary:
        """Wait for its end.

        Raises:
            TimeoutError: it has not ended after so many seconds.
            InterruptedError: it was cancelled.
            Exception: what it failed of.
        """
        ...


def submit(
    table: dd.DataFrame,
    path: str | os.PathLike[str],
    client: Client | None,
    name: str | None = None,
    priority: int = 0,
    **options: Any,
) -> BackgroundJob:
    """Start a job; see `daskllm.jobs.job.prepare` for ``options``.

    Args:
        table: a Dask frame with answers.
        client: whose cluster runs it; None: a thread of this process.
        name: by which it is found again; made up if none is given.
        priority: of its rows on a cluster; more is sooner.

    Raises:
        ValueError: a job of that name is running, or as `prepare` has it.
        TypeError: ``name`` is no text, ``priority`` no integer.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> llm = daskllm.load(demo.model_path())
        >>> import tempfile, dask.dataframe as dd
        >>> table = dd.from_pandas(demo.table().head(4), npartitions=1)
        >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     job = submit(out, path, None, name="small")
        ...     job.result().rows
        4
        >>> find("small").status(), "small" in names()
        ('finished', True)
    """
    name = uuid.uuid4().hex[:8] if name is None else name
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be text, not {name!r}")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise TypeError(f"priority must be an integer, not {priority!r}")
    there = _find(name, client)
    if there is not None and there.status() in ("queued", "running"):
        raise ValueError(f"a job named {name!r} is {there.status()}: choose another name, or cancel it first")
    # What can be refused is refused here; a worker may have another working directory.
    path = prepare(table, path, client=client, **options).recipe.directory.where
    if client is None:
        return _LocalJob(name, path, priority).start(table, options)
    return _ClusterJob.start(name, table, path, priority, options, client)


def find(name: str, client: Client | None = None) -> BackgroundJob:
    """The job of that name, whoever submitted it.

    Args:
        client: of the cluster that runs it; None: one of this process.

    Raises:
        KeyError: there is none.

    Example:
        >>> try:
        ...     find("nobody")
        ... except KeyError as error:
        ...     print("no job is named 'nobody'" in str(error))
        True
    """
    job = _find(name, client)
    if job is None:
        known = ", ".join(map(repr, names(client))) or "none"
        raise KeyError(f"no job is named {name!r}; there are: {known}")
    return job


def _find(name: str, client: Client | None) -> BackgroundJob | None:
    if client is None:
        return _here.get(name)
    with suppress(KeyError):
        return _ClusterJob(name, client.get_dataset(_PREFIX + name), client)
    return None


def names(client: Client | None = None) -> list[str]:
    """The names of all jobs that the cluster, or this process, has heard of.

    Example:
        >>> isinstance(names(), list)
        True
    """
    if client is None:
        return sorted(_here)
    names = (name for name in client.list_datasets() if isinstance(name, str))
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def queue(client: Client) -> dict[int, dict[str, int]]:
    """For each priority how many tasks of rows wait and how many run, of all jobs of a cluster.

    Example: ``{-1: {"running": 4, "waiting": 96}}`` while a job of priority -1 runs.
        >>> from distributed import Client
        >>> with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        ...     queue(client)
        {}
    """
    found: dict[int, dict[str, int]] = client.run_on_scheduler(_queued)
    return found


def _queued(dask_scheduler: Scheduler) -> dict[int, dict[str, int]]:
    counts: Counter[tuple[int, str]] = Counter()
    for task in dask_scheduler.tasks.values():
        ours = key_split(task.key).partition("-")[0] in _ROWS
        if ours and task.priority and task.state in ("waiting", "queued", "no-worker", "processing"):
            state = "running" if task.state == "processing" else "waiting"
            counts[-task.priority[0], state] += 1
    priorities = sorted({priority for priority, _ in counts}, reverse=True)
    return {p: {state: counts[p, state] for state in ("running", "waiting")} for p in priorities}


# --- in this process -------------------------------------------------------------------------------------


class _Job:
    name: str
    path: str

    def __repr__(self) -> str:
        return f"<job {self.name!r} that writes {self.path}>"


class _LocalJob(_Job):
    def __init__(self, name: str, path: str, priority: int) -> None:
        self.name, self.path, self.priority = name, path, priority
        self._status: Status = "queued"
        self._eta: Eta | None = None
        self._summary: Summary | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread()
        self._calls: list[Any] = []

    def start(self, table: dd.DataFrame, options: dict[str, Any]) -> _LocalJob:
        thread = threading.Thread(target=self._run, args=(table, options), name=f"daskllm-job-{self.name}")
        thread.daemon = True
        self._thread = thread
        _here[self.name] = self
        thread.start()
        return self

    def _run(self, table: dd.DataFrame, options: dict[str, Any]) -> None:
        self._status = "running"
        try:
            job = prepare(table, self.path, client=None, **options)
            self._calls = calls_in(job.expr)
            with watching(job.expr, None, parts=job.left) as eta:
                self._eta = eta
                self._summary = run(job, None, cancelled=self._cancelled.is_set)
            self._status = "finished"
        except BaseException as error:  # whoever asks for the result gets it
            self._error = InterruptedError("the job was cancelled") if self._cancelled.is_set() else error
            self._status = "cancelled" if self._cancelled.is_set() else "failed"

    def status(self) -> Status:
        return self._status

    def progress(self) -> State:
        return State() if self._eta is None else self._eta.state()

    def cancel(self) -> None:
        self._cancelled.set()
        give_up(self._calls)

    def result(self, timeout: float | None = None) -> Summary:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the job {self.name!r} has not ended after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._summary is not None
        return self._summary


_here: dict[str, _LocalJob] = {}


# --- on a cluster ----------------------------------------------------------------------------------------


class _ClusterJob(_Job):
    """Its record is ``{"path", "priority", "future"}``; the future is None when it was cancelled."""

    def __init__(self, name: str, record: dict[str, Any], client: Client) -> None:
        self.name, self.path, self.priority = name, str(record["path"]), int(record["priority"])
        self._client = client
        self._future: Future | None = record["future"]

    @classmethod
    def start(
        cls, name: str, table: dd.DataFrame, path: str, priority: int, options: dict[str, Any], client: Client
    ) -> _ClusterJob:
        from distributed.protocol.pickle import dumps

        _told(name, client).set(None)
        future = client.submit(
            _coordinate,
            dumps(table),
            path,
            options,
            name,
            priority,
            key=f"{_PREFIX}{name}-{uuid.uuid4().hex}",
            pure=False,
            priority=URGENT + 1,
        )
        record = {"path": path, "priority": priority, "future": future}
        client.publish_dataset(record, name=_PREFIX + name, override=True)
        return cls(name, record, client)

    def status(self) -> Status:
        if self._future is None or self._future.status == "cancelled":
            self._future = None  # Dask warns of a future of ours whose task it does not know any more
            return "cancelled"
        if self._future.status == "finished":
            return "finished"
        if self._future.status == "error":
            return "cancelled" if isinstance(self._future.exception(), InterruptedError) else "failed"
        # "lost" too: its summary went with a worker, and Dask runs it again.
        return "queued" if _told(self.name, self._client).get(timeout="10s") is None else "running"

    def progress(self) -> State:
        told = _told(self.name, self._client).get(timeout="10s")
        return State() if told is None else State(**told)

    def cancel(self) -> None:
        future, self._future = self._future, None
        if future is None or future.done():
            self._future = future
            return
        record = {"path": self.path, "priority": self.priority, "future": None}
        self._client.publish_dataset(record, name=_PREFIX + self.name, override=True)
        future.cancel(force=True, reason="the job was cancelled")

    def result(self, timeout: float | None = None) -> Summary:
        if self._future is None:
            raise InterruptedError("the job was cancelled")
        from distributed.client import FutureCancelledError

        try:
            found: Summary = self._future.result(timeout)
        except FutureCancelledError as error:
            self._future = None
            raise InterruptedError("the job was cancelled") from error
        return found


def _told(name: str, client: Client) -> Any:
    from distributed import Variable

    return Variable(_PREFIX + name, client=client)


def _coordinate(table: bytes, path: str, options: dict[str, Any], name: str, priority: int) -> Summary:
    """Runs in a Dask task."""
    from distributed import worker_client
    from distributed.protocol.pickle import loads

    task = current_task()
    assert task is not None
    with worker_client() as client:
        job = prepare(loads(table), path, client=client, **options)
        told, over = _told(name, client), threading.Event()
        with watching(job.expr, client, parts=job.left) as eta:
            teller = threading.Thread(target=_tell, args=(told.set, eta.state, over), daemon=True)
            teller.start()
            try:
                return run(job, client, name=name, priority=priority, cancelled=task.cancelled)
            finally:
                over.set()
                teller.join()


def _tell(say: Callable[[dict[str, Any]], None], state: Callable[[], State], over: threading.Event) -> None:
    while True:
        last = over.is_set()
        say(state().to_dict())
        if last:
            return
        over.wait(_TELL_SECONDS)
