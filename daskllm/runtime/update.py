"""Other weights for a model that is open: the new version beside the old one, then a switch.

In two phases: whoever holds the old version opens the new one and checks all of it, and a failure anywhere
takes it back everywhere; then each process is told, one after the other, and from then on gives the new
version to every batch of rows that begins. It owns that order, and the record with the scheduler by which
other clients learn of it. It refuses to know how a version is opened (`loading`, `process`) or closed.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from daskllm.checkpoint import open_checkpoint
from daskllm.models import DecoderConfig, describe, sources
from daskllm.runtime.loading import close_on, open_on, reachable, specs_of
from daskllm.runtime.process import (
    close_session,
    is_open,
    is_open_on,
    open_session_on,
    session_for,
    sweep,
    sweep_on,
)
from daskllm.runtime.record import version_keys
from daskllm.runtime.versions import known, learn, present
from daskllm.runtime.worker import current_worker
from daskllm.types import ModelError

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.types import ModelSpec

__all__ = ["of_its_own", "present_at", "update"]

_MAY_DIFFER = ("dtype", "bos_token_id", "eos_token_ids")
_TRIES = 5
"""How often workers are told, where one is lost while they are."""

_here = threading.Lock()


def update(
    client: Client | None,
    handle: ModelSpec,
    config: DecoderConfig,
    model: str | os.PathLike[str],
    revision: str | None,
) -> None:
    """Make a checkpoint the present version of a model, in this process and on the client's workers.

    Args:
        config: of the model that is open.
        model, revision: the checkpoint; see `daskllm.checkpoint.open_checkpoint`.

    Raises:
        ModelError: the checkpoint is broken or of another model; nothing has changed.
        StageLostError, PlanError: a worker was lost, or those left have no room; nothing has changed.
        RuntimeError: called in a task.
    """
    if current_worker() is not None:
        raise RuntimeError("a task cannot update a model: call update where its rows are asked for")
    with _alone(client, handle):
        old = present_at(client, handle)
        new = _described(old, config, model, revision)
        if client is None:
            session_for(new)
            learn(handle, new)
        else:
            _on_cluster(client, handle, old, new, config)
        sweep()


def present_at(client: Client | None, handle: ModelSpec) -> ModelSpec:
    """A handle's present version, be it another client's update that made it."""
    if client is not None and client.status == "running":
        try:
            written = client.get_metadata(version_keys(handle), None)
        except OSError:  # what is known here will do; whoever asks the cluster for rows will hear of it
            written = None
        if written is not None:
            now, gone = pickle.loads(written)
            _learn_here(client, handle, now, gone)
    return present(handle)


def of_its_own(client: Client | None, spec: ModelSpec) -> ModelSpec:
    """A specification to load a model by: another than one whose model was updated since it was loaded."""
    while present_at(client, spec) != spec:
        spec = replace(spec, copy=spec.copy + 1)
    return spec


def _learn_here(client: Client, handle: ModelSpec, now: ModelSpec, gone: tuple[ModelSpec, ...]) -> None:
    if now.chains:
        from daskllm.runtime.remote import reach  # distributed, which whoever has a client has imported

        reach(now, client)
    learn(handle, now, gone)


@contextmanager
def _alone(client: Client | None, handle: ModelSpec) -> Iterator[None]:
    """One update of a model at a time, whoever makes it."""
    with _here:
        if client is None:
            yield
            return
        from distributed import Lock

        with Lock("-".join(version_keys(handle)), scheduler_rpc=client.scheduler, loop=client.loop):
            yield


def _described(
    old: ModelSpec, config: DecoderConfig, model: str | os.PathLike[str], revision: str | None
) -> ModelSpec:
    checkpoint = open_checkpoint(model, revision)
    try:
        found = describe(checkpoint.config)
        for one in fields(DecoderConfig):
            is_, was = getattr(found, one.name), getattr(config, one.name)
            if one.name not in _MAY_DIFFER and is_ != was:
                raise ModelError(
                    f"{checkpoint.path / 'config.json'}: {one.name} is {is_!r}, and {was!r} in the model "
                    "that is open; an update brings other weights to the same model: load this one beside it"
                )
        sources(found, checkpoint.names)
        path, commit = reachable(model, checkpoint)
        old = replace(old, identity=checkpoint.identity, content=checkpoint.content())
    finally:
        checkpoint.close()
    return replace(old, path=path, revision=commit, version=old.version + 1)


def _on_cluster(
    client: Client, handle: ModelSpec, old: ModelSpec, new: ModelSpec, config: DecoderConfig
) -> None:
    new = _placed(client, old, new, config)
    try:
        _open_beside(client, old, new)
        if is_open(old):
            session_for(new)
    except BaseException:
        with suppress(Exception):  # a worker that is gone holds nothing
            close_on(client, new)
        close_session(new)
        raise
    gone = {*known(handle), *specs_of(client, old)}
    _tell(client, handle, new, tuple(gone))


def _placed(client: Client, old: ModelSpec, new: ModelSpec, config: DecoderConfig) -> ModelSpec:
    """The new version with its stages where those of the old one are by now."""
    if not old.chains:
        return new
    from daskllm.runtime.heirs import succeed

    last = specs_of(client, old)[-1]
    placed = client.sync(succeed, client, last, config, last.chains)
    return new.with_chains([chain.stages for chain in placed.chains])


def _open_beside(client: Client, old: ModelSpec, new: ModelSpec) -> None:
    """Open the new version on the workers that have the old one; on one of them all where none has."""
    if new.chains:
        open_on(client, new)
        return
    opened: dict[str, bool] = client.run(is_open_on, old)
    client.run(open_session_on, new, workers=[w for w, is_ in opened.items() if is_] or list(opened)[:1])


def _tell(client: Client, handle: ModelSpec, now: ModelSpec, gone: tuple[ModelSpec, ...]) -> None:
    """Have every worker, those that join later too, and this process go over to a version."""
    from daskllm.runtime.stages import VersionPlugin

    plugin = VersionPlugin("-".join(version_keys(handle)), handle, now, gone)
    client.set_metadata(version_keys(handle), pickle.dumps((now, gone)))
    for left in reversed(range(_TRIES)):
        try:
            client.register_plugin(plugin)
            break
        except OSError:  # of a worker that is just going; the others are to be told all the same
            if not left:
                raise
    _learn_here(client, handle, now, gone)
    client.run(sweep_on, handle, on_error="ignore")
