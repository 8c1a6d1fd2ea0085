"""How long Dask's scheduler takes slices of rows to last: by that it places them and lets them be stolen.

Dask learns it by the words of tasks' names, half of it from the last that ended. A slice that a cut left
empty has such a name too and ends at once: after a few of those the one partition of a table that has long
rows seems to take no time, and its slices are run one after another where it was cut, while others are idle.
It owns what is learned of empty slices, which is nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin

from daskllm.runtime.slices import is_slice

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["Durations", "learn_durations"]

_UNKNOWN = -1.0
"""As Dask has it."""


class Durations(SchedulerPlugin):
    """Takes back what Dask learns from empty slices."""

    name = "daskllm-durations"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._known: dict[str, float] = {}

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, typename: str = "", **kwargs: Any
    ) -> None:
        """A task has changed its state; where it ended, its result is of that type."""
        if start != "processing" or finish != "memory" or not is_slice(key):
            return
        prefix = self._scheduler.tasks[key].prefix
        if typename.endswith("NoneType"):
            prefix.duration_average = self._known.get(prefix.name, _UNKNOWN)
        else:
            self._known[prefix.name] = prefix.duration_average


def learn_durations(dask_scheduler: Scheduler) -> None:
    """See to it that a scheduler learns nothing from empty slices, for `Client.run_on_scheduler`."""
    if Durations.name in dask_scheduler.plugins:
        return
    plugin = Durations(dask_scheduler)
    dask_scheduler.add_plugin(plugin)
    # Before Dask's stealing, which looks at the duration when it hears of an end.
    dask_scheduler.plugins = {plugin.name: plugin, **dask_scheduler.plugins}
