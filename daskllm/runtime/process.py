"""One session per process and model specification, opened once however many tasks ask at the same time.

It owns the registry of open sessions and who uses them: one that an update has superseded is closed when its
last user has left. It refuses to know what a session does with its memory.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from daskllm.runtime import worker
from daskllm.runtime.resident import close_model, model_for, open_models, resident_bytes
from daskllm.runtime.versions import known, present, superseded

if TYPE_CHECKING:
    from distributed import Worker

    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = [
    "close_idle",
    "close_idle_on",
    "close_session",
    "close_session_on",
    "engine_times",
    "engine_times_on",
    "is_open",
    "is_open_on",
    "keeping",
    "open_session",
    "open_session_on",
    "open_sessions",
    "resident_bytes_on",
    "session_for",
    "sweep",
    "sweep_on",
    "using",
]

_lock = threading.Lock()
_sessions: dict[Any, Future[Any]] = {}
_users: Counter[Any] = Counter()
# When each specification was last opened or left.
_used: dict[Any, float] = {}


@singledispatch
def open_session(spec: ModelSpec) -> Session:
    """A new session for a specification; register another kind of specification by its class."""
    # A scheduler or client that unpickles a graph imports this module and must not import torch for it.
    if spec.chains:
        from daskllm.runtime.stages import staged_session

        return staged_session(spec)
    model = model_for(spec, whole=True)
    from daskllm.session import Session

    return Session.open(spec, model)


def session_for(spec: ModelSpec) -> Session:
    """This process's session for the present version of ``spec``, opened by the first who asks while the
    others wait.

    Whoever asks rows of it goes by `using`, or an update may close it meanwhile.

    Raises:
        ModelError: the model cannot be opened. All who waited get the same exception, nothing stays
            registered, and the next call tries again.
    """
    return _opened(present(spec))


@contextmanager
def using(spec: ModelSpec) -> Iterator[Session]:
    """As `session_for`; the session stays open, whatever is updated, until the block is left."""
    # Under the lock, or an update could come between the look and the count.
    with _lock:
        now = present(spec)
        _users[now] += 1
    try:
        yield _opened(now)
    finally:
        _leave(now)


@contextmanager
def keeping(spec: ModelSpec) -> Iterator[None]:
    """Let no update close what this process holds of this very version until the block is left."""
    with _lock:
        _users[spec] += 1
    try:
        yield
    finally:
        _leave(spec)


def _leave(spec: ModelSpec) -> None:
    with _lock:
        _used[spec] = time.monotonic()
        _users[spec] -= 1
        if not _users[spec]:
            del _users[spec]
    if superseded(spec):
        sweep()


def sweep() -> None:
    """Close what updates have superseded and nobody uses."""
    with _lock:
        idle = [s for s in {*_sessions, *open_models()} if superseded(s) and not _users[s]]
        closing = [opening for s in idle if (opening := _sessions.pop(s, None)) is not None]
        # Still under the lock: whoever comes for the same version loads layers of its own.
        for spec in idle:
            close_model(spec)
    for opening in closing:
        _close(opening)


def close_idle(spec: ModelSpec, seconds: float) -> bool:
    """Close what this process has of a model, all its versions, where nobody has used it for so long.

    Returns:
        Whether some of it stays open.
    """
    closing, stays = [], False
    for one in known(spec):
        with _lock:
            opening = _sessions.get(one)
            if opening is None and one not in open_models():
                continue
            fresh = time.monotonic() - _used.get(one, float("-inf")) < seconds
            if _users[one] or fresh or (opening is not None and not opening.done()):
                stays = True
                continue
            if opening is not None:
                closing.append(_sessions.pop(one))
            _used.pop(one, None)
            # Still under the lock, as in `sweep`.
            close_model(one)
    for opening in closing:
        _close(opening)
    return stays


def is_open(spec: ModelSpec) -> bool:
    """Whether this process has a session of this very version, or is about to."""
    with _lock:
        return spec in _sessions


def _opened(spec: ModelSpec) -> Session:
    with _lock:
        opening = _sessions.get(spec)
        mine = opening is None
        if opening is None:
            opening = _sessions[spec] = Future()
    if mine:
        try:
            worker.announce_share()
            opening.set_result(open_session(spec))
            _used[spec] = time.monotonic()
        except BaseException as error:
            with _lock:
                _sessions.pop(spec, None)
            close_model(spec)
            opening.set_exception(error)
            raise
    session: Session = opening.result()
    return session


def close_session(spec: ModelSpec) -> None:
    """Close this process's sessions for ``spec``, all its versions; nothing happens where there is none."""
    for one in known(spec):
        with _lock:
            opening = _sessions.pop(one, None)
            _used.pop(one, None)
        if opening is not None:
            _close(opening)
        close_model(one)


