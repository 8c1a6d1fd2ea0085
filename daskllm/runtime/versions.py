"""Which weights a handle stands for now: the versions that updates have made of a model.

A handle is the specification that a user's `LLM` and every graph made from it carry. An update gives it
another specification, its present version, and supersedes those before. Each process has a record of its own;
calls carry it along where they go. It owns that record. It refuses to open and to close anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskllm.types import ModelSpec

__all__ = ["known", "learn", "present", "supersede", "superseded"]

_lock = threading.Lock()
_history: dict[Any, tuple[Any, ...]] = {}
_superseded: set[Any] = set()


def present(handle: ModelSpec) -> ModelSpec:
    """The version that answers now; the handle itself where nothing was updated."""
    return known(handle)[-1]


def known(handle: ModelSpec) -> tuple[ModelSpec, ...]:
    """The handle and the versions of it that this process has heard of, the present one last."""
    return _history.get(handle, (handle,))


def learn(handle: ModelSpec, now: ModelSpec, gone: Iterable[ModelSpec] = ()) -> None:
    """Note a handle's present version; one that is no newer than what is known changes nothing.

    Args:
        gone: what else is superseded by it, such as versions that this process has not heard of.

    Example:
        >>> from dataclasses import replace
        >>> from daskllm.types import ModelSpec
        >>> handle = ModelSpec(path="first")
        >>> learn(handle, replace(handle, path="second", version=1))
        >>> present(handle).path, superseded(handle), superseded(present(handle))
        ('second', True, False)
    """
    with _lock:
        before = known(handle)
        if now != handle and now.version > before[-1].version:
            for old in (*before, *gone):
                _superseded.update((old, *old.chains))
            _history[handle] = (*before, now)


def supersede(spec: ModelSpec) -> None:
    """Note that a specification is an old version's; one whose stages have moved, for instance."""
    with _lock:
        _superseded.add(spec)


def superseded(spec: ModelSpec) -> bool:
    """Whether an update has put another version in its place."""
    return spec in _superseded
