"""Bytes from worker to worker: a request to a handler, messages in order, a step as arrays.

It owns how a `Flight` travels and when a worker counts as gone. It refuses to know what stages do with what
arrives. Nothing here passes through the scheduler or a client.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from distributed.comm.core import CommClosedError
from distributed.core import send_recv
from distributed.protocol import to_serialize

from daskllm.blocks import array
from daskllm.engine.batch import Batch
from daskllm.engine.stage import Flight
from daskllm.types import StageLostError

__all__ = ["Courier", "Message", "Node", "ask", "pack", "unpack"]

CONNECT_SECONDS = 5.0
"""A worker that is there takes milliseconds; Dask's own limit of 30 s would leave callers in the dark."""

Message: TypeAlias = Mapping[str, Any]
_INTS = ("tokens", "positions", "slots", "tables", "tiles", "wanted")


class Node(Protocol):
    """Who sends: a worker or a client."""

    @property
    def rpc(self) -> Any: ...
    @property
    def loop(self) -> Any: ...
    @property
    def scheduler(self) -> Any: ...


async def ask(node: Node, address: str, handler: str, **message: Any) -> Any:
    """The reply of a worker's handler; what the handler raises is raised here.

    Raises:
        StageLostError: the worker is gone or cannot be reached.
    """
    try:
        comm = await node.rpc.connect(address, timeout=CONNECT_SECONDS)
    except OSError as error:
        raise StageLostError(f"worker {address} cannot be reached") from error
    try:
        return await send_recv(comm, op=f"daskllm_{handler}", **message)
    except CommClosedError as error:
        raise StageLostError(f"worker {address} is gone") from error
    finally:
        node.rpc.reuse(address, comm)  # or forgets it, where it is closed


class Courier:
    """Messages to one handler of one worker, one after the other in the order of `send`.

    Made on the event loop.

    Args:
        failed: called on the event loop with a message's number and why it did not arrive.
    """

    def __init__(
        self, node: Node, address: str, handler: str, failed: Callable[[int, BaseException], None]
    ) -> None:
        self._node, self._address, self._handler, self._failed = node, address, handler, failed
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    def send(self, message: Message) -> None:
        """Queue a message, from any thread."""
        self._loop.call_soon_threadsafe(self._messages.put_nowait, message)

    def close(self) -> None:
        """Stop; what has not been sent stays."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            message = await self._messages.get()
            try:
                await ask(self._node, self._address, self._handler, **message)
            except Exception as error:  # a stage that raises fails its step, not those behind it
                self._failed(message["number"], error)


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
