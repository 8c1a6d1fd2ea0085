"""Who wants which model on a cluster, and what becomes of one that nobody wants any more.

A client that loads a model holds a lease on it, kept by the scheduler, and so do others that load the same.
When the last of them is gone (its notebook was closed, say) and stays away for a while, workers are told to
let the model go as soon as its rows are done and nobody has used it for as long: a job in the background goes
on. One that comes late opens it again. It owns the leases. It refuses to know how a model is closed
(`process`, `host`).
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import dask.config
import pandas as pd
from dask.utils import parse_timedelta
from distributed import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from daskllm.runtime.process import close_idle_on
from daskllm.runtime.record import latest
from daskllm.runtime.resident import open_models, resident_bytes
from daskllm.runtime.versions import known

if TYPE_CHECKING:
    from distributed import Client, Scheduler, Worker
    from distributed.scheduler import WorkerState

    from daskllm.types import ModelSpec

__all__ = ["Leases", "grace", "held_on", "keep", "leave", "loaded", "serve"]

NAME = "daskllm-leases"
_LOOK_SECONDS = 1.0


def grace() -> float:
    """Seconds that a model stays without a client: Dask's configuration ``daskllm.lease``, else a minute."""
    seconds: float = parse_timedelta(dask.config.get("daskllm.lease", "60s"))
    return seconds


def keep(client: Client, spec: ModelSpec) -> None:
    """Hold a lease on a model for as long as the client is there."""
    client.run_on_scheduler(_keep, spec, client.id, grace())


def leave(client: Client, spec: ModelSpec) -> bool:
    """Give the client's lease back; whether nobody else has one."""
    alone: bool = client.run_on_scheduler(_leave, spec, client.id)
    return alone


def loaded(client: Client) -> pd.DataFrame:
    """The models that are open on a cluster, whoever loaded them.

    Args:
        client: a synchronous client of it.

    Returns:
        A line for each model and worker that holds some of it: ``model`` (directory or Hub id), ``version``
        (how many updates brought other weights), ``dtype``, ``quantize``, ``worker`` (its address),
        ``layers`` and ``bytes`` of weights there, ``clients`` (how many of those that loaded it are there;
        with none, it goes when it has not been used for a while).

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> from distributed import Client
        >>> with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        ...     llm = daskllm.load(demo.model_path(), client=client)
        ...     found = loaded(client)
        ...     llm.close()
        >>> ours = found[found["clients"] > 0]  # whatever else this process has open
        >>> ours["clients"].tolist(), ours["layers"].tolist()
        ([1], [6])
    """
    held: dict[str, list[tuple[ModelSpec, dict[str, int]]]] = client.run(held_on)
    leases: dict[ModelSpec, int] = client.run_on_scheduler(_leases)
    lines = []
    for worker, there in held.items():
        for spec, layers in there:
            clients = sum(count for handle, count in leases.items() if _same(handle, spec))
            lines.append(
                (
                    spec.path,
                    spec.version,
                    spec.dtype,
                    spec.quantize,
                    worker,
                    len(layers),
                    sum(layers.values()),
                    clients,
                )
            )
    columns = ["model", "version", "dtype", "quantize", "worker", "layers", "bytes", "clients"]
    return pd.DataFrame(lines, columns=columns)


