"""One session per process and model specification, opened once however many tasks ask at the same time.

It owns the registry of open sessions. It refuses to know what a session does with its memory.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from daskllm.runtime import worker
from daskllm.runtime.resident import close_model, model_for, resident_bytes

if TYPE_CHECKING:
    from distributed import Worker

    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = [
    "close_session",
    "close_session_on",
    "open_session",
    "open_session_on",
    "resident_bytes_on",
    "session_for",
]

_lock = threading.Lock()
_sessions: dict[Any, Future[Any]] = {}


@singledispatch
def open_session(spec: ModelSpec) -> Session:
    """A new session for a specification; register another kind of specification by its class."""
    # A scheduler or client that unpickles a graph imports this module and must not import torch for it.
    if spec.stages:
        from daskllm.runtime.stages import staged_session

        return staged_session(spec)
    from daskllm.session import Session

    return Session.open(spec, model_for(spec))


def session_for(spec: ModelSpec) -> Session:
    """This process's session for ``spec``, opened by the first who asks while the others wait.

    Raises:
        ModelError: the model cannot be opened. All who waited get the same exception, nothing stays
            registered, and the next call tries again.
    """
    with _lock:
        opening = _sessions.get(spec)
        mine = opening is None
        if opening is None:
            opening = _sessions[spec] = Future()
    if mine:
        try:
            worker.announce_share()
            opening.set_result(open_session(spec))
        except BaseException as error:
            with _lock:
                _sessions.pop(spec, None)
            close_model(spec)
            opening.set_exception(error)
            raise
    session: Session = opening.result()
    return session


def close_session(spec: ModelSpec) -> None:
    """Close this process's session for ``spec`` and forget it; nothing happens where there is none."""
    with _lock:
        opening = _sessions.pop(spec, None)
    if opening is not None and opening.exception() is None:
        opening.result().close()
    close_model(spec)


async def open_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Open ``spec`` on a worker, for `Client.run`; the worker's event loop stays free meanwhile.

    The worker of the last of its stages opens them all.
    """
    if spec.stages:
        from daskllm.runtime.stages import host_of

        await host_of(dask_worker).open(spec)
        return
    worker.set_share(dask_worker, await dask_worker.scheduler.identity())
    await asyncio.to_thread(session_for, spec)


async def close_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Close ``spec`` on a worker, for `Client.run`."""
    if spec.stages:
        from daskllm.runtime.stages import host_of

        await host_of(dask_worker).release(spec)
    await asyncio.to_thread(close_session, spec)


async def resident_bytes_on(spec: ModelSpec, dask_worker: Worker) -> dict[str, int]:
    """Layer -> bytes of its weights on a worker, for `Client.run`."""
    return resident_bytes(spec)


# Threads do not survive a fork, so neither does a session.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sessions.clear)
