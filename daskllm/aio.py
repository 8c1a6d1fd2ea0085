"""A model for those who await: the same calls from an event loop, by an asynchronous Dask client or by none.

Each call runs in a thread of its own, by a synchronous client of the same cluster, so that there is one way
of answering. It owns that client. It refuses to know how rows are answered (`llm`).
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from daskllm.llm import LLM, load

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.text.tokenizer import Tokenizer
    from daskllm.types import ModelSpec

__all__ = ["AsyncLLM", "load_async"]

T = TypeVar("T")


class AsyncLLM:
    """As `daskllm.LLM`, with calls to be awaited; `load_async` makes one.

    ``df.llm`` takes it as it is, and a Dask table's result is computed by the asynchronous client. What works
    at once, such as a pandas table or ``out.llm.to_parquet``, goes by `run`. Cancelling a call ends the wait,
    not the rows.

    Attributes:
        llm: the synchronous handle.
        spec, answers, client: as of `LLM`; the client is the synchronous one.

    Example:
        >>> from daskllm import demo
        >>> async def ask():
        ...     async with await load_async(demo.model_path()) as llm:
        ...         return (await llm.chat("Calculate 770 + 951.")).text
        >>> asyncio.run(ask())
        '1721'
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.spec: ModelSpec = llm.spec
        self.client = llm.client

    @property
    def answers(self) -> str | None:
        return self.llm.answers

    @property
    def tokenizer(self) -> Tokenizer:
        """As `LLM.tokenizer`."""
        return self.llm.tokenizer

    @property
    def session(self) -> Callable[[], Any]:
        """As `LLM.session`."""
        return self.llm.session

    async def run(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> T:
        """What a function returns, in a thread whose current client is the model's cluster's.

        Example::

            await llm.run(out.llm.to_parquet, "judged")
            answered = await llm.run(df.llm.chat, llm, "{text}")  # a pandas table
        """

        def current() -> T:
            with nullcontext() if self.client is None else self.client.as_current():
                return function(*arguments, **options)

        return await asyncio.to_thread(current)

    async def generate(self, prompts: Any, **sampling: Any) -> Any:
        """See `LLM.generate`."""
        return await self.run(self.llm.generate, prompts, **sampling)

    async def chat(self, messages: Any, **sampling: Any) -> Any:
        """See `LLM.chat`."""
        return await self.run(self.llm.chat, messages, **sampling)

    async def score(self, texts: Any, **options: Any) -> Any:
        """See `LLM.score`."""
        return await self.run(self.llm.score, texts, **options)

    async def embed(self, texts: Any, **options: Any) -> Any:
        """See `LLM.embed`."""
        return await self.run(self.llm.embed, texts, **options)

    async def stream(self, prompt: str | Sequence[int], **sampling: Any) -> AsyncIterator[str]:
        """See `LLM.stream`: ``async for piece in llm.stream("Once upon a time")``."""
        pieces = self.llm.stream(prompt, **sampling)
        try:
            while (piece := await self.run(next, pieces, None)) is not None:
                yield piece
        finally:
            await self.run(pieces.close)

    async def update(self, checkpoint: str | os.PathLike[str], **options: Any) -> None:
        """See `LLM.update`."""
        await self.run(self.llm.update, checkpoint, **options)

    async def close(self) -> None:
        """See `LLM.close`."""
        await self.run(self.llm.close)
        if self.client is not None:
            await asyncio.to_thread(self.client.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self.close()


async def load_async(
    model: str | os.PathLike[str], *, client: Client | None = None, **options: Any
) -> AsyncLLM:
    """Open a model from an event loop.

    Args:
        client: an asynchronous client whose workers answer; None opens the model in this process.
        model, options, raises: as `daskllm.load`.

    Example:
        >>> from daskllm import demo
        >>> from distributed import Client
        >>> async def ask():
        ...     options = {"processes": False, "n_workers": 1, "dashboard_address": None}
        ...     async with Client(asynchronous=True, **options) as client:
        ...         async with await load_async(demo.model_path(), client=client) as llm:
        ...             return [answer.text for answer in await llm.chat(["77加81等于几？"], max_tokens=8)]
        >>> asyncio.run(ask())
        ['158']
    """
    if client is None:
        return AsyncLLM(await asyncio.to_thread(load, model, **options))
    from distributed import Client  # whoever has one has imported it already

    if not isinstance(client, Client) or not client.asynchronous:
        raise TypeError(f"client must be an asynchronous distributed.Client or None, not {client!r:.80}")
    other = functools.partial(Client, security=client.security, set_as_default=False)
    beside: Client = await asyncio.to_thread(other, client.scheduler.address)
    try:
        return AsyncLLM(await asyncio.to_thread(load, model, client=beside, **options))
    except BaseException:
        await asyncio.to_thread(beside.close)
        raise