def _same(handle: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a model in use is one that was loaded, wherever its stages are and whatever its version."""
    return any(_whole(one) == _whole(spec) for one in known(handle))


def _whole(spec: ModelSpec) -> ModelSpec:
    return replace(spec, stages=(), replicas=())


# --- on the scheduler -------------------------------------------------------------------------------------


@dataclass
class _Lease:
    """Who wants a model.

    Attributes:
        clients: that loaded it; some may be gone.
        grace: how long it stays without any, in seconds.
        seen: when one of them was last there.
        told: when workers were last told to let it go.
    """

    grace: float
    clients: set[str] = field(default_factory=set)
    seen: float = 0.0
    told: float = 0.0


class Leases(SchedulerPlugin):
    """The leases of one cluster; made on its scheduler's event loop.

    Attributes:
        held: by the specification that a model was loaded by.
    """

    name = NAME

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.held: dict[ModelSpec, _Lease] = {}
        self._looking = asyncio.Lock()
        look = PeriodicCallback(self.look, _LOOK_SECONDS * 1000)
        scheduler.periodic_callbacks[NAME] = look
        look.start()

    def clients_of(self, spec: ModelSpec) -> set[str]:
        """Those that want a model and are there."""
        return self.held[spec].clients & self._scheduler.clients.keys() if spec in self.held else set()

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Of these workers, those that may be retired: not one that alone has layers of a model in stages."""
        needed = set()
        for spec in self.held:
            if self.clients_of(spec):
                chains = latest(scheduler, spec).chains
                needed |= {stage.worker for chain in chains for stage in chain.stages}
        return [worker for worker in workers if worker.address not in needed]

    async def look(self) -> None:
        """See which models have been without a client for long, and have workers let them go."""
        if self._looking.locked():
            return
        async with self._looking:
            now = time.monotonic()
            for spec, lease in list(self.held.items()):
                if self.clients_of(spec):
                    lease.seen = now
            wanted = {_whole(spec) for spec, lease in self.held.items() if lease.seen == now}
            for spec, lease in list(self.held.items()):
                if _whole(spec) in wanted or now - max(lease.seen, lease.told) < lease.grace:
                    continue
                lease.told = now
                gone = not await self._close(spec, lease.grace) and not self._busy()
                if gone and not self.clients_of(spec):  # nobody has loaded it meanwhile
                    self.held.pop(spec, None)

    async def _close(self, spec: ModelSpec, seconds: float) -> bool:
        """Have workers close a model where it has been idle for so long; whether it is open anywhere."""
        message = {"op": "daskllm_close_idle", "spec": pickle.dumps(spec), "seconds": seconds}
        left = await self._scheduler.broadcast(msg=message, on_error="ignore")
        return any(reply is True for reply in left.values())

    def _busy(self) -> bool:
        """Whether there are tasks, which may open a model again."""
        scheduler = self._scheduler
        return bool(scheduler.queued or scheduler.unrunnable) or any(
            worker.processing for worker in scheduler.workers.values()
        )


def _leases_of(scheduler: Scheduler) -> Leases:
    if NAME not in scheduler.plugins:
        scheduler.add_plugin(Leases(scheduler))
    return cast(Leases, scheduler.plugins[NAME])


async def _keep(spec: ModelSpec, client: str, seconds: float, dask_scheduler: Scheduler) -> None:
    held = _leases_of(dask_scheduler).held
    lease = held.setdefault(spec, _Lease(seconds))
    lease.clients.add(client)
    lease.grace, lease.seen = max(lease.grace, seconds), time.monotonic()


async def _leave(spec: ModelSpec, client: str, dask_scheduler: Scheduler) -> bool:
    leases = _leases_of(dask_scheduler)
    if spec in leases.held:
        # It stays, without a client: tasks that are there may keep the model open, or open it again.
        leases.held[spec].clients.discard(client)
        leases.held[spec].seen = time.monotonic()
    return not leases.clients_of(spec)


async def _leases(dask_scheduler: Scheduler) -> dict[ModelSpec, int]:
    leases = _leases_of(dask_scheduler)
    return {spec: len(leases.clients_of(spec)) for spec in leases.held}


# --- on a worker ------------------------------------------------------------------------------------------


def serve(worker: Worker) -> None:
    """Let the scheduler ask this worker to close what is idle."""

    async def close(spec: bytes, seconds: float) -> bool:
        return await close_idle_on(pickle.loads(spec), seconds, worker)

    worker.handlers["daskllm_close_idle"] = close


async def held_on(dask_worker: Worker) -> Sequence[tuple[ModelSpec, dict[str, int]]]:
    """The models that a worker holds layers of, with the bytes of each, for `Client.run`."""
    held = [(spec, resident_bytes(spec)) for spec in open_models()]
    return [(spec, layers) for spec, layers in held if layers]