def _close(opening: Future[Any]) -> None:
    if opening.exception() is None:
        opening.result().close()


async def open_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Open ``spec`` on a worker, for `Client.run`; the worker's event loop stays free meanwhile.

    The worker of the last stage of a chain opens all of that chain.
    """
    if spec.chains:
        from daskllm.runtime.stages import host_of

        for chain in spec.chains:
            if chain.stages[-1].worker == dask_worker.address:
                await host_of(dask_worker).open(chain)
        return
    worker.set_share(dask_worker, await dask_worker.scheduler.identity())
    await asyncio.to_thread(session_for, spec)


async def close_session_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Close ``spec`` on a worker, for `Client.run`."""
    if spec.chains:
        from daskllm.runtime.stages import host_of

        for chain in (chain for one in known(spec) for chain in one.chains):
            await host_of(dask_worker).release(chain)
    await asyncio.to_thread(close_session, spec)


async def close_idle_on(spec: ModelSpec, seconds: float, dask_worker: Worker) -> bool:
    """As `close_idle` on a worker, for `Client.run`; its stages of the model included."""
    if spec.chains:
        from daskllm.runtime.stages import host_of

        # While it has a stage, maybe one that is still loading, it needs the model's files.
        if await host_of(dask_worker).close_idle(spec, seconds):
            return True
    return await asyncio.to_thread(close_idle, spec, seconds)


async def is_open_on(spec: ModelSpec, dask_worker: Worker) -> bool:
    """Whether a worker's process has a session of this very version, for `Client.run`."""
    return is_open(spec)


async def sweep_on(spec: ModelSpec, dask_worker: Worker) -> None:
    """Close what updates have superseded on a worker and nobody uses, for `Client.run`.

    Args:
        spec: of the model that was updated.
    """
    if spec.chains:
        from daskllm.runtime.stages import host_of

        await host_of(dask_worker).sweep()
    await asyncio.to_thread(sweep)


async def resident_bytes_on(spec: ModelSpec, dask_worker: Worker) -> dict[str, int]:
    """Layer -> bytes of its weights on a worker, for `Client.run`; of its chains, a worker is in one."""
    held = (resident_bytes(one) for one in spec.chains or (spec,))
    return {name: size for layers in held for name, size in layers.items()}


def open_sessions() -> dict[ModelSpec, Session]:
    """The sessions that this process has open by now, one that asks an engine elsewhere among them."""
    with _lock:
        known = list(_sessions.items())
    return {s: o.result() for s, o in known if o.done() and o.exception() is None}


def engine_times(spec: ModelSpec) -> tuple[float, float, int] | None:
    """Busy and waiting seconds and steps of this process's engine; None where it has not opened the model."""
    with _lock:
        opening = _sessions.get(spec)
    if opening is None or not opening.done() or opening.exception() is not None:
        return None
    metrics = opening.result().metrics
    return metrics.busy_seconds, max(0.0, metrics.waiting_seconds), metrics.steps


async def engine_times_on(spec: ModelSpec, dask_worker: Worker) -> tuple[float, float, int] | None:
    """As `engine_times`, for `Client.run`."""
    return engine_times(spec)


# Threads do not survive a fork, so neither does a session.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sessions.clear)
    os.register_at_fork(after_in_child=_users.clear)
    os.register_at_fork(after_in_child=_used.clear)
