"""Rows that other processes ask of an engine here: started, polled, dropped.

It owns the calls under way on one worker and how long one is kept whose caller is silent. It refuses to know
where the rows come from; `daskllm.runtime.remote` is the other end.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed.protocol import to_serialize

if TYPE_CHECKING:
    from daskllm.session import Progress, Session
    from daskllm.types import Completion, ModelSpec

__all__ = ["Calls"]

POLL_SECONDS = 0.25
"""How long a poll waits for news."""
SILENCE_SECONDS = 60.0
"""A caller that has not polled for so long is gone, and nobody waits for its rows."""


class Calls:
    """The calls of one worker.

    Args:
        enter: opens a model whose engine is here, by where it is and by what its version was before it moved.
        leave: called when a call of it is over.
    """

    def __init__(
        self,
        enter: Callable[[ModelSpec, ModelSpec], Awaitable[Session]],
        leave: Callable[[ModelSpec], None],
    ) -> None:
        self._enter, self._leave = enter, leave
        self._calls: dict[str, _Call] = {}

    async def ask(self, spec: ModelSpec, first: ModelSpec, kind: str, arguments: Mapping[str, Any]) -> str:
        """Start a call of a session's method ``kind``; its name for `poll` and `drop`."""
        session = await self._enter(spec, first)
        name = uuid.uuid4().hex

        def over() -> None:
            self._leave(spec)
            # One whose caller is gone would keep its rows for good.
            asyncio.get_running_loop().call_later(SILENCE_SECONDS, self._calls.pop, name, None)

        call = self._calls[name] = _Call(session, kind, arguments, over)
        call.start()
        return name

    async def poll(self, name: str) -> dict[str, Any]:
        """What is new: pieces of a stream, counts of rows, and at the end the result or what was raised.

        Rows that are generated are news as they finish, with their positions; they are no result at the end.

        Raises:
            KeyError: the call was dropped.
        """
        news = await self._calls[name].news()
        if news["done"]:
            self._calls.pop(name, None)
        return news

    async def drop(self, name: str) -> None:
        """Stop a call; nothing happens where it is over."""
        call = self._calls.pop(name, None)
        if call is not None:
            call.dropped = True


class _Call:
    """One call, in a thread of its own; made on the event loop."""

    def __init__(
        self, session: Session, kind: str, arguments: Mapping[str, Any], over: Callable[[], None]
    ) -> None:
        self._over = over
        self.dropped = False
        self._error: BaseException | None = None
        self._session, self._kind, self._arguments = session, kind, arguments
        self._result: Any = None
        self._pieces: list[str] = []
        self._counts: list[Progress] = []
        self._rows: list[tuple[int, list[Completion]]] = []
        self._done = False
        self._heard = time.monotonic()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"daskllm-{self._kind}", daemon=True).start()

    async def news(self) -> dict[str, Any]:
        self._heard = time.monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
        self._changed.clear()
        pieces, self._pieces = self._pieces, []
        counts, self._counts = self._counts, []
        rows, self._rows = self._rows, []
        # An error is data here: raised in a handler, it would be logged as the worker's own.
        end = to_serialize((self._result, self._error)) if self._done else None
        made = to_serialize((counts, rows))
        return {"done": self._done, "pieces": pieces, "made": made, "end": end}

    def _run(self) -> None:
        try:
            if self._kind == "stream":
                self._stream()
            else:
                told: dict[str, Any] = {"progress": self._count, "cancelled": self._unwanted}
                if self._kind == "generate":
                    self._session.generate(**self._arguments, **told, finished=self._finished)
                else:
                    self._result = getattr(self._session, self._kind)(**self._arguments, **told)
        except BaseException as error:  # it is the caller's, in another process
            self._error = error
        self._tell(self._finish)

    def _stream(self) -> None:
        pieces = self._session.stream(**self._arguments)
        for piece in pieces:
            self._tell(self._pieces_add, piece)
            if self._unwanted():
                pieces.close()  # type: ignore[attr-defined]
                raise InterruptedError(f"nobody has read the stream for {SILENCE_SECONDS:.0f} s")

    def _unwanted(self) -> bool:
        return self.dropped or time.monotonic() - self._heard > SILENCE_SECONDS

    def _count(self, counts: Progress) -> None:
        self._tell(self._counts_add, counts)

    def _finished(self, rows: Sequence[tuple[int, list[Completion]]]) -> None:
        self._tell(self._rows_add, rows)

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the worker's loop has ended, and nobody listens
            self.dropped = True

    def _pieces_add(self, piece: str) -> None:
        self._pieces.append(piece)
        self._changed.set()

    def _counts_add(self, counts: Progress) -> None:
        self._counts.append(counts)
        self._changed.set()

    def _rows_add(self, rows: Sequence[tuple[int, list[Completion]]]) -> None:
        self._rows += rows
        self._changed.set()

    def _finish(self) -> None:
        self._over()
        del self._session  # and with it a model that may have been replaced meanwhile
        self._done = True
        self._changed.set()
