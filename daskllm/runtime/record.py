"""Where the scheduler's metadata say what has become of a model: its present version, and its heirs.

It owns the keys, and reads on the scheduler itself, which has no torch. Who writes is `update` and `heirs`.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Scheduler

    from daskllm.types import ModelSpec

__all__ = ["heir_keys", "latest", "version_keys"]


def version_keys(handle: ModelSpec) -> list[str]:
    """Where a handle's present version is written, with those before it."""
    return ["daskllm-versions", _name(handle)]


def heir_keys(spec: ModelSpec) -> list[str]:
    """Where the heir of a specification is written, that has its stages elsewhere."""
    return ["daskllm-heirs", _name(spec)]


def latest(scheduler: Scheduler, handle: ModelSpec) -> ModelSpec:
    """The present version of a model with its stages where they are now, read on the scheduler."""
    written = scheduler.get_metadata(version_keys(handle), None)
    spec: ModelSpec = handle if written is None else pickle.loads(written)[0]
    while spec.chains and (heir := scheduler.get_metadata(heir_keys(spec), None)) is not None:
        spec = pickle.loads(heir)
    return spec


def _name(spec: ModelSpec) -> str:
    return hashlib.sha256(repr(spec).encode()).hexdigest()
