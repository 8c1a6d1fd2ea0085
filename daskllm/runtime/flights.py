"""How a step travels from stage to stage: a `Flight` as a message of arrays, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from distributed.protocol import to_serialize

from daskllm.blocks import array
from daskllm.engine.batch import Batch
from daskllm.engine.stage import Flight
from daskllm.runtime.wire import Message

__all__ = ["pack", "unpack"]

_INTS = ("tokens", "positions", "slots", "tables", "tiles", "wanted")


def pack(flight: Flight, run: str) -> Message:
    """A step as a message: its integers as one array, the residual stream in the bytes of its own type."""
    parts = [getattr(flight.batch, name).cpu().numpy() for name in _INTS]
    hidden = None if flight.hidden is None else array.from_torch(flight.hidden.cpu().contiguous())
    return {
        "run": run,
        "number": flight.number,
        "copies": [list(pair) for pair in flight.copies],
        "shapes": [list(part.shape) for part in parts],
        "ints": to_serialize(np.concatenate([part.ravel() for part in parts])),
        "hidden": None if hidden is None else to_serialize(hidden),
    }


def unpack(
    number: int,
    copies: Sequence[Sequence[int]],
    shapes: Sequence[Sequence[int]],
    ints: np.ndarray[Any, Any],
    hidden: np.ndarray[Any, Any] | None,
    dtype: str,
    device: str,
) -> Flight:
    """The step that `pack` made a message of.

    Args:
        dtype: of the residual stream.
        device: where the stage runs.
    """
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    parts = np.split(_writable(ints), list(ends)[:-1])
    tensors = [torch.from_numpy(p).reshape(*s).to(device) for p, s in zip(parts, shapes, strict=True)]
    stream = None if hidden is None else array.to_torch(_writable(hidden), dtype).to(device)
    return Flight(number, Batch(*tensors), tuple((a, b) for a, b in copies), stream)


def _writable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Received memory is sometimes read-only, and a runner overwrites the residual stream."""
    return values if values.flags.writeable else values.copy()
