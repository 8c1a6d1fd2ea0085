"""The door to a worker's stages: what a client puts on every worker, and what it asks of one.

It owns the plugin and the functions for `Client.run`. It refuses to know how stages work (`host`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from distributed import Worker, WorkerPlugin

from daskllm.runtime.remote import RemoteSession

if TYPE_CHECKING:
    from daskllm.runtime.host import StageHost
    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = ["StagePlugin", "at_engine", "host_of", "staged_session", "times_on"]

NAME = "daskllm-stages"


class StagePlugin(WorkerPlugin):
    """Gives every worker, those that join later too, the handlers by which stages talk."""

    name = NAME
    idempotent = True

    async def setup(self, worker: Worker) -> None:
        await asyncio.to_thread(_import_host)
        host_of(worker)


def _import_host() -> type[StageHost]:
    # torch and the engine: a client that registers the plugin has them, a worker imports them in a thread.
    from daskllm.runtime.host import StageHost

    return StageHost


def host_of(worker: Worker) -> StageHost:
    """The worker's stages; to be called on its event loop."""
    if NAME not in worker.extensions:
        worker.extensions[NAME] = _import_host()(worker)
    return cast("StageHost", worker.extensions[NAME])


def staged_session(spec: ModelSpec) -> Session:
    """A session for a model in stages: one that asks the engine's worker, on that worker too.

    Its engine may move to another, when a stage is lost.
    """
    return cast("Session", RemoteSession(spec))  # the same calls


async def at_engine(spec: ModelSpec, function: Callable[[Session], Any], dask_worker: Worker) -> Any:
    """What ``function`` makes of the session with the engine, for `Client.run` on its worker."""
    return function(await host_of(dask_worker).open(spec))


async def times_on(spec: ModelSpec, dask_worker: Worker) -> tuple[int, float, float, int] | None:
    """Number, busy and waiting seconds and steps of a worker's stage, for `Client.run`."""
    found = host_of(dask_worker).times(spec)
    return None if found is None else (found[0], found[1].busy, found[1].waiting, found[1].passes)
