"""A session whose engine is on another worker: the same calls, answered there.

It owns asking, polling, giving up, and doing rows again where a stage was lost with its worker. It refuses to
know how a stage runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed import Client
from distributed.protocol import to_serialize
from distributed.utils import sync

from daskllm.checkpoint import open_checkpoint
from daskllm.models import describe
from daskllm.runtime.heirs import succeed
from daskllm.runtime.wire import Node, ask
from daskllm.runtime.worker import current_worker
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import StageLostError

if TYPE_CHECKING:
    from daskllm.session import Progress, Score
    from daskllm.types import Completion, ModelSpec, Prompt, SamplingParams

__all__ = ["RemoteSession", "reach"]

_LOSSES = 6
"""How many times rows are done again before their loss is an error."""

_clients: weakref.WeakValueDictionary[ModelSpec, Client] = weakref.WeakValueDictionary()


def reach(spec: ModelSpec, client: Client) -> None:
    """Let this process reach a model's stages by the client that it was loaded with, be it current or not."""
    _clients[spec] = client


class RemoteSession:
    """As `daskllm.session.Session`; its rows go to the worker of the last stage and their answers come back.

    Args:
        spec: with stages.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        checkpoint = open_checkpoint(spec.path, spec.revision)
        try:
            self.config = describe(checkpoint.config)
            self.tokenizer = Tokenizer.from_directory(checkpoint.path)
        finally:
            checkpoint.close()
        self.context = self.config.max_positions
        self._present = spec

    def close(self) -> None:
        """Nothing is held here."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        job_seed: int = 0,
        places: Sequence[tuple[int, ...]] | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """See `daskllm.session.Session.generate`.

        Where a worker that holds layers is lost, its layers go to another and the rows are done again.

        Raises:
            PlanError: the workers that are left have no room for them.
            StageLostError: one worker was lost after another.
        """
        arguments = {"prompts": prompts, "params": params, "job_seed": job_seed, "places": places}
        return self._answer("generate", arguments, progress, cancelled)

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """See `daskllm.session.Session.score`."""
        return self._answer("score", {"prompts": prompts}, progress, cancelled)

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """See `daskllm.session.Session.stream`."""
        told = known = 0  # characters: the same text comes again where a stage was lost
        for news in self._kept("stream", {"prompt": prompt, "params": params}):
            if news is None:
                known = 0
                continue
            for piece in news["pieces"]:
                known += len(piece)
                if known > told:
                    yield piece[-(known - told) :]
                    told = known

    def _answer(
        self,
        kind: str,
        arguments: dict[str, Any],
        progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Any:
        result = None
        for news in self._kept(kind, arguments):
            if news is None:
                continue
            if progress is not None:
                for counts in news["counts"]:
                    progress(counts)
            if news["done"]:
                result, _ = news["end"]
            elif cancelled is not None and cancelled():
                raise InterruptedError("the rows were cancelled")
        return result

    def _kept(self, kind: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """As `_news`; None where it starts again because a stage was lost."""
        for _ in range(_LOSSES):
            try:
                yield from self._news(kind, arguments)
                return
            except StageLostError as error:
                lost = error
            node = _node(self.spec)
            self._present = sync(node.loop, succeed, node, self._present, self.config)
            yield None
        raise lost

    def _news(self, kind: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What the engine's worker says of a call, a few times a second, until it is done."""
        node, spec = _node(self.spec), self._present
        engine = spec.stages[-1].worker

        async def request(handler: str, message: dict[str, Any]) -> Any:
            # The scheduler knows of a death long before a connection is given up.
            if handler == "ask" and engine not in (await node.scheduler.identity())["workers"]:
                raise StageLostError(f"worker {engine}, which has the last stage, is gone")
            return await ask(node, engine, handler, **message)

        def there(handler: str, **message: Any) -> Any:
            return sync(node.loop, request, handler, message)

        name = there("ask", spec=to_serialize(spec), kind=kind, arguments=to_serialize(arguments))
        done = False
        try:
            while not done:
                try:
                    news = there("poll", name=name)
                except BaseException as error:
                    # What the engine raised ended the call there; an interrupt here did not.
                    done = isinstance(error, Exception)
                    raise
                done = news["done"]
                if done and (raised := news["end"][1]) is not None:
                    raise raised
                yield news
        finally:
            if not done:
                with suppress(StageLostError):
                    there("drop", name=name)


def _node(spec: ModelSpec) -> Node:
    """Who can reach workers from here: this task's worker, the model's own client, or the current one."""
    node: Node | None = current_worker()
    if node is not None:
        return node
    client = _clients.get(spec)
    if client is not None and client.status == "running":
        return client
    try:
        return Client.current(allow_global=True)
    except ValueError:
        raise ValueError(
            "a model in stages is answered by its cluster: there is no client here to reach it by"
        ) from None
