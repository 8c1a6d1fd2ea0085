"""What a task knows of the Dask worker that it runs on: whether it is still wanted, and whose turn it is.

A worker should have two partitions in flight, so that its batch does not drain at the end of one. A worker
with several threads has them anyway. With one thread, a task that waits for its rows leaves the thread pool
(`distributed.secede`), which lets the worker start the next, as long as no other task of that worker is
outside the pool: at most two are in flight, and the rest of the queue stays where it can be stolen.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from typing import TYPE_CHECKING, Any

import dask.config
from dask.system import CPU_COUNT

from daskllm import machine

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["WorkerTask", "announce_share", "current_task", "current_worker", "set_share"]

# Of each worker in this process, the key of the one task that is outside its thread pool.
_outside: dict[str, Any] = {}
_outside_lock = threading.Lock()


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
    return WorkerTask(worker, sys.modules["distributed.worker"].thread_state.key)


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
    machine.set_share(1 + len(others), worker.memory_manager.memory_limit if worker.nanny else None)


class WorkerTask:
    """One running task, used by its own thread alone.

    Attributes:
        worker: the worker that runs it.
        key: its Dask key.
    """

    def __init__(self, worker: Worker, key: Any) -> None:
        self.worker = worker
        self.key = key
        self._left = False

    def cancelled(self) -> bool:
        """Whether the worker no longer wants this task, because its future was cancelled or released."""
        # A dict's get is atomic, and the event loop never mutates a state in place but by assignment.
        task = self.worker.state.tasks.get(self.key)
        return task is None or task.state not in ("executing", "long-running")

    def make_room(self) -> None:
        """Leave the thread pool of a one-thread worker, unless another of its tasks is outside already."""
        if self._left or self.worker.state.nthreads != 1 or not _in_pool():
            return
        with _outside_lock:
            if self.worker.id in _outside:
                return
            _outside[self.worker.id] = self.key
        from distributed import secede

        secede()
        self._left = True

    def done(self) -> None:
        """Let another task of this worker leave the pool."""
        if self._left:
            with _outside_lock:
                del _outside[self.worker.id]


def _in_pool() -> bool:
    from distributed.threadpoolexecutor import thread_state

    return getattr(thread_state, "proceed", False)
