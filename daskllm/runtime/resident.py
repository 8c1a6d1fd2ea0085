"""The layers that this process holds, by model specification; whoever runs some of them shares them.

It owns that registry, and where the process's files come from. It refuses to know who asks: a session, a
stage, or a task that is one layer.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from daskllm import machine
from daskllm.engine.ahead import Ahead
from daskllm.types import ModelError

if TYPE_CHECKING:
    from daskllm.checkpoint import Checkpoint
    from daskllm.engine.layers import ResidentModel
    from daskllm.types import ModelSpec

__all__ = [
    "Files",
    "close_model",
    "forget_files",
    "model_for",
    "open_files",
    "open_models",
    "resident_bytes",
    "use_files",
]

_lock = threading.Lock()
_models: dict[ModelSpec, Future[ResidentModel]] = {}
_files: list[Files] = []


class Files(Protocol):
    """Where the files of a process come from, other than straight from their directories."""

    def open(self, spec: ModelSpec) -> Checkpoint:
        """The files of a model."""
        ...

    def release(self, identity: str) -> None:
        """Hear that no model of these files is open here any more."""
        ...


def use_files(files: Files) -> None:
    """Open files by this from now on; the first that is used is the one that is asked."""
    _files.append(files)


def forget_files(files: Files) -> None:
    """Use it no more."""
    if files in _files:
        _files.remove(files)


def open_files(spec: ModelSpec) -> Checkpoint:
    """A model's files in this process.

    Raises:
        ModelError: they cannot be had, or are broken.
    """
    # A scheduler or client that unpickles a graph imports this module and must not import torch for it.
    from daskllm.checkpoint import open_checkpoint

    for files in _files[:1]:
        return files.open(spec)
    found = open_checkpoint(spec.path, spec.revision)
    same = not spec.identity or spec.revision is not None or found.identity == spec.identity
    if not same and (not spec.content or found.content() != spec.content):
        found.close()
        raise ModelError(f"{spec.path} is not what it was when the model was loaded: load it again")
    return found


def model_for(spec: ModelSpec, whole: bool = False) -> ResidentModel:
    """This process's layers of ``spec``, each loaded when it is first run; its session has the same.

    Args:
        whole: all of them are loaded next.

    Raises:
        ModelError: the directory cannot be read.
    """
    # Not under the lock: files may have to come from other workers, and event loops look who is here.
    with _lock:
        opening = _models.get(spec)
        mine = opening is None
        if opening is None:
            opening = _models[spec] = Future()
    if mine:
        ahead = None
        try:
            files = open_files(spec)
            if whole and "torch" not in sys.modules:
                ahead = Ahead(spec, files)
            # Whoever unpickles a graph imports this module and must not import torch for it.
            with machine.uncollected():
                from daskllm.engine.layers import ResidentModel

            opening.set_result(ResidentModel.open(spec, files, ahead))
        except BaseException as error:
            if ahead is not None:
                ahead.close()
            opening.set_exception(error)
            close_model(spec)
    return opening.result()


def close_model(spec: ModelSpec) -> None:
    """Let this process's layers of ``spec`` go; nothing happens where there are none."""
    with _lock:
        opening = _models.pop(spec, None)
    if opening is not None:  # one that is only being opened is closed when it is
        opening.add_done_callback(_close)
    if not any(one.identity == spec.identity for one in open_models()):
        for files in list(_files):
            files.release(spec.identity)


def _close(opening: Future[ResidentModel]) -> None:
    if opening.exception() is None:
        opening.result().close()


def open_models() -> tuple[ModelSpec, ...]:
    """The specifications that this process holds layers of."""
    with _lock:
        return tuple(_models)


def resident_bytes(spec: ModelSpec) -> dict[str, int]:
    """Layer -> bytes of its weights, for the layers of ``spec`` that this process holds."""
    with _lock:
        opening = _models.get(spec)
    known = opening is not None and opening.done() and opening.exception() is None
    return opening.result().nbytes() if opening is not None and known else {}


# Threads do not survive a fork, so neither do sessions and what they share.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_models.clear)
    os.register_at_fork(after_in_child=_files.clear)
