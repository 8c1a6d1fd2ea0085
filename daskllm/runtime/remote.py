"""A session whose engine is on another worker: the same calls, answered there.

It owns asking, polling, giving up, and doing rows again where a stage was lost with its worker. It refuses to
know how a stage runs and which copy of the model is asked (`chains`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed import Client
from distributed.protocol import to_serialize
from distributed.utils import sync

from daskllm.metrics import EngineMetrics
from daskllm.models import describe
from daskllm.runtime.chains import Chains
from daskllm.runtime.loading import files_of
from daskllm.runtime.wire import Node, ask
from daskllm.runtime.worker import current_worker
from daskllm.text.encode import Encoded, Encoder
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import SamplingParams, StageLostError

if TYPE_CHECKING:
    from daskllm.results import Embedding, Score
    from daskllm.session import Progress
    from daskllm.types import Completion, ModelSpec, Pooling, Prompt

    Rows = Sequence[tuple[int, list[Completion]]]

__all__ = ["RemoteSession", "node_for", "reach"]

_LOSSES = 6
"""How many times rows are done again, besides once for each copy, before their loss is an error."""

_clients: weakref.WeakValueDictionary[ModelSpec, Client] = weakref.WeakValueDictionary()


def reach(spec: ModelSpec, client: Client) -> None:
    """Let this process reach a model's stages by the client that it was loaded with, be it current or not."""
    _clients[spec] = client


class RemoteSession:
    """As `daskllm.session.Session`; its rows go to the worker of the last stage and their answers come back.

    All rows of one call go to the same copy of the model.

    Args:
        spec: with stages or replicas.

    Attributes:
        metrics: what was done at this end; each engine has its own.
        rows_together: how many rows from here an engine should have at least; more come from other workers.
    """

    rows_together = 0

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.metrics = EngineMetrics()
        checkpoint = files_of(spec)
        try:
            self.config = describe(checkpoint.config)
            self.tokenizer = Tokenizer.from_directory(checkpoint.path)
        finally:
            checkpoint.close()
        self.context = self.config.max_positions
        self._encoder = Encoder(self.tokenizer, self.config.vocab_size, self.context)
        self._chains = Chains(spec, self.config)

    def close(self) -> None:
        """Nothing but the search for lost copies' places is going on here."""
        self._chains.close()

    def encode(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Encoded]:
        """See `daskllm.session.Session.encode`."""
        return self._encoder.encode(prompts, params)

    def generate(
        self,
        prompts: Sequence[Prompt | Encoded],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        job_seed: int = 0,
        places: Sequence[tuple[int, ...]] | None = None,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        finished: Callable[[Rows], None] | None = None,
    ) -> list[list[Completion]]:
        """See `daskllm.session.Session.generate`.

        Where a worker that holds layers is lost, the rows that have not finished are done again by another
        copy of the model, or by the same one when its layers are on another worker.

        Raises:
            PlanError: the workers that are left have no room for them.
            StageLostError: one worker was lost after another.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        where = [(row,) for row in range(len(prompts))] if places is None else places
        answers: dict[int, list[Completion]] = {}
        asked: list[int] = []
        arguments: dict[str, Any] = {"job_seed": job_seed, "priority": priority}

        def ask_for_the_rest() -> bool:
            asked[:] = [row for row in range(len(prompts)) if row not in answers]
            for name, values in (("prompts", prompts), ("params", each), ("places", where)):
                arguments[name] = [values[row] for row in asked]
            return bool(asked)

        def take(rows: Rows) -> None:
            mine = [(asked[position], samples) for position, samples in rows]
            answers.update(mine)
            if finished is not None and mine:
                finished(mine)

        if ask_for_the_rest():
            self._answer("generate", arguments, progress, cancelled, take, ask_for_the_rest)
        return [answers[row] for row in range(len(prompts))]

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """See `daskllm.session.Session.score`."""
        return self._answer("score", {"prompts": prompts, "priority": priority}, progress, cancelled)

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Embedding]:
        """See `daskllm.session.Session.embed`."""
        arguments = {"prompts": prompts, "pooling": pooling, "normalize": normalize, "priority": priority}
        return self._answer("embed", arguments, progress, cancelled)

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
        take: Callable[[Rows], None] | None = None,
        ask_for_the_rest: Callable[[], bool] | None = None,
    ) -> Any:
        """The result of a call that is no stream.

        Args:
            take: gets the rows that have finished; rows are no result then.
            ask_for_the_rest: called where a stage was lost; it takes out of ``arguments`` what has finished,
                and tells whether anything is left.
        """
        result = None
        for news in self._kept(kind, arguments):
            if news is None:
                if ask_for_the_rest is not None and not ask_for_the_rest():
                    break
                continue
            counted, rows = news["made"]
            if take is not None:
                take(rows)
            if progress is not None:
                for counts in counted:
                    progress(counts)
            if news["done"]:
                result, _ = news["end"]
            elif cancelled is not None and cancelled():
                raise InterruptedError("the rows were cancelled")
        return result

    def _kept(self, kind: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """As `_news`; None where it starts again because a stage was lost."""
        rows = len(arguments.get("prompts", ("the one prompt of a stream",)))
        for _ in range(_LOSSES + len(self.spec.replicas)):
            node = node_for(self.spec)
            with self._chains.chosen(node, rows) as chain:
                try:
                    yield from self._news(node, chain, kind, arguments)
                    return
                except StageLostError as error:
                    lost = error
            self._chains.lose(node, chain)
            yield None
        raise lost

    def _news(
        self, node: Node, spec: ModelSpec, kind: str, arguments: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """What the engine's worker says of a call, a few times a second, until it is done."""
        engine = spec.stages[-1].worker

        async def request(handler: str, message: dict[str, Any]) -> Any:
            # The scheduler knows of a death long before a connection is given up.
            if handler == "ask" and engine not in (await node.scheduler.identity())["workers"]:
                raise StageLostError(f"worker {engine}, which has the last stage, is gone")
            return await ask(node, engine, handler, **message)

        def there(handler: str, **message: Any) -> Any:
            return sync(node.loop, request, handler, message)

        specs = {"spec": to_serialize(spec), "first": to_serialize(self.spec)}
        name = there("ask", **specs, kind=kind, arguments=to_serialize(arguments))
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
                yield news  # what finished before something was raised, too
                if done and (raised := news["end"][1]) is not None:
                    raise raised
        finally:
            if not done:
                with suppress(StageLostError):
                    there("drop", name=name)


def node_for(spec: ModelSpec) -> Node:
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
