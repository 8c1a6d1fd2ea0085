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

if TYPE_CHECKING:
    from distributed import Worker

    from daskllm.engine.layers import ResidentModel
    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = ["close_session", "close_session_on", "model_for", "open_session", "open_session_on", "session_for"]

_lock = threading.Lock()
_sessions: dict[Any, Future[Any]] = {}
_models: dict[Any, ResidentModel] = {}


def model_for(spec: ModelSpec) -> ResidentModel:
    """This process's layers of ``spec``, each loaded when it is first run; its session has the same.

    Raises:
        ModelError: the directory cannot be read.
    """
    from daskllm.engine.layers import ResidentModel

    with _lock:
        if spec not in _models:
            _models[spec] = ResidentModel.open(spec)
        return _models[spec]


@singledispatch
def open_session(spec: ModelSpec) -> Session:
    """A new session for a specification; register another kind of specification by its class."""
    # A scheduler or client that unpickles a graph imports this module and must not import torch for it.
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
                _models.pop(spec, None)
            opening.set_exception(error)
            raise
    session: Session = opening.result()
    return session


def close_session(spec: ModelSpec) -> None:
    """Close this process's session for ``spec`` and forget it; nothing happens where there is none."""
    with _lock:
        opening = _sessions.pop(spec, None)
        model = _models.pop(spec, None)
    if opening is not None and opening.exception() is None:
        opening.result().close()
    if model is not None:
        model.close()


async def open_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Open ``spec`` on a worker, for `Client.run`; the worker's event loop stays free meanwhile."""
    worker.set_share(dask_worker, await dask_worker.scheduler.identity())
    await asyncio.to_thread(session_for, spec)


async def close_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Close ``spec`` on a worker, for `Client.run`."""
    await asyncio.to_thread(close_session, spec)


# Threads do not survive a fork, so neither does a session.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sessions.clear)
    os.register_at_fork(after_in_child=_models.clear)
