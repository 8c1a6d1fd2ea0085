"""Stops the rows of a run of Dask's threads that was interrupted or failed elsewhere.

Dask's threaded scheduler returns at once on an interrupt or on a task's error, while the other tasks of its
run go on in their threads. For tasks that last minutes that is no way to stop. A callback hears of such an
end and marks the calls whose tasks were still running; these ask, and stop.

Dask keeps its callbacks in one place for all threads, empties it while a run is under way, and puts back what
the run found there: two runs that overlap would lose the callback for good. So it is put there again with the
graph of a run (`protect`), at the run's start, and with each of its calls.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dask._task_spec import DataNode, GraphNode
from dask.callbacks import Callback

from daskllm.runtime.call import Call

__all__ = ["abandonment", "give_up", "protect"]

# How often the runs of a call were given up, by the call's identity: a thread has the graph's own object.
_given_up: Counter[int] = Counter()
_lock = threading.Lock()


def abandonment(call: Call) -> Callable[[], bool]:
    """A function that tells whether a run of ``call`` was given up since this was called."""
    protect()
    before = _given_up[id(call)]
    return lambda: _given_up[id(call)] != before


def give_up(calls: Iterable[Call]) -> None:
    """Stop the rows of runs of these very objects, which their graphs hold."""
    with _lock:
        _given_up.update(map(id, calls))


def protect() -> None:
    """Have the next run of Dask's threads tell us of its end."""
    if _callback not in Callback.active:
        # A new set: the old one may be another run's by now, which goes through it.
        Callback.active = Callback.active | {_callback}


def _started(graph: Mapping[Any, Any]) -> None:
    protect()


def _finished(graph: Mapping[Any, Any], state: Mapping[str, Any], failed: bool) -> None:
    if not failed:
        return
    # A run that could not begin has no state.
    calls = {id(call) for key in state.get("running", ()) for call in _calls(graph[key])}
    with _lock:
        _given_up.update(calls)


def _calls(part: Any) -> Iterator[Call]:
    """The calls among a task's arguments, in the tasks fused into it too."""
    if isinstance(part, Call):
        yield part
    elif isinstance(part, DataNode):
        yield from _calls(part.value)
    elif isinstance(part, GraphNode):
        yield from _calls((getattr(part, "args", ()), getattr(part, "kwargs", {})))
    elif isinstance(part, Mapping):
        yield from _calls(list(part.values()))
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _calls(item)


_callback = Callback(start=_started, finish=_finished)._callback
protect()
