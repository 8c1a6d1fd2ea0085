"""How long Dask's scheduler takes slices of rows to last: by that it places them and lets them be stolen.

Dask learns it by the words of tasks' names, half of it from the last that ended. A slice that a cut left
empty has such a name too and ends at once: after a few of those the one partition of a table that has long
rows seems to take no time, and its slices are run one after another where it was cut, while others are idle.
And Dask looks once a second whether there is something to steal, and takes one task for a worker then: one
that has come to its end goes idle for so long, and again where what it got was an empty slice. So here a
worker without a task makes it look at once.

It owns what is learned of empty slices, which is nothing, and when Dask looks. What is stolen is Dask's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin

from daskllm.runtime.slices import is_slice

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.scheduler import TaskPrefix

__all__ = ["Durations", "learn_durations"]

_UNKNOWN = -1.0
"""As Dask has it."""
_PAUSE_SECONDS = 0.01
"""Between two looks for something to steal."""
_SHARE = 0.05
"""Of a scheduler's time, that goes into them at most: with many workers and tasks a look takes longer."""


class Durations(SchedulerPlugin):
    """Takes back what Dask learns from empty slices, and lets it steal when a worker has nothing to do."""

    name = "daskllm-durations"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._known: dict[str, float] = {}
        self._looks = False
        self._not_before = 0.0

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, typename: str = "", **kwargs: Any
    ) -> None:
        """A task has changed its state; where it ended, its result is of that type."""
        if start != "processing":
            return
        worker = self._scheduler.workers.get(kwargs.get("worker", ""))
        if worker is not None and not worker.processing:
            self._look_soon()
        if finish == "memory" and is_slice(key):
            self._learn(self._scheduler.tasks[key].prefix, empty=typename.endswith("NoneType"))

    def _learn(self, prefix: TaskPrefix, empty: bool) -> None:
        if empty:
            prefix.duration_average = self._known.get(prefix.name, _UNKNOWN)
        else:
            self._known[prefix.name] = prefix.duration_average

    def _look_soon(self) -> None:
        # A cluster whose stealing is off, or stopped while it rests, has no such callback.
        if self._looks or "stealing" not in self._scheduler.periodic_callbacks:
            return
        self._looks = True
        wait = max(_PAUSE_SECONDS, self._not_before - time.monotonic())
        self._scheduler.loop.call_later(wait, self._look)

    def _look(self) -> None:
        self._looks = False
        if "stealing" not in self._scheduler.periodic_callbacks:
            return
        begun = time.monotonic()
        self._scheduler.extensions["stealing"].balance()
        ended = time.monotonic()
        self._not_before = ended + (ended - begun) / _SHARE


def learn_durations(dask_scheduler: Scheduler) -> None:
    """Have a scheduler look after slices as `Durations` does, once; for `Client.run_on_scheduler`."""
    if Durations.name in dask_scheduler.plugins:
        return
    plugin = Durations(dask_scheduler)
    dask_scheduler.add_plugin(plugin)
    # Before Dask's stealing, which looks at the duration when it hears of an end.
    dask_scheduler.plugins = {plugin.name: plugin, **dask_scheduler.plugins}
