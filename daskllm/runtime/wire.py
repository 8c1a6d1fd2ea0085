"""Bytes from worker to worker: a request to a handler, messages in order.

It owns when a worker counts as gone. It refuses to know what is in a message. Nothing here passes through the
scheduler or a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from distributed.comm.core import CommClosedError
from distributed.core import send_recv

from daskllm.types import StageLostError

__all__ = ["Courier", "Message", "Node", "ask"]

CONNECT_SECONDS = 5.0
"""A worker that is there takes milliseconds; Dask's own limit of 30 s would leave callers in the dark."""

Message: TypeAlias = Mapping[str, Any]


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
