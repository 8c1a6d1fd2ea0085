"""What gathers the figures: a plugin on every worker that tells them, one on the scheduler that keeps them.

A worker's numbers ride on its heartbeats. Jobs are told of by the events that progress bars follow too. Once
a second the scheduler's plugin looks at both and at its task groups; a task or a token costs it nothing.

It owns where figures come from in Dask. It refuses to know how they are summed (`board`) and shown.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from distributed import SchedulerPlugin, WorkerPlugin
from distributed.utils import key_split_group
from tornado.ioloop import PeriodicCallback

from daskllm.dashboard import metrics
from daskllm.dashboard.board import Board
from daskllm.dashboard.engines import read, told
from daskllm.runtime.call import Kind
from daskllm.runtime.progress import TOPIC, Increment

if TYPE_CHECKING:
    from distributed import Scheduler, Worker
    from distributed.scheduler import TaskGroup

__all__ = ["NAME", "BoardPlugin", "EnginePlugin", "board_of"]

logger = logging.getLogger(__name__)

NAME = "daskllm-figures"
HEARTBEAT = "daskllm"
"""Under which name a worker's figures are in its heartbeat."""
SECONDS = 1.0
_WAITING = ("waiting", "queued", "no-worker")


class EnginePlugin(WorkerPlugin):
    """Has a worker, those that join later too, tell what its engines do, there and on its ``/metrics``."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Begin."""
        worker.metrics[HEARTBEAT] = told
        metrics.show_worker(worker)

    def teardown(self, worker: Worker) -> None:
        """End."""
        worker.metrics.pop(HEARTBEAT, None)
        metrics.hide(worker)


class BoardPlugin(SchedulerPlugin):
    """Keeps a scheduler's `Board`, and shows it on its dashboard and its ``/metrics``.

    Attributes:
        board: made when the plugin starts.
    """

    name = NAME
    idempotent = True

    def __init__(self) -> None:
        self.board = Board()

    def __reduce__(self) -> tuple[Any, ...]:
        return BoardPlugin, ()  # what it has gathered stays where it was gathered

    async def start(self, scheduler: Scheduler) -> None:
        """Begin, on the scheduler's event loop."""
        self._scheduler = scheduler
        self._looking = PeriodicCallback(self.look, SECONDS * 1000)
        self._looking.start()
        metrics.show_scheduler(scheduler, self.board)
        try:
            from daskllm.dashboard.routes import add_pages
        except ImportError as error:  # the figures are on /metrics all the same
            logger.info("no page LLM on the dashboard: %s", error)
        else:
            add_pages(scheduler, self.board)

    async def close(self) -> None:
        """End."""
        self._looking.stop()
        metrics.hide(self._scheduler)

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """A worker is gone."""
        self.board.drop_worker(worker, time.time())

    def log_event(self, topic: str, msg: Any) -> None:
        """Anything that anybody tells; called for each event of each topic."""
        if topic == TOPIC:
            new = Increment(**msg)
            self.board.take(new, partial(self._parts, new), time.time())
        elif topic == "stealing" and msg[0] == "confirm" and _kind(key_split_group(msg[1])):
            self.board.steals += 1

    def look(self) -> None:
        """Take what workers told and how many tasks there are, and add a point to the lines."""
        now = time.time()
        for address, worker in self._scheduler.workers.items():
            message = worker.metrics.get(HEARTBEAT)
            if message is not None:
                name = str(worker.name) if worker.name is not None else address
                self.board.take_worker(address, name, read(message), message["time"])
        self.board.queue(self._tasks(), now)
        self.board.sample(now)

    def _parts(self, new: Increment) -> set[int]:
        """The numbers of a cut's table's partitions; of a job that goes on, of those that are left."""
        if not new.cut_rows:
            return set()
        cuts = key_split_group(new.task)
        keys = (key for key in self._scheduler.tasks if isinstance(key, tuple) and len(key) == 2)
        return {int(key[1]) for key in keys if key[0] == cuts}

    def _tasks(self) -> dict[str, tuple[int, int]]:
        """Label -> tasks of rows that run, and that wait."""
        counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for group in self._scheduler.task_groups.values():
            if _kind(group.name):
                waiting = sum(group.states[state] for state in _WAITING)
                if waiting or group.states["processing"]:
                    both = counts[self._label(group)]
                    both[0] += group.states["processing"]
                    both[1] += waiting
        return {label: (running, waiting) for label, (running, waiting) in counts.items()}

    def _label(self, group: TaskGroup) -> str:
        """As `Increment.label` of the group's tasks."""
        spans = self._scheduler.extensions.get("spans")
        span = None if spans is None or group.span_id is None else spans.spans.get(group.span_id)
        name = "/".join(span.name) if span is not None and span.name != ("default",) else ""
        tables = (one.name for one in (group, *group.dependencies) if "-cut-" in one.name)
        return Increment(span=name, job=next(tables, group.name if "-" in group.name else "")).label


def _kind(group: str) -> str:
    """What the tasks of a group ask, if they are tasks of rows.

    >>> _kind("chat-two-0f"), _kind("chat-whole-0f"), _kind("chat-cut-0f"), _kind("sum-0f"), _kind("embed")
    ('chat', 'chat', '', '', 'embed')
    """
    first, *rest = group.split("-")
    return first if first in get_args(Kind) and rest[:1] not in (["cut"], ["merge"]) else ""


def board_of(scheduler: Scheduler) -> Board | None:
    """The figures of a scheduler; None where nobody gathers them."""
    plugin = scheduler.plugins.get(NAME)
    return plugin.board if isinstance(plugin, BoardPlugin) else None
