"""The door to a worker's stages: what a client puts on every worker, and what it asks of one.

It owns the plugin and the functions for `Client.run`. It refuses to know how stages work (`host`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from distributed import Worker, WorkerPlugin

from daskllm.runtime.blockserver import block_server_of
from daskllm.runtime.leases import serve
from daskllm.runtime.remote import RemoteSession
from daskllm.runtime.versions import learn
from daskllm.runtime.worker import rows_handed_back

if TYPE_CHECKING:
    from daskllm.runtime.host import StageHost
    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = ["StagePlugin", "VersionPlugin", "at_engine", "host_of", "staged_session", "times_on"]

NAME = "daskllm-stages"


class StagePlugin(WorkerPlugin):
    """Gives every worker, those that join later too, the handlers by which stages talk and blocks travel."""

    name = NAME
    idempotent = True

    async def setup(self, worker: Worker) -> None:
        await asyncio.to_thread(_import_host)
        host_of(worker)
        block_server_of(worker)
        serve(worker)

    async def teardown(self, worker: Worker) -> None:
        await rows_handed_back(worker)


class VersionPlugin(WorkerPlugin):
    """Tells every worker, those that join later too, which version of a model is present.

    Args:
        name: the model's; a later update takes the place of an earlier one.
    """

    def __init__(self, name: str, handle: ModelSpec, now: ModelSpec, gone: tuple[ModelSpec, ...]) -> None:
        self.name, self._handle, self._now, self._gone = name, handle, now, gone

    def setup(self, worker: Worker) -> None:
        learn(self._handle, self._now, self._gone)


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
    """What ``function`` makes of the session with the engine of a chain, for `Client.run` on its worker."""
    (chain,) = (chain for chain in spec.chains if chain.stages[-1].worker == dask_worker.address)
    return function(await host_of(dask_worker).open(chain))


async def times_on(spec: ModelSpec, dask_worker: Worker) -> tuple[int, int, float, float, int] | None:
    """Replica, stage, busy and waiting seconds and steps of a worker's stage, for `Client.run`."""
    for replica, chain in enumerate(spec.chains):
        if (found := host_of(dask_worker).times(chain)) is not None:
            return replica, found[0], found[1].busy, found[1].waiting, found[1].passes
    return None
