"""What a task knows of the Dask worker that it runs on: whether it is still wanted, and whose turn it is.

A worker should have more rows in hand than its engine runs together, so that its batch does not drain at the
end of a task. A task that waits for its rows therefore leaves the thread pool (`distributed.secede`), which
lets the worker start the next, until enough rows are in hand; the rest of the queue stays where it can be
stolen. When the queue gets short, beside other workers, fewer rows are enough: what one has begun it keeps,
and if that is most of what is left, the others end long before it.

A worker that is retired, or told to end (SIGTERM), hands its rows in flight back: their tasks go to others,
and what has finished of them is kept on the way.

A task of a higher priority does not wait for one of these to end: they leave the pool for it, and what comes
into the pool behind it waits until there is room again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import dask.config
from dask.system import CPU_COUNT

from daskllm import machine

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.worker_state_machine import TaskState

__all__ = [
    "ROWS_IN_HAND",
    "WorkerTask",
    "announce_share",
    "current_task",
    "current_worker",
    "rows_handed_back",
    "set_share",
]

ROWS_IN_HAND = 96
"""Unfinished rows of a worker's tasks below which it takes another, as long as its engine does not run more
together: half as many again as one begins with, since some end between two looks."""
_FEW_ROWS = 32
"""In hand, though the queue gets short: below, what an engine takes for a token rises by a tenth and more."""
_PLENTY = 6
"""Partitions that wait on a worker, from which on its end of the queue is not near."""
_MOST_TASKS = 16
"""In flight on a worker, however few their rows: each has a thread."""
_HAND_BACK_SECONDS = 5.0
"""How long a worker that closes waits for its tasks to keep what has finished."""
_LOOK_SECONDS = 0.1
"""How often a task that waits to begin looks whether it is still wanted, or another more so."""

# Of each worker in this process the tasks in flight; whoever waits to be one of them is told of changes.
_begun: defaultdict[str, list[WorkerTask]] = defaultdict(list)
# And how many left its pool for another that has not begun yet: one may do so at a time.
_vacated: defaultdict[str, int] = defaultdict(int)
_turns = threading.Condition()
_workers: dict[str, int] = {}
"""How many workers the cluster of each had when it was last looked at."""


def current_worker() -> Worker | None:
    """The Dask worker whose task runs in this thread, or None."""
    # A process that has not imported it runs no worker, and need not pay for the import.
    module = sys.modules.get("distributed.worker")
    state = getattr(getattr(module, "thread_state", None), "execution_state", None)
    return None if state is None else state["worker"]


def current_task() -> WorkerTask | None:
    """The Dask task that runs in this thread, or None outside a worker."""
    worker = current_worker()
    if worker is None:
        return None
    key = sys.modules["distributed.worker"].thread_state.key
    # An actor's method runs in a thread of the actor's and is no task.
    return WorkerTask(worker, key) if key in worker.state.tasks else None


def announce_share() -> None:
    """Tell `machine` the share of a worker's process, or of a child of Dask's ``processes`` scheduler."""
    worker = current_worker()
    if worker is not None:
        from distributed.utils import sync

        set_share(worker, sync(worker.loop, worker.scheduler.identity))
    elif multiprocessing.parent_process() is not None and not _is_worker_process():
        # How many there are is in the parent alone; this is how many it starts unless told otherwise.
        machine.set_share(dask.config.get("num_workers", None) or CPU_COUNT)


def _is_worker_process() -> bool:
    module = sys.modules.get("distributed.worker")
    return module is not None and len(module.Worker._instances) > 0


def set_share(worker: Worker, cluster: dict[str, Any]) -> None:
    """Count the worker processes beside this one; ``cluster`` is what the scheduler says of itself."""
    others = [
        address
        for address, known in cluster["workers"].items()
        if known["host"] == worker.ip and not address.startswith("inproc://") and address != worker.address
    ]
    _workers[worker.id] = len(cluster["workers"])
    machine.set_share(1 + len(others), worker.memory_manager.memory_limit if worker.nanny else None)


class WorkerTask:
    """One running task, used by its own thread alone: begun, perhaps out of its pool meanwhile, done.

    Attributes:
        worker: the worker that runs it.
        key: its Dask key.
        urgency: its priority as a user gives it; more is sooner.
        span: its `distributed.span`, the tags joined by "/"; "" without one.
        rows: sequences of its rows that are unfinished.
        together: how many sequences the engine that answers them runs together, by what it said last.
    """

    def __init__(self, worker: Worker, key: Any) -> None:
        self.worker = worker
        self.key = key
        known = worker.state.tasks.get(key)
        self.urgency = 0 if known is None else _urgency(known)
        # Not from this thread's annotations, which may be those of a task that has seceded.
        span = (known.annotations or {}).get("span") if known is not None else None
        self.span = "/".join(span["name"]) if span else ""
        self.rows = self.together = self._samples = 0
        self._left = self._alone = False

    def cancelled(self) -> bool:
        """Whether the worker no longer wants this task, because its future was cancelled or released."""
        # A dict's get is atomic, and the event loop never mutates a state in place but by assignment.
        task = self.worker.state.tasks.get(self.key)
        return task is None or task.state not in ("executing", "long-running")

    def leaving(self) -> bool:
        """Whether the worker is about to close, so that the rows are for another."""
        status = self.worker.status.name
        return status in ("closing", "closed") or (self._alone and status == "closing_gracefully")

    def hand_back(self) -> None:
        """Let another worker have the task, where this one is about to close.

        Raises:
            Reschedule: that is so.
        """
        if self.leaving():
            from distributed import Reschedule

            raise Reschedule

    def begin(self, rows: int, samples: int, alone: bool) -> None:
        """Wait until the worker has room for one more in flight, more urgent ones not counted against it.

        There is none only after tasks left the pool at the same moment, or for an urgent one.

        Args:
            rows, samples: how many it brings, and of each.
            alone: its rows are all that the task is for, so that it may be put back; one of a user's own has
                done other work before it asked.

        Raises:
            Reschedule: a more urgent task waits for the thread, or the worker is about to close, and nothing
                was begun.
            InterruptedError: the task was cancelled.
        """
        self.rows, self._samples, self._alone = rows * samples, samples, alone
        with _turns:
            begun = _begun[self.worker.id]
            while not self._room():
                if self.cancelled():
                    raise InterruptedError("the rows were cancelled")
                self.hand_back()
                if _in_pool() and self._more_urgent_waits():
                    from distributed import Reschedule

                    if alone:
                        raise Reschedule
                    self._left = True
                    self._leave_pool()
                _turns.wait(_LOOK_SECONDS)
            begun.append(self)
            _vacated[self.worker.id] = max(0, _vacated[self.worker.id] - 1)

    def finished(self, rows: int) -> None:
        """Note that so many rows are answered."""
        self.rows -= rows * self._samples

    def make_room(self) -> None:
        """Leave the thread pool where the worker should take another task, or a more urgent one waits."""
        if self._left or not _in_pool():
            return
        with _turns:
            free = len(self.worker.state.executing) < self.worker.state.nthreads
            free = free or _vacated[self.worker.id] > 0
            if not self._more_urgent_waits() and (free or not self._room()):
                return
            self._left = True
            _vacated[self.worker.id] += 1
        self._leave_pool()

    def _leave_pool(self) -> None:
        """As `distributed.secede`, by which Dask would learn that such tasks take as long as this one so far:
        some milliseconds, for which nothing is worth stealing, nor another worker starting."""
        from distributed.threadpoolexecutor import secede
        from distributed.worker_state_machine import SecedeEvent

        secede()
        event = SecedeEvent(key=self.key, compute_duration=None, stimulus_id=f"secede-{time.time()}")
        self.worker.loop.add_callback(self.worker.handle_stimulus, event)

    def _room(self) -> bool:
        """Whether the worker should have one more task in flight."""
        begun = [other for other in _begun[self.worker.id] if other.urgency >= self.urgency]
        if len(begun) < max(2, self.worker.state.nthreads):
            return True
        rows = sum(max(0, other.rows) for other in begun)
        enough = max(ROWS_IN_HAND, *(other.together * 3 // 2 for other in begun))
        if len(begun) >= _MOST_TASKS or rows >= enough:
            return False
        if rows < _FEW_ROWS or _workers.get(self.worker.id, 1) == 1:
            return True
        # The event loop's thread changes the set meanwhile; a copy is made in one piece.
        return sum(map(_is_first, tuple(self.worker.state.ready))) >= _PLENTY

    def done(self) -> None:
        """Let another task of this worker begin, or leave the pool."""
        with _turns:
            _begun[self.worker.id].remove(self)
            _turns.notify_all()

    def _more_urgent_waits(self) -> bool:
        # The event loop's thread changes the set meanwhile; a copy is made in one piece.
        return any(_urgency(other) > self.urgency for other in tuple(self.worker.state.ready))


async def rows_handed_back(worker: Worker) -> None:
    """Wait, for a while, until the tasks of a worker that closes have kept their finished rows."""
    end = asyncio.get_running_loop().time() + _HAND_BACK_SECONDS
    while _begun[worker.id] and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_LOOK_SECONDS / 2)


def _is_first(task: TaskState) -> bool:
    """Whether a task is no further slice of a partition, which may well be empty."""
    return not (isinstance(task.key, tuple) and len(task.key) == 3 and task.key[2] != 0)


def _urgency(task: TaskState) -> int:
    # What a user gives comes first in a priority, negated; the rest is the order in the graph.
    return -task.priority[0] if task.priority else 0


def _in_pool() -> bool:
    from distributed.threadpoolexecutor import thread_state

    return getattr(thread_state, "proceed", False)
