"""The layers that this process holds, by model specification; whoever runs some of them shares them.

It owns that registry alone. It refuses to know who asks: a session, a stage, or a task that is one layer.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daskllm.engine.layers import ResidentModel
    from daskllm.types import ModelSpec

__all__ = ["close_model", "model_for", "resident_bytes"]

_lock = threading.Lock()
_models: dict[ModelSpec, ResidentModel] = {}


def model_for(spec: ModelSpec) -> ResidentModel:
    """This process's layers of ``spec``, each loaded when it is first run; its session has the same.

    Raises:
        ModelError: the directory cannot be read.
    """
    # A scheduler or client that unpickles a graph imports this module and must not import torch for it.
    from daskllm.engine.layers import ResidentModel

    with _lock:
        if spec not in _models:
            _models[spec] = ResidentModel.open(spec)
        return _models[spec]


def close_model(spec: ModelSpec) -> None:
    """Let this process's layers of ``spec`` go; nothing happens where there are none."""
    with _lock:
        model = _models.pop(spec, None)
    if model is not None:
        model.close()


def resident_bytes(spec: ModelSpec) -> dict[str, int]:
    """Layer -> bytes of its weights, for the layers of ``spec`` that this process holds."""
    with _lock:
        model = _models.get(spec)
    return {} if model is None else model.nbytes()


# Threads do not survive a fork, so neither do sessions and what they share.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_models.clear)
